"""Recipes of public detectors against the decoders of the test data, an independent implementation."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hkd_det.datasets.coco import read_coco
from hkd_det.image import read_image
from hkd_det.onnxrt.detector import open_onnx_detector
from hkd_det.structures import Detections

TEST_DATA = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
RECIPES = Path(__file__).parents[3] / "recipes" / "onnx"
MIN_SCORE, SCORE_TOLERANCE, BOX_TOLERANCE_PX = 0.05, 1e-3, 0.05
# 600x800 and 480x640: their size in the letterbox is a whole number. Other sizes are rounded here and truncated there.
IMAGES = (3, 79, 83)

pytestmark = pytest.mark.skipif(not (TEST_DATA / "models").is_dir(), reason="HKD_TEST_DATA is not set")


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_detectors", TEST_DATA / "models" / "detectors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_unmatched(detections: Detections, others: Detections) -> list[tuple[float, ...]]:
    """List the detections from `MIN_SCORE` without an equal one in `others`."""
    unmatched = []
    for box, score in zip(*(values.tolist() for values in (detections.boxes_xyxy, detections.scores)), strict=True):
        distance = np.abs(others.boxes_xyxy - np.array(box, np.float32)).max(axis=1)
        is_equal = (distance <= BOX_TOLERANCE_PX) & (np.abs(others.scores - score) <= SCORE_TOLERANCE)
        if score >= MIN_SCORE and not is_equal.any():
            unmatched.append((*box, score))
    return unmatched


@pytest.mark.parametrize(
    ("file", "recipe", "interpolation"),
    [
        ("yolox_nano", "yolox", "linear"),
        ("picodet_s_416", "picodet", "linear"),
        ("nanodet_plus_m_416", "nanodet-plus", "area"),
        ("fastestdet", "fastestdet", "area"),
    ],
)
def test_boxes_before_nms_equal_the_reference(
    reference: ModuleType, file: str, recipe: str, interpolation: str
) -> None:
    """The recipe differs from the reference only in the interpolation of two models, which is that of their authors."""
    detector = open_onnx_detector(
        TEST_DATA / "models" / f"{file}.onnx", config_path=RECIPES / f"{recipe}.yaml", threads=1
    )
    assert detector.config.license and detector.config.interpolation == "linear"
    detector.config = replace(detector.config, interpolation=interpolation, iou=1.0)  # type: ignore[arg-type] # str
    expected_detector = reference.make(file)
    samples = read_coco(TEST_DATA / "inria" / "test.json", TEST_DATA / "inria")
    num_expected = 0
    for index in IMAGES:
        image = read_image(samples[index].path)
        boxes_xywh, scores = expected_detector.raw(np.ascontiguousarray(image[..., ::-1]))
        expected = Detections(np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], 1), scores)
        detections = detector([image])[0]
        assert not find_unmatched(detections, expected) and not find_unmatched(expected, detections)
        num_expected += len(expected.filter(MIN_SCORE))
    assert num_expected >= 20


def write_random_model(path: Path, shapes: list[tuple[int, ...]], input_hw: tuple[int, int]) -> Path:
    """Write a model of constant outputs, uniform from 0 to 1; the scores are below the threshold at most points."""
    rng = np.random.default_rng(0)
    arrays = [rng.random(shape).astype(np.float32) ** (4 if shape[-1] == 80 else 1) for shape in shapes]
    names = [f"output{index}" for index in range(len(shapes))]
    nodes = [helper.make_node("Identity", [f"{name}_value"], [name]) for name in names]
    constants = [numpy_helper.from_array(array, f"{name}_value") for name, array in zip(names, arrays, strict=True)]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, *input_hw])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in zip(names, shapes, strict=True)
    ]
    graph = helper.make_graph(nodes, "constants", [images], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("size", [320, 416])
@pytest.mark.slow
def test_nanodet_and_yolo_fastestv2_equal_the_reference(reference: ModuleType, tmp_path: Path, size: int) -> None:
    """Files of these detectors are not in the test data, so the outputs are random."""
    points = [(size // stride) ** 2 for stride in (8, 16, 32)]
    nanodet = write_random_model(
        tmp_path / "nanodet.onnx", [(1, n, 80) for n in points] + [(1, n, 32) for n in points], (size, size)
    )
    fastest = write_random_model(tmp_path / "fastest.onnx", [(1, points[1] + points[2], 95)], (size, size))
    image = np.zeros((480, 640, 3), np.uint8)
    for path, recipe, expected_detector in (
        (nanodet, "nanodet", reference.Gfl(str(nanodet), strides=(8, 16, 32), half=True)),
        (fastest, "yolo-fastestv2", reference.YoloFastestV2(str(fastest))),
    ):
        detector = open_onnx_detector(path, config_path=Path(recipe), threads=1)
        detector.config = replace(detector.config, nms=False)
        boxes_xywh, scores = expected_detector.raw(image)
        expected = Detections(np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], 1), scores)
        detections = detector([image])[0]
        assert len(expected.filter(MIN_SCORE)) >= 500
        assert not find_unmatched(detections, expected) and not find_unmatched(expected, detections)
