"""Precision report: speedup, differences and recommendation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hkd_deploy.precision.report import (
    Accuracy,
    LatencyComparison,
    PrecisionReport,
    compute_recall,
    compute_speedup_interval,
)
from hkd_det.metrics.citypersons import REASONABLE, evaluate, evaluate_detections
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.structures import Detections, GroundTruth, Sample

LATENCIES = (LatencyComparison("onnxruntime", 10, 16), LatencyComparison("openvino", 8, 4))
BOX = np.array([[10, 0, 40, 80]], np.float32)


def make_accuracy(num_detected: int, num_images: int = 200) -> Accuracy:
    """Return the accuracy on images with one person each, the first of which are detected, without false positives."""
    person = GroundTruth(BOX, np.zeros(1, bool), BOX, ("person",))
    samples = [Sample(index, Path(), person) for index in range(num_images)]
    detections = [Detections(BOX, np.ones(1))] * num_detected + [Detections.empty()] * (num_images - num_detected)
    result = evaluate_detections(samples, detections, [REASONABLE])[REASONABLE.name]
    return Accuracy(result, compute_recall(result, 0.3), ap=0.5, ap50=0.75)


def make_report(
    num_before: int = 160,
    num_after: int = 160,
    latencies: tuple[LatencyComparison, ...] = LATENCIES,
    speedup_interval: tuple[float, float] = (1.9, 2.1),
    num_images: int = 200,
) -> PrecisionReport:
    before, after = make_accuracy(num_before, num_images), make_accuracy(num_after, num_images)
    return PrecisionReport("int8", before, after, "openvino", latencies, speedup_interval, 0.3, 0.5)


def test_precision_report_compares_fastest_runtimes() -> None:
    report = make_report()
    assert report.speedup == 2.0 and report.fastest.backend == "openvino"
    assert report.reasons == [] and report.to_metadata()["recommended"] is True
    assert report.format_log_line() == (
        "int8 compared with fp32 on this device, with 95 % intervals: end-to-end speedup 2.00x (1.90 to 2.10; "
        "onnxruntime 0.62x, openvino 2.00x); on openvino, 200 images, 200 persons: miss rate +0.00 points "
        "(+0.00 to +0.00), now 20.00 %; recall at 0.3 +0.00 points (+0.00 to +0.00), now 80.00 %; "
        "AP50 75.0 -> 75.0 %, AP 50.0 -> 50.0 %; recommended"
    )


def test_precision_report_has_intervals_of_the_binomial_distribution() -> None:
    """16 of 200 persons are lost: 8 points, with a standard deviation of sqrt(0.08 * 0.92 / 200), 1.92 points."""
    report = make_report(num_after=144)
    assert report.mr_increase == pytest.approx(8) and report.recall_increase == pytest.approx(-8)
    assert report.mr_interval == pytest.approx((8 - 1.96 * 1.92, 8 + 1.96 * 1.92), abs=0.6)
    assert report.recall_interval == pytest.approx((-report.mr_interval[1], -report.mr_interval[0]), abs=0.6)
    assert json.loads(json.dumps(report.to_metadata()))["mr_interval"] == list(report.mr_interval)


def test_speedup_interval_contains_the_true_ratio() -> None:
    rng = np.random.default_rng(0)
    fast = np.stack([rng.normal(10, 0.5, 400), rng.normal(5, 0.5, 400)], 1)
    low, high = compute_speedup_interval([fast, 3 * fast])
    assert 1.9 < low < 2 < high < 2.1
    assert compute_speedup_interval([np.tile([[6.0, 4.0]], (40, 1))]) == (1.5, 1.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"num_before": 0, "num_after": 0},
            "the fp32 file detects no person at a score of 0.3, so nothing is compared",
        ),
        ({"num_images": 49, "num_before": 40, "num_after": 40}, "fewer than 50 images or 50 persons"),
        ({"num_after": 159}, "the interval of the miss rate contains the limit of 0.5"),
        ({"speedup_interval": (1.0, 1.3)}, "the interval of the speedup contains the limit of 1.1"),
    ],
)
def test_precision_report_without_evidence_has_no_recommendation(changes: dict[str, Any], reason: str) -> None:
    report = make_report(**changes)
    assert report.conclusion == "no recommendation" and report.to_metadata()["recommended"] is False
    assert f"; no recommendation: {reason}" in report.format_log_line()


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        (
            {"num_after": 140},
            ["the miss rate increases by more than 0.5 points", "the recall drops by more than 1 points"],
        ),
        (
            {"latencies": (LatencyComparison("onnxruntime", 10, 9.8),), "speedup_interval": (1.01, 1.03)},
            ["the speedup is below 1.1"],
        ),
        (
            {"latencies": (LatencyComparison("onnxruntime", 10, 12),), "speedup_interval": (0.8, 0.9)},
            ["it is slower than fp32"],
        ),
    ],
)
def test_precision_report_lists_reasons_against(changes: dict[str, Any], reasons: list[str]) -> None:
    report = make_report(**changes)
    assert report.reasons == reasons and report.to_metadata()["recommended"] is False
    assert report.format_log_line().endswith(f"; not recommended: {' and '.join(reasons)}")


def test_compute_recall_counts_matches_above_threshold() -> None:
    """Two of three persons are detected, with scores 0.9 and 0.4; two detections are false positives."""
    gt_boxes = np.array([[10, 0, 40, 60], [110, 0, 140, 60], [210, 0, 240, 60]], np.float32)
    ground_truth = GroundTruth(gt_boxes, np.zeros(3, bool), gt_boxes, ("person",) * 3)
    boxes = np.array([gt_boxes[0], [300, 0, 330, 60], gt_boxes[1], [400, 0, 430, 60]], np.float32)
    detections = Detections(boxes, np.array([0.9, 0.8, 0.4, 0.35], np.float32))
    tables = GroundTruthTable.from_samples([ground_truth]), DetectionTable.from_detections([detections])
    result = evaluate(*tables, [REASONABLE])[REASONABLE.name]
    recalls = [compute_recall(result, conf) for conf in (0.95, 0.9 - 1e-6, 0.5, 0.3)]
    assert recalls == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3])
