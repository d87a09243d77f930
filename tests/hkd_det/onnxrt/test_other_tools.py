"""Configurations of the package on graphs with the inputs and outputs of each tool, and constant detections.

The input has 64x96 pixels, and the image 128x192: every box in the image is twice as large as in the input.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hkd_det.errors import DataError
from hkd_det.onnxrt.detector import open_onnx_detector

Shape = tuple[int | str, ...]
IMAGE = np.zeros((128, 192, 3), np.uint8)
# In input pixels: a person, a car, and a person with a low score.
BOXES_XYXY = np.array([[12, 16, 24, 48], [48, 32, 72, 64], [0, 8, 6, 24]], np.float32)
SCORES = np.array([0.75, 0.9, 0.25], np.float32)
IN_IMAGE = [[24, 32, 48, 96], [0, 16, 12, 48]]  # the persons
SIDES = np.array([96, 64, 96, 64], np.float32)
LABELS = np.array([0, 2, 0], np.int64)


def write_constant_model(
    path: Path,
    outputs: Mapping[str, np.ndarray],
    input_shape: Shape = (1, 3, 64, 96),
    inputs: Mapping[str, tuple[int, Shape]] | None = None,
    metadata: dict[str, str] | None = None,
    scaled: Mapping[str, str] | None = None,
) -> Path:
    """Write a model that returns constants for an image of any content.

    Args:
        path: File to write.
        outputs: Name and value of each output.
        input_shape: Shape of the image input, float32.
        inputs: Number type and shape of further inputs.
        metadata: Metadata of the file.
        scaled: Outputs that are multiplied by a further input [B, 2], repeated twice: boxes [B, N, 4].
    """
    nodes, constants, image_name = [], [], "images"
    for name, value in outputs.items():
        source = f"{name}_value"
        constants.append(numpy_helper.from_array(value, source))
        factor = (scaled or {}).get(name)
        if factor:
            nodes += [
                helper.make_node("Cast", [factor], ["sizes"], to=TensorProto.FLOAT),
                helper.make_node("Concat", ["sizes", "sizes"], ["sides"], axis=1),
                helper.make_node("Unsqueeze", ["sides", "one"], ["row"]),
                helper.make_node("Mul", [source, "row"], [name]),
            ]
            constants.append(helper.make_tensor("one", TensorProto.INT64, [1], [1]))
        else:
            nodes.append(helper.make_node("Identity", [source], [name]))
    values = [helper.make_tensor_value_info(image_name, TensorProto.FLOAT, list(input_shape))]
    values += [helper.make_tensor_value_info(name, *spec) for name, spec in (inputs or {}).items()]
    infos = [_make_info(name, value) for name, value in outputs.items()]
    graph = helper.make_graph(nodes, "constants", values, infos, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def _make_info(name: str, value: np.ndarray) -> Any:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def to_cxcywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


def to_logits(scores: np.ndarray) -> np.ndarray:
    return np.log(scores / (1 - scores)).astype(np.float32)


def make_class_scores(num_classes: int, person: int, other: int) -> np.ndarray:
    classes = np.full((3, num_classes), 0.001, np.float32)
    classes[[0, 2], person], classes[1, other] = SCORES[[0, 2]], SCORES[1]
    return classes


def make_detection_output(labels: list[int], scores: np.ndarray = SCORES, image: int = 0) -> np.ndarray:
    rows = np.column_stack([np.full(3, image), labels, scores, BOXES_XYXY / SIDES]).astype(np.float32)
    return np.concatenate([rows, [[-1, 0, 0.99, 0, 0, 1, 1]]]).astype(np.float32)[None, None]


def make_yolo_rows() -> np.ndarray:
    return np.column_stack([to_cxcywh(BOXES_XYXY), make_class_scores(80, 0, 2)])


PERSON_SCORES = SCORES.copy()
PERSON_SCORES[1] = 0
UNIT = BOXES_XYXY / SIDES
SIZE_INPUT = {"inputs": {"orig_target_sizes": (TensorProto.INT64, ("b", 2))}, "scaled": {"boxes": "orig_target_sizes"}}
PADDLE_INPUTS = {"inputs": {"scale_factor": (TensorProto.FLOAT, (1, 2)), "im_shape": (TensorProto.FLOAT, (1, 2))}}
DETR_OUTPUTS = {"labels": LABELS[None], "boxes": UNIT[None], "scores": SCORES[None]}
TOOLS: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {
    "rt-detr": (DETR_OUTPUTS, SIZE_INPUT),
    "d-fine": (DETR_OUTPUTS, SIZE_INPUT),
    "deim": (DETR_OUTPUTS, SIZE_INPUT),
    "deimv2": (DETR_OUTPUTS, SIZE_INPUT),
    "rtmdet": ({"dets": np.column_stack([BOXES_XYXY, SCORES])[None], "labels": LABELS[None]}, {}),
    "rf-detr": (
        {"dets": to_cxcywh(UNIT)[None], "labels": to_logits(make_class_scores(91, 1, 3))[None]},
        {},
    ),
    "rt-detr-transformers": (
        {"logits": to_logits(make_class_scores(80, 0, 2))[None], "pred_boxes": to_cxcywh(UNIT)[None]},
        {},
    ),
    "torchvision": ({"2718": BOXES_XYXY, "2715": LABELS + 1, "2716": SCORES}, {}),
    "tf-ssd": (
        {
            "detection_boxes": UNIT[None][..., [1, 0, 3, 2]],
            "detection_classes": (LABELS + 1)[None].astype(np.float32),
            "detection_scores": SCORES[None],
            "num_detections": np.array([3], np.float32),
        },
        {"input_shape": (1, 64, 96, 3)},
    ),
    "open-model-zoo-ssd": ({"detection_out": make_detection_output([1, 1, 1], PERSON_SCORES)}, {}),
    "open-model-zoo-boxes": (
        {"boxes": np.column_stack([BOXES_XYXY, PERSON_SCORES]), "labels": np.ones(3, np.int64)},
        {},
    ),
    "picodet-nms": (
        {"table": np.column_stack([LABELS, SCORES, BOXES_XYXY]).astype(np.float32), "count": np.array([3], np.int32)},
        PADDLE_INPUTS,
    ),
    "pp-yoloe": (
        {"table": np.column_stack([LABELS, SCORES, BOXES_XYXY]).astype(np.float32), "count": np.array([3], np.int32)},
        PADDLE_INPUTS,
    ),
    "yolov5": (
        {"output0": np.column_stack([to_cxcywh(BOXES_XYXY), np.ones(3), make_class_scores(80, 0, 2)])[None]},
        {},
    ),
    "yolov8": (
        {"output0": np.pad(make_yolo_rows().T, ((0, 0), (0, 123)))[None]},  # 126 anchor points
        {},
    ),
    "yolo26": ({"output0": np.column_stack([BOXES_XYXY, SCORES, LABELS])[None]}, {}),
}
TOOLS["yolov7"] = TOOLS["yolov5"]


def write_tool_model(path: Path, name: str) -> Path:
    outputs, options = TOOLS[name]
    typed = {key: value.astype(np.float32) if value.dtype == np.float64 else value for key, value in outputs.items()}
    return write_constant_model(path, typed, **options)


@pytest.mark.parametrize("name", TOOLS)
def test_named_config_reads_the_outputs_of_its_tool(tmp_path: Path, name: str) -> None:
    detector = open_onnx_detector(write_tool_model(tmp_path / "model.onnx", name), config_path=Path(name))
    (found,) = detector([IMAGE])
    np.testing.assert_allclose(found.boxes_xyxy, IN_IMAGE, atol=1e-3)
    assert found.scores.tolist() == pytest.approx([0.75, 0.25], abs=1e-6)
    assert detector.config.license and detector.config.homepage


@pytest.mark.parametrize("name", sorted(set(TOOLS) - {"rf-detr"}))
def test_unclear_file_names_the_config_that_reads_it(tmp_path: Path, name: str) -> None:
    """RF-DETR is recognized. Files of the same form list each of their names."""
    path = write_tool_model(tmp_path / "model.onnx", name)
    with pytest.raises(DataError, match=r"model\.onnx: .*no model configuration found\. Its inputs") as caught:
        open_onnx_detector(path)
    assert name in str(caught.value).partition("those of ")[2].partition(".")[0].split(" or ")


def test_batch_of_detection_output_keeps_images_without_detections(tmp_path: Path) -> None:
    """The list has detections of the second of three images only."""
    outputs = {"out": make_detection_output([1, 1, 1], image=1)}
    path = write_constant_model(tmp_path / "model.onnx", outputs, ("b", 3, 64, 96))
    detector = open_onnx_detector(path, config_path=Path("open-model-zoo-ssd"))
    assert [len(found) for found in detector([IMAGE] * 3)] == [0, 3, 0]


def test_unbatched_outputs_of_a_batch_raise(tmp_path: Path) -> None:
    outputs = {"boxes": BOXES_XYXY, "labels": LABELS, "scores": SCORES}
    path = write_constant_model(tmp_path / "model.onnx", outputs, ("b", 3, 64, 96))
    detector = open_onnx_detector(path, config_path=Path("torchvision"))
    with pytest.raises(DataError, match="expected the results of 2 images, got 1"):
        detector([IMAGE] * 2)


def test_unknown_extra_input_raises(tmp_path: Path) -> None:
    inputs = {"prompt": (TensorProto.INT64, (1, 4))}
    outputs = {"boxes": BOXES_XYXY[None], "scores": SCORES[None]}
    path = write_constant_model(tmp_path / "model.onnx", outputs, inputs=inputs)
    with pytest.raises(DataError, match=r"only orig_target_sizes, im_shape, scale_factor, got .*prompt"):
        open_onnx_detector(path, config_path=Path("d-fine"))


def test_unknown_config_name_lists_the_names(tmp_path: Path) -> None:
    path = write_tool_model(tmp_path / "model.onnx", "yolov8")
    with pytest.raises(DataError, match=r"yolov99: no such model configuration\. Give a YAML file, or one of .*yolov8"):
        open_onnx_detector(path, config_path=Path("yolov99"))


def test_yolo_fastestv2_equals_scalar_decoding(tmp_path: Path) -> None:
    """One cell of stride 32: the second of its three anchors."""
    maps = [np.zeros((1, 4, 6, 95), np.float32), np.zeros((1, 2, 3, 95), np.float32)]
    row, column, anchor = 1, 2, 1
    cell = maps[1][0, row, column]
    cell[4 * anchor : 4 * anchor + 4] = 0.75, 0.5, 0.5, 0.25
    cell[12 + anchor], cell[15] = 0.8, 0.5
    path = write_constant_model(tmp_path / "model.onnx", {"a": maps[0], "b": maps[1]})
    (found,) = open_onnx_detector(path, config_path=Path("yolo-fastestv2"))([IMAGE])
    x, y = (2 * 0.75 - 0.5 + column) * 32, (2 * 0.5 - 0.5 + row) * 32
    width, height = (2 * 0.5) ** 2 * 131.57, (2 * 0.25) ** 2 * 214.55
    expected = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2]) * 2
    np.testing.assert_allclose(found.boxes_xyxy, [np.clip(expected, 0, [192, 128, 192, 128])], rtol=1e-5)
    assert found.scores.tolist() == pytest.approx([0.4])


def test_nanodet_points_are_half_a_pixel_before_the_cell_center(tmp_path: Path) -> None:
    """All distances have the same logits: each side is 3.5 strides away from the point."""
    levels = [(8, 12), (4, 6), (2, 3)]
    classes = [np.zeros((1, height * width, 80), np.float32) for height, width in levels]
    classes[0][0, 5 * 12 + 6, 0] = 0.5
    bins = [np.zeros((1, height * width, 32), np.float32) for height, width in levels]
    outputs = {f"output{index}": array for index, array in enumerate([*classes, *bins])}
    path = write_constant_model(tmp_path / "model.onnx", outputs)
    (found,) = open_onnx_detector(path, config_path=Path("nanodet"))([IMAGE])
    x, y = 6 * 8 + 3.5, 5 * 8 + 3.5
    expected = np.array([x - 28, y - 28, x + 28, y + 28]) * 2
    np.testing.assert_allclose(found.boxes_xyxy, [np.clip(expected, 0, [192, 128, 192, 128])], rtol=1e-5)
