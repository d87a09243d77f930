"""Log-average miss rate by the CityPersons protocol, as the official `eval_MR_multisetup.py` computes it."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.sample import Truth
from hkd_det.detections import Detections
from hkd_det.metrics import matching
from hkd_det.metrics.curve import MissRate, curve, log_average, miss_rate
from hkd_det.metrics.tables import DetectionTable, TruthTable

FPPI_POINTS = (0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0000)
HEIGHT_MARGIN = 1.25
MOST_DETECTIONS = 1000  # a picture, before the height margin
OVERLAP = min(0.5, 1 - 1e-10)


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
        # As papers report them beside the official four. Their heavy is not the official one: it has no lower end.
        Setup("bare", (50, 1e10), (0.9, 1e10)),
        Setup("partial", (50, 1e10), (0.65, 0.9)),
        Setup("heavy", (50, 1e10), (0.0, 0.65)),
    )
}


def evaluate(
    truth: TruthTable, detections: DetectionTable, setups: Iterable[Setup] = SETUPS.values(), strict: bool = False
) -> dict[str, MissRate]:
    """The miss rates by setup.

    strict: at FPPI points before the curve's beginning nothing is found; the official program takes the curve's
    last recall there (its index -1).
    """
    best = detections.select(detections.rank() < MOST_DETECTIONS)
    pairs = matching.overlapping(best, truth.picture, truth.boxes_xywh, truth.boxes_xywh, OVERLAP)
    order = np.argsort(-best.scores, kind="stable")
    found = {}
    for setup in setups:
        ignored, kept = _ignored(truth, setup), _kept(best, setup)
        verdict, _ = matching.match(pairs, kept, ignored, OVERLAP)
        people = int((~ignored).sum())
        line = curve(best.scores, verdict, order[kept[order]], people, truth.pictures)
        before = 0.0 if strict or not len(line.recall) else float(line.recall[-1])
        found[setup.name] = miss_rate(line, log_average(line, FPPI_POINTS, before), people, truth.pictures)
    return found


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
        found[self.partner[self.verdict == matching.TRUE]] = True
        return np.flatnonzero(~found & ~self.ignored)


def match(truth: Truth, detections: Detections, setup: Setup) -> Match:
    """Judge one picture's detections, to look at."""
    people, found = TruthTable.of([truth]), DetectionTable.of([detections])
    ignored = _ignored(people, setup)
    kept = _kept(found, setup) & (found.rank() < MOST_DETECTIONS)
    pairs = matching.overlapping(found, people.picture, people.boxes_xywh, people.boxes_xywh, OVERLAP)
    verdict, partner = matching.match(pairs, kept, ignored, OVERLAP)
    return Match(np.flatnonzero(kept), verdict[kept], partner[kept], ignored)


def _ignored(truth: TruthTable, setup: Setup) -> NDArray[np.bool_]:
    return (
        truth.ignore
        | (truth.height_px < setup.height_px[0])
        | (truth.height_px > setup.height_px[1])
        | (truth.visibility < setup.visibility[0])
        | (truth.visibility > setup.visibility[1])
    )


def _kept(detections: DetectionTable, setup: Setup) -> NDArray[np.bool_]:
    heights = detections.boxes_xywh[:, 3]
    return (heights >= setup.height_px[0] / HEIGHT_MARGIN) & (heights < setup.height_px[1] * HEIGHT_MARGIN)
