"""The verdict's arithmetic."""

import numpy as np
import pytest

from hkd_deploy.precision.report import Accuracy, LatencyComparison, PrecisionReport, compute_recall
from hkd_det.metrics.citypersons import REASONABLE, evaluate
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.structures import Detections, GroundTruth

BEFORE, AFTER = Accuracy(0.2, 0.8), Accuracy(0.204, 0.795)
RACES = (LatencyComparison("onnxruntime", 10, 16), LatencyComparison("openvino", 8, 4))


def verdict(races: tuple[LatencyComparison, ...] = RACES, after: Accuracy = AFTER) -> PrecisionReport:
    return PrecisionReport("int8", BEFORE, after, "openvino", races, 0.3, 0.5)


def test_speed_is_the_fastest_runtime_of_each_file_against_that_of_the_other() -> None:
    found = verdict()
    assert found.speedup == 2.0 and found.fastest.backend == "openvino"
    assert found.mr_increase == pytest.approx(0.4) and found.recall_increase == pytest.approx(-0.5)
    assert found.reasons == []
    assert found.log_line() == (
        "int8 against fp32 on this device: 2.00x as fast end to end (onnxruntime 0.62x, openvino 2.00x); on openvino "
        "miss rate +0.40 points (20.40 %), recall at 0.3 -0.50 points (79.50 %): worth it"
    )


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"after": Accuracy(0.206, 0.8)}, ["the miss rate rises by more than 0.5 points"]),
        ({"after": Accuracy(0.2, 0.78)}, ["recall falls by more than 1 points"]),
        ({"races": (LatencyComparison("onnxruntime", 10, 10.1),)}, ["it is hardly faster"]),
        ({"races": (LatencyComparison("onnxruntime", 10, 12),)}, ["it is slower"]),
        (
            {
                "after": Accuracy(0.3, 0.8),
                "races": (LatencyComparison("onnxruntime", 8, 12), LatencyComparison("openvino", 10, 10)),
            },
            ["the miss rate rises by more than 0.5 points", "it is slower"],
        ),
    ],
)
def test_what_is_not_worth_it_says_why(changes: dict[str, object], reasons: list[str]) -> None:
    found = verdict(**changes)  # type: ignore[arg-type]
    assert found.reasons == reasons and found.to_metadata()["worth_it"] is False
    assert found.log_line().endswith(f": not worth it: {' and '.join(reasons)}")


def test_recall_counts_people_found_at_the_threshold() -> None:
    """Three people; found with 0.9 and 0.4, and two boxes that are nobody."""
    people = np.array([[10, 0, 40, 60], [110, 0, 140, 60], [210, 0, 240, 60]], np.float32)
    truth = GroundTruth(people, np.zeros(3, bool), people, ("person",) * 3)
    boxes = np.array([people[0], [300, 0, 330, 60], people[1], [400, 0, 430, 60]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.8, 0.4, 0.35], np.float32))
    judged = evaluate(GroundTruthTable.from_samples([truth]), DetectionTable.from_detections([found]), [REASONABLE])[
        REASONABLE.name
    ]
    recalls = [compute_recall(judged, conf) for conf in (0.95, 0.9 - 1e-6, 0.5, 0.3)]
    assert recalls == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3])
