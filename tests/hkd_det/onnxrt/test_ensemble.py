"""Ensembles: weighted boxes fusion on hand-computed cases and on real images, and the errors of the file."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.datasets import read_image
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, HkdError, UsageError
from hkd_det.metrics.citypersons import SETUPS, evaluate_detections
from hkd_det.models.zoo import OnnxTeacher, is_onnx_teacher, load_teacher
from hkd_det.onnxrt.detector import open_onnx_ensemble
from hkd_det.structures import Detections, fuse_detections

TEST_DATA = Path(os.environ.get("HKD_TEST_DATA", ""))
RECIPES = Path(__file__).parents[3] / "recipes" / "onnx"
MODELS = ("yolox_nano", "picodet_s_416", "nanodet_plus_m_416")
needs_models = pytest.mark.skipif(not (TEST_DATA / "models").is_dir(), reason="HKD_TEST_DATA has no models")


def detect(*rows: Sequence[float]) -> Detections:
    """Return detections of rows x1, y1, x2, y2, score."""
    array = np.array(rows, np.float32).reshape(-1, 5)
    return Detections(array[:, :4], array[:, 4])


def test_fusion_averages_boxes_by_score_and_scores_over_models() -> None:
    models = [detect([0, 0, 10, 20, 0.9]), detect([2, 0, 12, 20, 0.3]), detect([50, 0, 60, 20, 0.6])]
    fused, num_models = fuse_detections(models)
    np.testing.assert_allclose(fused.boxes_xyxy, [[0.5, 0.0, 10.5, 20.0], [50.0, 0.0, 60.0, 20.0]], atol=1e-6)
    np.testing.assert_allclose(fused.scores, [1.2 / 3, 0.6 / 3], atol=1e-6)
    assert num_models.tolist() == [2, 1]


def test_fusion_counts_each_model_once() -> None:
    fused, num_models = fuse_detections([detect([0, 0, 10, 20, 0.8], [1, 0, 11, 20, 0.7]), detect()])  # IoU 9 / 11
    assert fused.boxes_xyxy.tolist() == [[0, 0, 10, 20]] and num_models.tolist() == [1]
    assert fused.scores == pytest.approx([0.4])


def test_a_box_joins_the_cluster_that_it_overlaps_most() -> None:
    models = [detect([0, 0, 10, 20, 0.9], [4, 0, 14, 20, 0.8]), detect([3, 0, 13, 20, 0.5])]
    fused, num_models = fuse_detections(models, 0.5)
    assert num_models.tolist() == [2, 1]
    np.testing.assert_allclose(fused.boxes_xyxy[0], [4 - 0.5 / 1.3, 0, 14 - 0.5 / 1.3, 20], rtol=1e-5)


def test_fusion_of_nothing_is_empty() -> None:
    for models in ([detect()], [detect(), detect()]):
        fused, num_models = fuse_detections(models)
        assert fused.boxes_xyxy.shape == (0, 4) and len(fused.scores) == len(num_models) == 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.0625, 1, width=32), max_size=8), st.integers(1, 3))
def test_fusion_of_equal_models_returns_their_boxes(scores: list[float], num_models: int) -> None:
    rows = sorted(
        ([20.0 * index, 0, 20.0 * index + 10, 30, score] for index, score in enumerate(scores)), key=lambda row: -row[4]
    )
    fused, found_by = fuse_detections([detect(*rows)] * num_models)
    np.testing.assert_allclose(fused.boxes_xyxy, detect(*rows).boxes_xyxy, rtol=1e-6)
    np.testing.assert_allclose(fused.scores, detect(*rows).scores, rtol=1e-6)
    assert set(found_by.tolist()) <= {num_models}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"models": []}, UsageError, "at least one"),
        ({"models": [{"file": "x.onnx"}]}, UsageError, "no such setting"),
        ({"models": [{"model": "x.onnx"}], "iou": 2}, UsageError, "iou: expected 0 to 1, got 2"),
        ({"models": [{"model": "x.onnx"}]}, HkdError, "x.onnx"),
        ([1], UsageError, "expected a mapping"),
    ],
)
def test_broken_ensemble_file_is_reported(tmp_path: Path, content: object, error: type[HkdError], message: str) -> None:
    path = tmp_path / "ensemble.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(error, match=message):
        open_onnx_ensemble(path)
    with pytest.raises(DataError, match="missing"):
        open_onnx_ensemble(tmp_path / "missing.yaml")


@needs_models
@pytest.mark.slow
def test_miss_rate_of_three_fused_detectors(tmp_path: Path) -> None:
    """The fusion of these three detectors was measured independently: 8.5 / 3.8 %."""
    for name in MODELS:
        (tmp_path / f"{name}.onnx").symlink_to(TEST_DATA / "models" / f"{name}.onnx")
    for path in RECIPES.glob("*.yaml"):
        (tmp_path / path.name).symlink_to(path)
    ensemble = open_onnx_ensemble(tmp_path / "ensemble.yaml", threads=1)
    inria = TEST_DATA / "inria"
    detections = None
    for name, expected in (("test", 8.5), ("test_audited", 3.8)):
        (tmp_path / "data.yaml").write_text(
            f"format: coco\nval: {{images: {inria}, annotations: {inria / name}.json}}\n"
        )
        samples = load_dataset(str(tmp_path / "data.yaml"), "val")
        detections = detections or [ensemble([read_image(sample.path)])[0] for sample in samples]
        miss_rate = evaluate_detections(samples, detections, [SETUPS["All"]])["All"].value
        assert 100 * miss_rate == pytest.approx(expected, abs=0.7)


@needs_models
def test_an_ensemble_can_be_teacher(tmp_path: Path) -> None:
    for name in ("yolox_nano.onnx", "nanodet_plus_m_416.onnx"):
        (tmp_path / name).symlink_to(TEST_DATA / "models" / name)
    for name in ("yolox", "nanodet-plus"):
        (tmp_path / f"{name}.yaml").symlink_to(RECIPES / f"{name}.yaml")
    path = tmp_path / "two.yaml"
    members = [("yolox_nano.onnx", "yolox.yaml"), ("nanodet_plus_m_416.onnx", "nanodet-plus.yaml")]
    path.write_text(yaml.safe_dump({"models": [{"model": m, "model_config": c} for m, c in members]}))
    teacher = load_teacher(path, torch.device("cpu"))
    assert isinstance(teacher, OnnxTeacher) and is_onnx_teacher(path)
    image = read_image(next((TEST_DATA / "inria" / "test").iterdir()))
    batch = teacher(torch.from_numpy(image).permute(2, 0, 1)[None])
    expected = open_onnx_ensemble(path, threads=1)([image])[0]
    np.testing.assert_allclose(batch.boxes_xyxy[0].numpy(), expected.boxes_xyxy, atol=1e-2)
    assert len(expected.scores) > 0
