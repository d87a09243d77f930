"""Log-average miss rate by the CityPersons protocol, as the official `eval_MR_multisetup.py` computes it.

Each picture's detections, best first, take the free truth they overlap most (IoU >= 0.5); what is left may
fall into an ignored truth (intersection over the detection >= 0.5) and then counts neither way. Over all
pictures this gives miss rate against false positives per picture (FPPI); MR^-2 is the geometric mean of the
miss rate at nine FPPI points between 10^-2 and 10^0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.datasets.sample import Truth
from hkd_det.detections import Detections

FPPI_POINTS = (0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0000)
HEIGHT_MARGIN = 1.25
MOST_DETECTIONS = 1000  # a picture, before the height margin
OVERLAP = min(0.5, 1 - 1e-10)
IGNORED, FALSE, TRUE = -1, 0, 1


@dataclass(frozen=True)
class Setup:
    """Which people are to be found: closed ranges of height in pixels and of visibility. Others are ignored."""

    name: str
    height_px: tuple[float, float]
    visibility: tuple[float, float]


REASONABLE = Setup("Reasonable", (50, 1e10), (0.65, 1e10))
SETUPS: dict[str, Setup] = {
    setup.name: setup
    for setup in (
        REASONABLE,
        Setup("Reasonable_small", (50, 75), (0.65, 1e10)),
        Setup("Reasonable_occ=heavy", (50, 1e10), (0.2, 0.65)),
        Setup("All", (20, 1e10), (0.2, 1e10)),
        # As papers report them beside the official four.
        Setup("bare", (50, 1e10), (0.9, 1e10)),
        Setup("partial", (50, 1e10), (0.65, 0.9)),
        Setup("heavy", (50, 1e10), (0.0, 0.65)),
    )
}


@dataclass(frozen=True, eq=False)
class MissRate:
    """The figure and the curve behind it.

    value: MR^-2, a fraction; nan where no one was to be found. fppi, miss_rate, scores: [D], the curve after each
    judged detection of all pictures, by falling score. people: to be found. pictures: evaluated.
    """

    value: float
    fppi: NDArray[np.float64]
    miss_rate: NDArray[np.float64]
    scores: NDArray[np.float32]
    people: int
    pictures: int


@dataclass(frozen=True, eq=False)
class Match:
    """One picture's detections judged in one setup.

    kept: [K] indices of the detections that take part, best first. verdict: [K] TRUE, FALSE or IGNORED.
    partner: [K] index of the truth taken, -1 for none. ignored: [N] bool, the truths not to be found.
    """

    kept: NDArray[np.intp]
    verdict: NDArray[np.int8]
    partner: NDArray[np.intp]
    ignored: NDArray[np.bool_]

    @property
    def missed(self) -> NDArray[np.intp]:
        """Indices of the truths that were to be found and were not."""
        found = np.zeros(len(self.ignored), bool)
        found[self.partner[self.verdict == TRUE]] = True
        return np.flatnonzero(~found & ~self.ignored)


def evaluate(truths: Sequence[Truth], detections: Sequence[Detections], setup: Setup) -> MissRate:
    """The miss rate over pictures whose truths and detections stand in the same order."""
    matches = [match(truth, found, setup) for truth, found in zip(truths, detections, strict=True)]
    people = sum(int((~one.ignored).sum()) for one in matches)
    scores = np.concatenate(
        [found.scores[one.kept] for found, one in zip(detections, matches, strict=True)] or [np.zeros(0, np.float32)]
    )
    verdicts = np.concatenate([one.verdict for one in matches] or [np.zeros(0, np.int8)])
    order = np.argsort(-scores, kind="mergesort")
    order = order[verdicts[order] != IGNORED]
    recall = np.cumsum(verdicts[order] == TRUE) / max(1, people)
    fppi = np.cumsum(verdicts[order] == FALSE) / max(1, len(matches))
    value = log_average(fppi, recall) if people else float("nan")
    return MissRate(value, fppi, 1 - recall, scores[order], people, len(matches))


def log_average(fppi: NDArray[np.float64], recall: NDArray[np.float64]) -> float:
    """MR^-2 of a curve. Where it starts beyond a point the official program takes its last recall: so do we."""
    if not len(recall):
        return 1.0
    at_points = recall[np.searchsorted(fppi, FPPI_POINTS, side="right") - 1]
    missed = 1 - at_points
    return 0.0 if (missed <= 0).any() else float(np.exp(np.log(missed).mean()))


def match(truth: Truth, detections: Detections, setup: Setup) -> Match:
    """Judge one picture's detections."""
    ignored = _ignored(truth, setup)
    kept = _kept(detections, setup)
    found = detections.boxes_xyxy[kept].astype(np.float64)
    whole = truth.boxes_xyxy.astype(np.float64)
    # Truths with the ignored ones last, as the official program sorts them.
    order = np.argsort(ignored, kind="stable")
    overlap = _overlaps(found, whole[order], ignored[order])
    verdict = np.full(len(kept), FALSE, np.int8)
    partner = np.full(len(kept), -1, np.intp)
    real = int((~ignored).sum())
    free = np.ones(real, bool)
    for row in np.flatnonzero((overlap >= OVERLAP).any(1)):
        choice = _last_best(np.where(free, overlap[row, :real], -1.0))
        if choice is not None:
            free[choice] = False
            verdict[row] = TRUE
        else:
            choice = _last_best(overlap[row, real:])
            if choice is None:
                continue
            choice += real
            verdict[row] = IGNORED
        partner[row] = order[choice]
    return Match(kept, verdict, partner, ignored)


def _last_best(overlap: NDArray[np.float64]) -> int | None:
    """Index of the largest overlap at or above the threshold; the last of equals, as the official loop leaves it."""
    if not len(overlap) or overlap.max() < OVERLAP:
        return None
    return len(overlap) - 1 - int(overlap[::-1].argmax())


def _ignored(truth: Truth, setup: Setup) -> NDArray[np.bool_]:
    heights, visibility = truth.heights_px, truth.visibility
    return (
        truth.ignore
        | (heights < setup.height_px[0])
        | (heights > setup.height_px[1])
        | (visibility < setup.visibility[0])
        | (visibility > setup.visibility[1])
    )


def _kept(detections: Detections, setup: Setup) -> NDArray[np.intp]:
    boxes = detections.boxes_xyxy[:MOST_DETECTIONS].astype(np.float64)  # as the truth's: a height of 40 is on the edge
    heights = boxes[:, 3] - boxes[:, 1]
    low, high = setup.height_px[0] / HEIGHT_MARGIN, setup.height_px[1] * HEIGHT_MARGIN
    return np.flatnonzero((heights >= low) & (heights < high))


def _overlaps(
    found: NDArray[np.float64], whole: NDArray[np.float64], ignored: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """[K, N] IoU, and intersection over the detection's area in the columns of ignored truths."""
    shared = box_math.intersection(found, whole)
    mine = box_math.area(found)[:, None]
    union = np.where(ignored[None], mine, mine + box_math.area(whole)[None] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
