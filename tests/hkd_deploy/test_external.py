"""ONNX detectors of other tools in `open_detector`, on every CPU backend."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper

from hkd_deploy import Detector, open_detector
from hkd_deploy.external import is_external_model
from hkd_det.errors import DataError, UsageError

HW = (64, 96)
CONFIG = {"output_format": "yolo-e2e", "input_scale": 1, "resize_mode": "stretch", "name": "Mean", "license": "MIT"}
ULTRALYTICS = {
    "author": "Ultralytics",
    "description": "Ultralytics YOLO11n model on street.yaml",
    "license": "AGPL-3.0 License (https://ultralytics.com/license)",
    "task": "detect",
    "imgsz": str(list(HW)),
    "names": "{0: 'car', 1: 'Person'}",
    "args": "{'batch': 1, 'nms': True, 'dynamic': False}",
    "end2end": "False",
}


def write_mean_model(path: Path, metadata: dict[str, str] | None = None, class_id: float = 0.0) -> Path:
    """Write a model that returns the box 8, 16, 24, 48 twice. The scores are the mean of the input and half of it.

    The output format is yolo-e2e: no NMS.
    """
    box = [8.0, 16.0, 24.0, 48.0, 0.0, class_id]
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=1),  # [B, 1, 1, 1]
        helper.make_node("Squeeze", ["mean", "last"], ["row"]),  # [B, 1, 1]
        helper.make_node("Mul", ["row", "score"], ["scores"]),  # [B, 2, 6]
        helper.make_node("Add", ["scores", "boxes"], ["output0"]),
    ]
    score = [0.0] * 4 + [1.0, 0.0] + [0.0] * 4 + [0.5, 0.0]
    constants = [
        helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("score", TensorProto.FLOAT, [1, 2, 6], score),
        helper.make_tensor("boxes", TensorProto.FLOAT, [1, 2, 6], box * 2),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, *HW])
    output = helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 2, 6])
    graph = helper.make_graph(nodes, "mean", [images], [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def mean_onnx(tmp_path: Path) -> Path:
    """A model with its configuration next to it."""
    path = write_mean_model(tmp_path / "mean.onnx")
    path.with_suffix(".yaml").write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(params=["onnxruntime", "openvino"])
def detector(request: pytest.FixtureRequest, mean_onnx: Path) -> Iterator[Detector]:
    with open_detector(mean_onnx, threads=1, backend=request.param) as opened:
        yield opened


def make_gray(value: int, hw: tuple[int, int]) -> np.ndarray:
    return np.full((*hw, 3), value, np.uint8)


def test_external_detections_are_in_image_pixels(detector: Detector) -> None:
    """The image is twice as high and half as wide as the input."""
    detections, times = detector.predict_timed(make_gray(102, (128, 48)))
    assert detections.boxes_xyxy.tolist() == [[4, 32, 12, 96]] * 2
    assert detections.scores.tolist() == pytest.approx([0.4, 0.2], rel=1e-4)
    assert min(times.preprocess_ms, times.inference_ms, times.postprocess_ms) > 0


def test_external_list_equals_single_images(detector: Detector) -> None:
    images = [make_gray(value, hw) for value, hw in ((51, HW), (255, (128, 96)), (0, HW))]
    results = detector(images)
    assert [len(detections) for detections in results] == [2, 2, 0]
    for image, expected in zip(images, results, strict=True):
        np.testing.assert_array_equal(detector(image).boxes_xyxy, expected.boxes_xyxy)
        np.testing.assert_array_equal(detector(image).scores, expected.scores)
    with pytest.raises(ValueError, match="float32"):
        detector(make_gray(1, HW).astype(np.float32))  # type: ignore[call-overload]


def test_external_detector_takes_files_and_closes(detector: Detector, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "gray.png"), make_gray(102, HW))
    assert detector(tmp_path / "gray.png").scores.tolist() == pytest.approx([0.4, 0.2], rel=1e-4)
    assert detector([tmp_path / "gray.png"], conf=0.3)[0].scores.tolist() == pytest.approx([0.4], rel=1e-4)
    assert detector.default_conf == 0.3
    detector.close()
    for images in (make_gray(1, HW), [make_gray(1, HW)]):
        with pytest.raises(ValueError, match=r"mean\.onnx: the model is closed"):
            detector(images)


def test_external_metadata_comes_from_config_and_file(detector: Detector) -> None:
    metadata = detector.metadata
    assert (metadata.model, metadata.license, metadata.imgsz_hw, metadata.batch) == ("Mean", "MIT", HW, 1)
    assert (metadata.parameters, metadata.flops) == (24, None)
    assert detector.device == "cpu"


def test_flag_names_another_config(mean_onnx: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**CONFIG, "person_class_id": 3}))
    with open_detector(mean_onnx, model_config=other) as detector:
        assert len(detector(make_gray(255, HW))) == 0


@pytest.mark.parametrize("changes", [{}, {"args": "{'nms': None}", "end2end": "True"}])
def test_ultralytics_metadata_needs_no_config(tmp_path: Path, changes: dict[str, str]) -> None:
    path = write_mean_model(tmp_path / "yolo.onnx", {**ULTRALYTICS, **changes}, class_id=1.0)
    with open_detector(path) as detector:
        assert detector(make_gray(255, HW)).scores.tolist() == pytest.approx([1.0, 0.5])
        assert detector.metadata.license.startswith("AGPL-3.0") and "YOLO11n" in detector.metadata.model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": "{0: 'car', 1: 'bus'}"}, "expected a class person or pedestrian, got car, bus"),
        ({"names": str([str(number) for number in range(80)])}, "got 0, 1, 2, 3, 4 and 75 more"),
        ({"task": "segment"}, "expected the task detect, got segment"),
        ({"names": "not a dict"}, "does not describe a person detector"),
        ({"args": "{}"}, "the outputs are not in the format yolo-raw"),
    ],
)
def test_other_ultralytics_metadata_raises(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    path = write_mean_model(tmp_path / "yolo.onnx", {**ULTRALYTICS, **changes})
    with pytest.raises(DataError, match=message), open_detector(path) as detector:
        detector(make_gray(255, HW))


def test_model_without_config_raises(tmp_path: Path) -> None:
    path = write_mean_model(tmp_path / "mean.onnx")
    with (
        pytest.raises(DataError, match=r"those of yolo26\. Pass --model-config NAME or FILE .* or write mean\.yaml"),
        open_detector(path),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt"}, "not a model of hkd-export. Set --backend to one of onnxruntime, openvino"),
        ({"backend": "tflite"}, "--backend: expected one of onnxruntime"),
        ({"backend": "openvino", "device": "cuda"}, "the openvino backend supports cpu only"),
        ({"performance_hint": "throughput"}, "performance hint latency"),
    ],
)
def test_unsupported_options_raise(mean_onnx: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message), open_detector(mean_onnx, **options):
        pass


def test_config_of_another_file_type_raises(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    message = r"--model-config .*: requires an \.onnx file"
    with pytest.raises(UsageError, match=message), open_detector(tmp_path / "folder", model_config=tmp_path / "x.yaml"):
        pass


def test_is_external_model_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "damaged.onnx").write_text("no model\n")
    assert not is_external_model(tmp_path / "damaged.onnx") and not is_external_model(tmp_path / "missing.onnx")
    assert is_external_model(write_mean_model(tmp_path / "other.onnx"))
    assert not is_external_model(write_mean_model(tmp_path / "own.onnx", {"hkd.format": "1"}))
