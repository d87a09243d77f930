"""The operating point of a detector: a score threshold, with precision and recall at it."""

from dataclasses import dataclass

import numpy as np

from hkd_det.metrics.matching import MissRateResult


@dataclass(frozen=True)
class OperatingPoint:
    """A score threshold and the accuracy of the detections that reach it, in one setup.

    Attributes:
        threshold: Lowest score of a detection, 0 to 1.
        recall: Ratio of persons that are detected, 0 to 1.
        precision: Ratio of detections that are persons, 0 to 1.
    """

    threshold: float
    recall: float
    precision: float


NO_DETECTIONS = OperatingPoint(threshold=0.5, recall=0.0, precision=0.0)


def suggest_operating_point(result: MissRateResult) -> OperatingPoint:
    """Return the operating point with the highest F1 score, 2 TP / (detections + persons).

    Args:
        result: Curve of a setup.

    Returns:
        The operating point; `NO_DETECTIONS` if no detection is a person.
    """
    num_tp = (1 - result.miss_rate) * result.num_gt
    num_detections = np.arange(1, len(num_tp) + 1)
    # Detections of the same score cannot be separated: only the last of them is a threshold.
    is_last = np.append(result.scores[1:] < result.scores[:-1], True)[: len(num_tp)]
    f1 = np.where(is_last, 2 * num_tp / (num_detections + max(1, result.num_gt)), 0.0)
    if not f1.any():
        return NO_DETECTIONS
    best = int(f1.argmax())
    return OperatingPoint(
        float(result.scores[best]), float(1 - result.miss_rate[best]), float(num_tp[best] / num_detections[best])
    )
