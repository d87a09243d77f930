"""Recognition of YOLOv5, RF-DETR and the Open Model Zoo, and OpenVINO models as ONNX ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hkd_det.errors import DataError
from hkd_det.onnxrt.detector import open_onnx_detector
from hkd_det.onnxrt.graph_io import GraphIO, TensorSpec
from hkd_det.onnxrt.recognition import load_model_config

IMAGE = np.full((100, 200, 3), 255, np.uint8)
YOLOV5 = {"stride": "32", "names": "['car', 'person']"}
UNKNOWN = "no model configuration found"


def make_graph(metadata: dict[str, str], outputs: dict[str, tuple[int | None, ...]], name: str = "main") -> GraphIO:
    image = TensorSpec("images", "tensor(float)", (1, 3, 64, 96))
    return GraphIO(
        name, metadata, (image,), tuple(TensorSpec(key, "tensor(float)", shape) for key, shape in outputs.items())
    )


def test_yolov5_is_recognized_by_metadata_and_shape() -> None:
    """Three anchors in each of the 8 * 12 + 4 * 6 + 2 * 3 cells."""
    config = load_model_config(Path("best.onnx"), make_graph(YOLOV5, {"output0": (1, 378, 7)}))
    assert (config.output_format, config.person_class_id, config.resize_mode) == ("yolov5-raw", 1, "center")
    assert (config.input_scale, config.license) == (1, "AGPL-3.0 (Ultralytics)")


@pytest.mark.parametrize(
    ("metadata", "shape"),
    [
        (YOLOV5, (1, 126, 7)),  # one anchor per cell
        (YOLOV5, (1, 378, 85)),  # other classes
        ({"stride": "32", "names": "['car', 'bus']"}, (1, 378, 7)),
        ({"stride": "32", "names": "no list"}, (1, 378, 7)),
        ({}, (1, 378, 7)),
    ],
)
def test_doubtful_yolov5_is_not_recognized(metadata: dict[str, str], shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=UNKNOWN):
        load_model_config(Path("best.onnx"), make_graph(metadata, {"output0": shape}))


def test_rf_detr_is_recognized_only_with_the_classes_of_coco() -> None:
    config = load_model_config(Path("m.onnx"), make_graph({}, {"dets": (1, 300, 4), "labels": (1, 300, 91)}))
    assert (config.person_class_id, config.score_activation, config.box_format) == (1, "sigmoid", "cxcywh")
    with pytest.raises(DataError, match="those of rf-detr"):
        load_model_config(Path("m.onnx"), make_graph({}, {"dets": (1, 300, 4), "labels": (1, 300, 3)}))


@pytest.mark.parametrize(
    ("file", "name", "outputs", "output_format"),
    [
        ("model.xml", "person-detection-retail-0013", {"detection_out": (1, 1, 200, 7)}, "detection-output"),
        ("pedestrian-detection-adas-0002.xml", "Model0", {"detection_out": (1, 1, 200, 7)}, "detection-output"),
        ("model.xml", "person-detection-0302", {"boxes": (100, 5), "labels": (100,)}, "boxes-scores"),
        ("model.xml", "person-detection-action-recognition-0005", {"a": (1, 2, 3, 4), "b": (1, 2)}, ""),
        ("model.xml", "face-detection-retail-0004", {"detection_out": (1, 1, 200, 7)}, ""),
    ],
)
def test_open_model_zoo_is_recognized_by_name(
    file: str, name: str, outputs: dict[str, tuple[int, ...]], output_format: str
) -> None:
    graph = make_graph({}, outputs, name)
    if not output_format:
        with pytest.raises(DataError, match=UNKNOWN):
            load_model_config(Path(file), graph)
        return
    config = load_model_config(Path(file), graph)
    assert (config.output_format, config.color_order, config.resize_mode) == (output_format, "bgr", "stretch")
    assert config.person_class_id is None and config.license == "Apache-2.0 (Intel)" and "detection" in config.name


@pytest.fixture
def write_ssd(tmp_path: Path) -> Callable[[str], Path]:
    """Write an OpenVINO model with one box of DetectionOutput; its score is the mean of the first (blue) channel."""
    openvino = pytest.importorskip("openvino")
    ops = pytest.importorskip("openvino.opset13")

    def write(name: str) -> Path:
        image = ops.parameter([1, 3, 64, 96], np.float32, name="data")
        blue = ops.gather(image, ops.constant(np.array([0])), ops.constant(1))
        score = ops.divide(ops.reduce_mean(blue, ops.constant(np.array([1, 2, 3])), keep_dims=True), np.float32(255))
        rows = np.zeros((1, 1, 3, 7), np.float32)
        rows[0, 0, :2] = [[0, 1, 0, 0.25, 0.5, 0.5, 1], [-1, 0, 0.9, 0, 0, 1, 1]]
        column = np.zeros_like(rows)
        column[0, 0, 0, 2] = 1
        output = ops.add(rows, ops.multiply(score, column))
        output.output(0).set_names({"detection_out"})
        path = tmp_path / f"{name}.xml"
        openvino.save_model(openvino.Model([ops.result(output)], [image], name), path)
        return path

    return write


def test_openvino_model_of_the_open_model_zoo(write_ssd: Callable[[str], Path]) -> None:
    path = write_ssd("person-detection-retail-0013")
    image = IMAGE * np.array([0, 0, 0.6], np.float32)  # RGB: a blue image
    (found,) = open_onnx_detector(path)([image.round().astype(np.uint8)])
    np.testing.assert_allclose(found.boxes_xyxy, [[50, 50, 100, 100]], rtol=1e-5)
    assert found.scores.tolist() == pytest.approx([0.6], abs=2e-3)


def test_openvino_ports_of_float16_have_the_precision_of_float32(tmp_path: Path) -> None:
    """As in the FP16 files of the Open Model Zoo. A float16 between 128 and 256 is a multiple of 1/8."""
    openvino = pytest.importorskip("openvino")
    ops = pytest.importorskip("openvino.opset13")
    image = ops.parameter([1, 3, 64, 96], np.float16, name="data")
    mean = ops.reduce_mean(image, ops.constant(np.array([1, 2, 3])), keep_dims=True)
    corners = ops.broadcast(mean, ops.constant(np.array([1, 1, 1, 2])))
    table = ops.concat(
        [ops.constant(np.array([[[[0, 0, 1, 0, 0]]]], np.float16)), ops.divide(corners, np.float16(256))], 3
    )
    path = tmp_path / "person-detection-0200.xml"
    openvino.save_model(openvino.Model([ops.result(table)], [image], "person-detection-0200"), path)
    pixels = np.full((64, 96, 3), 150, np.uint8)
    pixels[0, 0] = 200  # mean 150 + 50 / 6144
    (found,) = open_onnx_detector(path)([pixels])
    side = (150 + 50 / 6144) / 256
    np.testing.assert_allclose(found.boxes_xyxy, [[0, 0, side * 96, side * 64]], rtol=1e-5)


def test_openvino_model_without_configuration_raises(write_ssd: Callable[[str], Path]) -> None:
    path = write_ssd("face-detection-retail-0004")
    with pytest.raises(DataError, match="those of open-model-zoo-ssd"):
        open_onnx_detector(path)
    assert len(open_onnx_detector(path, config_path=Path("open-model-zoo-ssd"))([IMAGE])[0]) == 1
    path.with_suffix(".bin").unlink()
    with pytest.raises(DataError, match=r"0004\.bin: no such model file"):
        open_onnx_detector(path)


@pytest.mark.slow  # imports torch
def test_openvino_model_is_a_teacher_and_audits_labels(write_ssd: Callable[[str], Path]) -> None:
    torch = pytest.importorskip("torch")
    from hkd_det.datasets.audit_run import open_audit_models
    from hkd_det.models.zoo import load_teacher

    path = write_ssd("person-detection-retail-0013")
    teacher = load_teacher(path, torch.device("cpu"))
    detections = teacher(torch.full((2, 3, 100, 200), 255, dtype=torch.uint8))
    assert [boxes.tolist() for boxes in detections.boxes_xyxy] == [[[50, 50, 100, 100]]] * 2
    (model,) = open_audit_models([path], [], "cpu")
    assert model.name == path.stem and len(model.detector([IMAGE])[0]) == 1
