"""Precision report: speedup, differences and recommendation."""

import numpy as np
import pytest

from hkd_deploy.precision.report import Accuracy, LatencyComparison, PrecisionReport, compute_recall
from hkd_det.metrics.citypersons import REASONABLE, evaluate
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.structures import Detections, GroundTruth

BEFORE, AFTER = Accuracy(0.2, 0.8), Accuracy(0.204, 0.795)
LATENCIES = (LatencyComparison("onnxruntime", 10, 16), LatencyComparison("openvino", 8, 4))


def make_report(latencies: tuple[LatencyComparison, ...] = LATENCIES, after: Accuracy = AFTER) -> PrecisionReport:
    return PrecisionReport("int8", BEFORE, after, "openvino", latencies, 0.3, 0.5)


def test_precision_report_compares_fastest_runtimes() -> None:
    report = make_report()
    assert report.speedup == 2.0 and report.fastest.backend == "openvino"
    assert report.mr_increase == pytest.approx(0.4) and report.recall_increase == pytest.approx(-0.5)
    assert report.reasons == []
    assert report.format_log_line() == (
        "int8 compared with fp32 on this device: end-to-end speedup 2.00x (onnxruntime 0.62x, openvino 2.00x); "
        "on openvino miss rate +0.40 points (20.40 %), recall at 0.3 -0.50 points (79.50 %); recommended"
    )


def test_precision_report_without_detections_recommends_nothing() -> None:
    blind = PrecisionReport("int8", Accuracy(1.0, 0.0), Accuracy(1.0, 0.0), "openvino", LATENCIES, 0.3, 0.5)
    assert blind.to_metadata()["recommended"] is False
    expected = "; not recommended: the fp32 file detects no person at a score of 0.3, so nothing is compared"
    assert blind.format_log_line().endswith(expected)


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"after": Accuracy(0.206, 0.8)}, ["the miss rate increases by more than 0.5 points"]),
        ({"after": Accuracy(0.2, 0.78)}, ["the recall drops by more than 1 points"]),
        ({"latencies": (LatencyComparison("onnxruntime", 10, 10.1),)}, ["the speedup is below 1.1"]),
        ({"latencies": (LatencyComparison("onnxruntime", 10, 12),)}, ["it is slower than fp32"]),
        (
            {
                "after": Accuracy(0.3, 0.8),
                "latencies": (LatencyComparison("onnxruntime", 8, 12), LatencyComparison("openvino", 10, 10)),
            },
            ["the miss rate increases by more than 0.5 points", "it is slower than fp32"],
        ),
    ],
)
def test_precision_report_lists_reasons_against(changes: dict[str, object], reasons: list[str]) -> None:
    report = make_report(**changes)  # type: ignore[arg-type]
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
