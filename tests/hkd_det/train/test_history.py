"""Epoch records: values for trackers, early stopping, and the warning at the end."""

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.matching import MissRateResult
from hkd_det.structures import Detections, GroundTruth, Sample
from hkd_det.train.history import (
    EpochRecord,
    RunResults,
    find_best_record,
    find_warning,
    format_interval_and_gain,
    is_patience_exhausted,
    write_history,
)


def make_history(*miss_rates: float, recall: float = 0.5) -> list[EpochRecord]:
    return [EpochRecord(epoch, {"cls": 1.0}, rate, 10.0, recall=recall) for epoch, rate in enumerate(miss_rates, 1)]


@pytest.mark.parametrize(
    ("miss_rates", "patience", "is_exhausted"),
    [
        ((), 1, False),
        ((0.5, 0.4, 0.4), 1, True),
        ((0.5, 0.4, 0.4), 2, False),
        ((0.5, 0.4, 0.45, 0.42), 2, True),
        ((0.5, 0.4, 0.45, 0.39), 2, False),
        ((1.0, 1.0, 1.0, 1.0), 2, False),  # before the first detected person
        ((1.0, 1.0, 0.9, 1.0), 2, False),
        ((0.5, 0.6, 0.7), 0, False),
    ],
)
def test_patience_counts_epochs_since_the_best(
    miss_rates: tuple[float, ...], patience: int, is_exhausted: bool
) -> None:
    assert is_patience_exhausted(make_history(*miss_rates), patience) == is_exhausted


def test_patience_ignores_epochs_before_the_target() -> None:
    history = [EpochRecord(epoch, {}, 0.1 * epoch, 1.0, meets_target=False) for epoch in (1, 2, 3, 4)]
    assert not is_patience_exhausted(history, 2)
    final = [EpochRecord(epoch, {}, 0.5, 1.0) for epoch in (5, 6, 7)]
    assert [is_patience_exhausted(history + final[:count], 2) for count in (1, 2, 3)] == [False, False, True]


def test_best_record_is_the_latest_of_equal_ones() -> None:
    assert find_best_record(make_history(0.5, 0.3, 0.3, 0.4)).epoch == 3


@pytest.mark.parametrize(
    ("miss_rates", "initial", "recall", "text"),
    [
        ((0.5, 0.4), None, 0.5, ""),
        ((0.5, 0.4), 0.4, 0.5, ""),
        ((0.5, 0.4), 0.3, 0.5, "worse than before training (MR^-2 30.00 % before, 40.00 % after; "),
        ((1.0, 1.0), None, 0.5, "finds no person"),
        ((0.99, 0.99), None, 0.0, "finds no person"),
        ((0.3, 0.2, 0.6), None, 0.5, "the last epoch is worse than the first"),
    ],
)
def test_warning_names_a_bad_end(
    miss_rates: tuple[float, ...], initial: float | None, recall: float, text: str
) -> None:
    results = RunResults(initial=None if initial is None else replace(make_result(0.5), value=initial))
    warning = find_warning(make_history(*miss_rates, recall=recall), results)
    assert bool(warning) == bool(text) and text in warning


def make_result(detected_ratio: float, num_images: int = 60) -> MissRateResult:
    """Return the result of images with one person each, the first of which are detected, without false positives."""
    box = np.array([[10, 0, 40, 80]], np.float32)
    person = GroundTruth(box, np.zeros(1, bool), box, ("person",))
    num_detected = round(detected_ratio * num_images)
    detections = [
        Detections(box, np.ones(1)) if index < num_detected else Detections.empty() for index in range(num_images)
    ]
    samples = [Sample(index, Path(), person) for index in range(num_images)]
    return evaluate_detections(samples, detections, [REASONABLE])[REASONABLE.name]


@pytest.mark.parametrize(
    ("num_images", "conclusion"), [(60, "): worse"), (20, "): no conclusion: fewer than 50 images or 50 persons")]
)
def test_warnings_have_interval_and_conclusion(num_images: int, conclusion: str) -> None:
    """90 % of the persons are detected before, 40 % after: 50 points, and about 13 to each side for 60 images."""
    good, bad = make_result(0.9, num_images), make_result(0.4, num_images)
    before = find_warning(make_history(0.6), RunResults(initial=good, first=bad, best=bad, last=bad))
    assert "worse than before training (MR^-2 10.00 % before, 60.00 % after; +50.00 points (95 %" in before
    later = find_warning(make_history(0.1, 0.6), RunResults(first=good, best=good, last=bad))
    assert "worse than the first (MR^-2 10.00 % first, 60.00 % last; +50.00 points (95 %" in later
    assert conclusion in before and conclusion in later
    low, high = (float(text) for text in re.findall(r"images: \+([\d.]+) to \+([\d.]+)", before)[0])
    assert low < 50 < high and (num_images < 60 or (30 < low < 42 and 58 < high < 70))


def test_last_lines_have_interval_and_gain() -> None:
    good, bad = make_result(0.9), make_result(0.4)
    text = format_interval_and_gain(RunResults(initial=bad, best=good))
    assert re.fullmatch(
        r"95 % interval [\d.]+ to [\d.]+ %; compared with the initial weights: -50\.00 points \(.*\): better", text
    )
    assert "compared" not in format_interval_and_gain(RunResults(best=good))
    assert format_interval_and_gain(RunResults()) == ""
    assert "Not reliable: fewer than 50 images" in format_interval_and_gain(RunResults(best=make_result(0.9, 20)))


def test_results_survive_a_checkpoint() -> None:
    results = RunResults()
    for ratio, is_best in ((0.4, True), (0.9, True), (0.6, False)):
        results.add(make_result(ratio), is_best)
    restored = RunResults.from_dict(results.as_dict())
    assert restored.initial is None and restored.first and restored.best and restored.last
    assert [restored.first.value, restored.best.value, restored.last.value] == pytest.approx([0.6, 0.1, 0.4])
    assert format_interval_and_gain(restored) == format_interval_and_gain(results)


def test_history_file_has_rate_time_and_accuracy(tmp_path: Path) -> None:
    first = EpochRecord(1, {"cls": 2.0}, 0.5, 8.0, {}, True, 0.2, 0.4, 0.6, 0.3, 1e-3, 12.0)
    second = EpochRecord(2, {"cls": 1.0, "hkd": 3.0}, 0.25, 8.0, {"weight": 0.5})
    write_history(tmp_path / "results.csv", [first, second])
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert rows[0]["lr"] == "0.001" and rows[0]["time_s"] == "12.0" and rows[0]["ap50"] == "0.4"
    assert rows[0]["hkd"] == "" and rows[1]["hkd"] == "3.0" and rows[1]["ap"] == "" and rows[1]["weight"] == "0.5"


def test_scalars_leave_out_unmeasured_values() -> None:
    scalars = make_history(0.5)[0].as_scalars()
    assert scalars == {"cls": 1.0, "miss_rate": 0.5, "recall": 0.5, "images_per_s": 10.0}
    assert not any(math.isnan(value) for value in scalars.values())


def test_log_line_has_accuracy_and_time_left() -> None:
    record = EpochRecord(3, {"cls": 1.0}, 0.5, 8.0, ap=0.21, ap50=0.42, recall=0.6, threshold=0.3)
    line = record.log_line(10, "Reasonable", 3725)
    assert "epoch 3/10" in line and "AP50 42.0 %" in line and "AP 21.0 %" in line and line.endswith("1:02:05 left")
