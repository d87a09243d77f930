"""Figures of a run, and the values that TensorBoard receives."""

import sys
import types
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import UnavailableError
from hkd_det.metrics.citypersons import REASONABLE
from hkd_det.structures import Detections, Sample
from hkd_det.train.history import (
    DETECTED_COLOR,
    FALSE_POSITIVE_COLOR,
    MISSED_COLOR,
    EpochRecord,
    draw_val_errors,
    open_tensorboard,
    plot_history,
)


@pytest.fixture
def samples(data_yaml: Path) -> list[Sample]:
    return load_dataset(str(data_yaml), "val")


def make_detections(samples: list[Sample]) -> list[Detections]:
    """Return the annotated boxes as detections with score 0.9."""
    boxes = [sample.ground_truth.boxes_xyxy for sample in samples]
    return [Detections(item, np.full(len(item), 0.9, np.float32)) for item in boxes]


def count_pixels(path: Path, color_rgb: tuple[int, int, int]) -> int:
    """Count pixels that have a color, up to the losses of JPEG."""
    image = cv2.imread(str(path))[..., ::-1].astype(int)
    return int((np.abs(image - color_rgb).max(-1) < 40).sum())


def test_missed_persons_and_false_positives_are_drawn(samples: list[Sample], tmp_path: Path) -> None:
    path, detections = tmp_path / "val_errors.jpg", make_detections(samples)
    draw_val_errors(path, samples, detections, 0.5, REASONABLE)
    assert not path.exists()  # no errors
    empty = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    draw_val_errors(path, samples, [empty, *detections[1:]], 0.5, REASONABLE)
    assert count_pixels(path, MISSED_COLOR) > 200 and count_pixels(path, FALSE_POSITIVE_COLOR) == 0
    assert cv2.imread(str(path)).shape[1] == 3 * 480  # only the image with an error, in a full row
    wrong = Detections(np.array([[0, 0, 24, 60]], np.float32), np.array([0.8], np.float32))
    samples = [replace(samples[0], ground_truth=replace(samples[0].ground_truth, ignore=np.ones(
        len(samples[0].ground_truth), bool), boxes_xyxy=samples[0].ground_truth.boxes_xyxy + 500))]  # fmt: skip
    draw_val_errors(path, samples, [wrong], 0.5, REASONABLE)
    assert count_pixels(path, FALSE_POSITIVE_COLOR) > 200 and count_pixels(path, MISSED_COLOR) == 0
    draw_val_errors(path, samples, [wrong], 0.85, REASONABLE)  # below the threshold: no error
    assert not path.exists()


def test_detected_persons_are_green(samples: list[Sample], tmp_path: Path) -> None:
    detections = make_detections(samples)
    index = next(index for index, sample in enumerate(samples) if len(sample.ground_truth) == 2)
    detections[index] = Detections(detections[index].boxes_xyxy[:1], detections[index].scores[:1])
    draw_val_errors(tmp_path / "val_errors.jpg", samples, detections, 0.5, REASONABLE)
    assert count_pixels(tmp_path / "val_errors.jpg", DETECTED_COLOR) > 100


@pytest.mark.slow
def test_curves_are_written_with_missing_values(tmp_path: Path) -> None:
    history = [EpochRecord(1, {"cls": 1.0}, 0.9, 5.0), EpochRecord(2, {"cls": 0.5, "hkd": 2.0}, 0.8, 5.0, lr=1e-3)]
    plot_history(tmp_path / "results.png", history, "Reasonable")
    assert cv2.imread(str(tmp_path / "results.png")).shape[1] > 800


def test_tensorboard_receives_all_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int | None) -> None:
            calls.append((directory, purge_step))

        def add_scalar(self, *values: object) -> None:
            calls.append(values)

        def flush(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    open_tensorboard(tmp_path, 2)(EpochRecord(3, {"cls": 1.0}, 0.5, 8.0, {"weight": 0.25}))
    assert calls[0] == (str(tmp_path), 3)
    assert ("loss/cls", 1.0, 3) in calls and ("run/miss_rate", 0.5, 3) in calls and ("metrics/weight", 0.25, 3) in calls


def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    open_tensorboard(tmp_path, 0)(EpochRecord(1, {"cls": 1.0}, 0.5, 8.0))
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UnavailableError, match=r"tensorboard: not installed. Run pip install 'hkd-det\[tensorboard\]'"):
        open_tensorboard(tmp_path, 0)
