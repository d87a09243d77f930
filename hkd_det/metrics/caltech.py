"""Log-average miss rate by the Caltech protocol, in the two versions that papers use.

OLD: the original annotations (.vbb) as Dollár's dbEval.m 3.2.1 judges them. NEW: the corrected annotations (Zhang et
al. 2016, text files) as the programs of CSP, ALFNet and Pedestron do. They differ in what is a person, in the ends of
the ranges, and in whether detections get the standard aspect ratio as people do.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import inf

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics import matching
from hkd_det.metrics.curve import MissRate, curve, log_average, miss_rate
from hkd_det.metrics.tables import DetectionTable, Floats, TruthTable

FPPI_POINTS = tuple((10.0 ** np.arange(-2, 0.25, 0.25)).tolist())
ASPECT = 0.41  # width over height that every person is given
BOUNDS = (5, 5, 635, 475)  # x, y, x, y in 1-based pixels of 640 x 480: people that reach beyond are ignored


class Version(Enum):
    """Of annotations and program."""

    OLD = "caltech"
    NEW = "caltech-new"


@dataclass(frozen=True)
class Setup:
    """Whom to find, and how exactly.

    height_px, visibility: ranges; visibility (inf, inf) means not occluded at all. aspect: 0, or a > 0 for people whose
    width over height is nearer than a to ASPECT, a < 0 for those further off than -a. overlap: least, with a detection.
    margin: by which detections may fall out of the height range.
    """

    name: str
    height_px: tuple[float, float]
    visibility: tuple[float, float]
    aspect: float = 0
    overlap: float = 0.5
    margin: float = 1.25


REASONABLE = Setup("Reasonable", (50, inf), (0.65, inf))
SETUPS: dict[str, Setup] = {
    setup.name: setup
    for setup in (
        REASONABLE,
        Setup("All", (20, inf), (0.2, inf)),
        Setup("Overall", (20, inf), (0.2, inf)),  # the benchmark's first name of All
        Setup("Scale=large", (100, inf), (inf, inf)),
        Setup("Scale=near", (80, inf), (inf, inf)),
        Setup("Scale=medium", (30, 80), (inf, inf)),
        Setup("Scale=far", (20, 30), (inf, inf)),
        Setup("Occ=none", (50, inf), (inf, inf)),
        Setup("Occ=partial", (50, inf), (0.65, 1)),
        Setup("Occ=heavy", (50, inf), (0.2, 0.65)),
        Setup("Ar=all", (50, inf), (inf, inf)),
        Setup("Ar=typical", (50, inf), (inf, inf), aspect=0.1),
        Setup("Ar=atypical", (50, inf), (inf, inf), aspect=-0.1),
        Setup("Overlap=25", (50, inf), (0.65, inf), overlap=0.25),
        Setup("Overlap=50", (50, inf), (0.65, inf), overlap=0.5),
        Setup("Overlap=75", (50, inf), (0.65, inf), overlap=0.75),
        Setup("Expand=100", (50, inf), (0.65, inf), margin=1.0),
        Setup("Expand=125", (50, inf), (0.65, inf), margin=1.25),
        Setup("Expand=150", (50, inf), (0.65, inf), margin=1.5),
    )
}


def evaluate(
    truth: TruthTable,
    detections: DetectionTable,
    version: Version,
    setups: Iterable[Setup] = SETUPS.values(),
    filtered: bool = False,
) -> dict[str, MissRate]:
    """The miss rates by setup; boxes in 1-based pixels, as the benchmark's files have them.

    truth: `ignore` holds what its label makes an ignore region; `visibility` of people who are not occluded is inf
    (OLD) or 1 (NEW). filtered: the truth comes from a gt-SETUP.mat of the official program, in which the setup has
    already been applied and the boxes are reshaped.
    """
    setups = list(setups)
    found = _reshaped(detections) if version is Version.OLD else detections
    people = truth.boxes_xywh if filtered else standard_aspect(truth.boxes_xywh)
    least = min((setup.overlap for setup in setups), default=0.5)
    pairs = matching.overlapping(found, truth.picture, people, truth.boxes_xywh, least)
    order = np.argsort(-found.scores, kind="stable")
    rates = {}
    for setup in setups:
        ignored = truth.ignore if filtered else truth.ignore | ~_wanted(truth, setup, version)
        kept = _kept(found, setup)
        verdict, _ = matching.match(pairs, kept, ignored, setup.overlap)
        count = int((~ignored).sum())
        line = curve(found.scores, verdict, order[kept[order]], count, truth.pictures)
        value = log_average(line, FPPI_POINTS, recall_before=0.0)
        rates[setup.name] = miss_rate(line, value, count, truth.pictures)
    return rates


def standard_aspect(boxes_xywh: Floats) -> Floats:
    """[N, 4] boxes of the same height and centre, ASPECT x height wide; as bbApply('resize', bb, 1, 0, ASPECT)."""
    x, y, width, height = boxes_xywh.T
    wider = height * ASPECT - width
    return np.stack([x - wider / 2, y, width + wider, height], axis=1)


def _reshaped(detections: DetectionTable) -> DetectionTable:
    boxes = standard_aspect(detections.boxes_xywh)
    return DetectionTable(detections.picture, boxes, detections.scores, detections.row)


def _kept(detections: DetectionTable, setup: Setup) -> NDArray[np.bool_]:
    heights = detections.boxes_xywh[:, 3]
    return (heights >= setup.height_px[0] * (1 / setup.margin)) & (heights < setup.height_px[1] * setup.margin)


def _wanted(truth: TruthTable, setup: Setup, version: Version) -> NDArray[np.bool_]:
    """[N] people in the setup's ranges and inside BOUNDS."""
    x, y, width, height = truth.boxes_xywh.T
    low, high = setup.height_px
    tall = (height >= low) & ((height < high) if version is Version.OLD else (height <= high))
    least, most = setup.visibility
    if version is Version.NEW and least == inf:
        least = most = 1.0
    seen = truth.visibility  # NaN for a box without area: outside for the old program, inside for the new
    visible = (seen >= least) & (seen <= most) if version is Version.OLD else ~((seen < least) | (seen > most))
    inside = (x >= BOUNDS[0]) & (x + width <= BOUNDS[2]) & (y >= BOUNDS[1]) & (y + height <= BOUNDS[3])
    if version is Version.NEW:  # its program looks at both ends of both sides
        inside &= (x <= BOUNDS[2]) & (x + width >= BOUNDS[0]) & (y <= BOUNDS[3]) & (y + height >= BOUNDS[1])
    return tall & visible & inside & _aspect(width, height, setup.aspect)


def _aspect(width: Floats, height: Floats, limit: float) -> NDArray[np.bool_]:
    if not limit:
        return np.ones(len(width), bool)
    ratio = np.divide(width, height, out=np.full(len(width), np.nan), where=height > 0)
    return np.sign(limit) * np.abs(ratio - ASPECT) < limit
