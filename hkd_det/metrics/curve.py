"""Miss rate against false positives per picture (FPPI), and MR^-2: its geometric mean over nine FPPI points."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics.matching import FALSE_POSITIVE, IGNORED, TRUE_POSITIVE
from hkd_det.metrics.tables import Floats

NO_GROUND_TRUTH = -1.0  # the official CityPersons program's mark, and COCO's


@dataclass(frozen=True, eq=False)
class MissRateResult:
    """The figure and the curve behind it.

    value: MR^-2, a fraction; ABSENT (-1) where no one was to be found. fppi, miss_rate, scores: [D] float64, the curve
    after each judged detection of all pictures, by falling score. people: to be found. pictures: evaluated.
    """

    value: float
    fppi: Floats
    miss_rate: Floats
    scores: Floats
    num_gt: int
    num_images: int


@dataclass(frozen=True, eq=False)
class RecallCurve:
    """recall, fppi, scores: [D] float64, after each judged detection, by falling score."""

    recall: Floats
    fppi: Floats
    scores: Floats


def compute_curve(
    scores: Floats, match_status: NDArray[np.int8], order: NDArray[np.intp], num_gt: int, num_images: int
) -> RecallCurve:
    """The curve of verdicts [D], taken in `order` [K] (indices of those that take part, by falling score)."""
    judged = order[match_status[order] != IGNORED]
    recall = np.cumsum(match_status[judged] == TRUE_POSITIVE) / max(1, num_gt)
    fppi = np.cumsum(match_status[judged] == FALSE_POSITIVE) / max(1, num_images)
    return RecallCurve(recall, fppi, scores[judged])


def log_average_miss_rate(recall_curve: RecallCurve, fppi_points: Iterable[float], recall_before_curve: float) -> float:
    """MR^-2 of a curve: at each point the recall of the last detection with an FPPI of at most that.

    recall_before: at points that lie before the curve's beginning.
    """
    if not len(recall_curve.recall):
        return 1.0
    last = np.searchsorted(recall_curve.fppi, np.asarray(tuple(fppi_points)), side="right") - 1
    missed = 1 - np.where(last >= 0, recall_curve.recall[last], recall_before_curve)
    return 0.0 if (missed <= 0).any() else float(np.exp(np.log(missed).mean()))


def make_result(recall_curve: RecallCurve, value: float, num_gt: int, num_images: int) -> MissRateResult:
    """The curve with its figure; ABSENT where no one was to be found."""
    return MissRateResult(
        value if num_gt else NO_GROUND_TRUTH,
        recall_curve.fppi,
        1 - recall_curve.recall,
        recall_curve.scores,
        num_gt,
        num_images,
    )
