"""Epoch records: values for trackers, early stopping, and the warning at the end."""

import csv
import math
from pathlib import Path

import pytest

from hkd_det.train.history import EpochRecord, find_best_record, find_warning, is_patience_exhausted, write_history


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
        ((0.5, 0.4), 0.3, 0.5, "worse than before training (MR^-2 30.00 % before, 40.00 % after)"),
        ((1.0, 1.0), None, 0.5, "finds no person"),
        ((0.99, 0.99), None, 0.0, "finds no person"),
        ((0.3, 0.2, 0.6), None, 0.5, "the last epoch is worse than the first"),
    ],
)
def test_warning_names_a_bad_end(
    miss_rates: tuple[float, ...], initial: float | None, recall: float, text: str
) -> None:
    warning = find_warning(make_history(*miss_rates, recall=recall), initial)
    assert bool(warning) == bool(text) and text in warning


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
