"""Miss rate against false positives per picture (FPPI), and MR^-2: its geometric mean over nine FPPI points."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics.matching import FALSE, IGNORED, TRUE
from hkd_det.metrics.tables import Floats

ABSENT = -1.0  # the official CityPersons program's mark, and COCO's


@dataclass(frozen=True, eq=False)
class MissRate:
    """The figure and the curve behind it.

    value: MR^-2, a fraction; ABSENT (-1) where no one was to be found. fppi, miss_rate, scores: [D] float64, the curve
    after each judged detection of all pictures, by falling score. people: to be found. pictures: evaluated.
    """

    value: float
    fppi: Floats
    miss_rate: Floats
    scores: Floats
    people: int
    pictures: int


@dataclass(frozen=True, eq=False)
class Curve:
    """recall, fppi, scores: [D] float64, after each judged detection, by falling score."""

    recall: Floats
    fppi: Floats
    scores: Floats


def curve(scores: Floats, verdict: NDArray[np.int8], order: NDArray[np.intp], people: int, pictures: int) -> Curve:
    """The curve of verdicts [D], taken in `order` [K] (indices of those that take part, by falling score)."""
    judged = order[verdict[order] != IGNORED]
    recall = np.cumsum(verdict[judged] == TRUE) / max(1, people)
    fppi = np.cumsum(verdict[judged] == FALSE) / max(1, pictures)
    return Curve(recall, fppi, scores[judged])


def log_average(found: Curve, points: Iterable[float], recall_before: float) -> float:
    """MR^-2 of a curve: at each point the recall of the last detection with an FPPI of at most that.

    recall_before: at points that lie before the curve's beginning.
    """
    if not len(found.recall):
        return 1.0
    last = np.searchsorted(found.fppi, np.asarray(tuple(points)), side="right") - 1
    missed = 1 - np.where(last >= 0, found.recall[last], recall_before)
    return 0.0 if (missed <= 0).any() else float(np.exp(np.log(missed).mean()))


def miss_rate(found: Curve, value: float, people: int, pictures: int) -> MissRate:
    """The curve with its figure; ABSENT where no one was to be found."""
    return MissRate(value if people else ABSENT, found.fppi, 1 - found.recall, found.scores, people, pictures)
