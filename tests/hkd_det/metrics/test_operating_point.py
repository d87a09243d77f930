"""The suggested score threshold on hand-made detections."""

from pathlib import Path

import numpy as np
import pytest

from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.matching import NO_DETECTIONS, OperatingPoint, suggest_operating_point
from hkd_det.structures import Detections, GroundTruth, Sample

BOXES = np.array([[0, 0, 40, 100], [100, 0, 140, 100], [200, 0, 240, 100], [400, 0, 440, 100]], np.float32)


def suggest(scores: list[float], rows: list[int], num_gt: int = 3) -> OperatingPoint:
    """Return the operating point of detections at rows of BOXES; the first `num_gt` rows are persons."""
    gt = GroundTruth(BOXES[:num_gt], np.zeros(num_gt, bool), BOXES[:num_gt], ("person",) * num_gt)
    sample = Sample("a", Path("a.png"), gt)
    detections = Detections(BOXES[rows].reshape(-1, 4), np.array(scores, np.float32))
    return suggest_operating_point(evaluate_detections([sample], [detections], [REASONABLE])[REASONABLE.name])


def test_no_detections_have_no_recall() -> None:
    assert suggest([], []) == NO_DETECTIONS
    assert suggest([0.9], [3]) == NO_DETECTIONS


def test_threshold_has_the_highest_f1() -> None:
    """The third person comes after a false positive and raises F1 from 4/5 to 6/7."""
    point = suggest([0.9, 0.8, 0.7, 0.6], [0, 1, 3, 2])
    assert (point.threshold, point.recall, point.precision) == (pytest.approx(0.6), 1.0, pytest.approx(0.75))
    point = suggest([0.9, 0.8, 0.7], [0, 1, 3])
    assert (point.threshold, point.precision) == (pytest.approx(0.8), pytest.approx(1.0))
    assert point.recall == pytest.approx(2 / 3)


def test_equal_scores_are_not_separated() -> None:
    point = suggest([0.5, 0.5], [0, 3])
    assert (point.threshold, point.precision) == (0.5, pytest.approx(0.5))
