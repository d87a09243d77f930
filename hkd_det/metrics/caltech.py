"""Log-average miss rate by the Caltech protocol, in the two versions that papers use.

OLD: the original annotations (.vbb) as Dollár's dbEval.m 3.2.1 judges them. NEW: the corrected annotations (Zhang et
al. 2016, text files) as the programs of CSP, ALFNet and Pedestron do. They differ in what is a person, in the ends of
the ranges, and in whether detections get the standard aspect ratio as people do.

How many of each Caltech test video's frames are measured: every 30th, 4,024 in all.

For files that hold the truth of all these frames and do not say which is which: the official programs' gt-SETUP.mat.
Counted in the list of test pictures (set06_V000_I00029.jpg, ...) that detectors for the new annotations bring along.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import inf

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics import matching
from hkd_det.metrics.matching import MissRateResult, compute_curve, log_average_miss_rate, make_result
from hkd_det.metrics.tables import DetectionTable, Floats, GroundTruthTable

FPPI_POINTS = tuple((10.0 ** np.arange(-2, 0.25, 0.25)).tolist())


PERSON_ASPECT_RATIO = 0.41  # width over height that every person is given


BOUNDS_XYXY = (5, 5, 635, 475)  # x, y, x, y in 1-based pixels of 640 x 480: people that reach beyond are ignored


class AnnotationVersion(Enum):
    """Of annotations and program."""

    ORIGINAL = "caltech"
    CORRECTED = "caltech-new"


@dataclass(frozen=True)
class CaltechSetup:
    """Whom to find, and how exactly.

    height_px, visibility: ranges; visibility (inf, inf) means not occluded at all. aspect: 0, or a > 0 for people whose
    width over height is nearer than a to ASPECT, a < 0 for those further off than -a. overlap: least, with a detection.
    margin: by which detections may fall out of the height range.
    """

    name: str
    height_px: tuple[float, float]
    visible_ratio: tuple[float, float]
    aspect_deviation: float = 0
    iou_threshold: float = 0.5
    height_margin: float = 1.25


REASONABLE = CaltechSetup("Reasonable", (50, inf), (0.65, inf))


SETUPS: dict[str, CaltechSetup] = {
    setup.name: setup
    for setup in (
        REASONABLE,
        CaltechSetup("All", (20, inf), (0.2, inf)),
        CaltechSetup("Overall", (20, inf), (0.2, inf)),  # the benchmark's first name of All
        CaltechSetup("Scale=large", (100, inf), (inf, inf)),
        CaltechSetup("Scale=near", (80, inf), (inf, inf)),
        CaltechSetup("Scale=medium", (30, 80), (inf, inf)),
        CaltechSetup("Scale=far", (20, 30), (inf, inf)),
        CaltechSetup("Occ=none", (50, inf), (inf, inf)),
        CaltechSetup("Occ=partial", (50, inf), (0.65, 1)),
        CaltechSetup("Occ=heavy", (50, inf), (0.2, 0.65)),
        CaltechSetup("Ar=all", (50, inf), (inf, inf)),
        CaltechSetup("Ar=typical", (50, inf), (inf, inf), aspect_deviation=0.1),
        CaltechSetup("Ar=atypical", (50, inf), (inf, inf), aspect_deviation=-0.1),
        CaltechSetup("Overlap=25", (50, inf), (0.65, inf), iou_threshold=0.25),
        CaltechSetup("Overlap=50", (50, inf), (0.65, inf), iou_threshold=0.5),
        CaltechSetup("Overlap=75", (50, inf), (0.65, inf), iou_threshold=0.75),
        CaltechSetup("Expand=100", (50, inf), (0.65, inf), height_margin=1.0),
        CaltechSetup("Expand=125", (50, inf), (0.65, inf), height_margin=1.25),
        CaltechSetup("Expand=150", (50, inf), (0.65, inf), height_margin=1.5),
    )
}


def evaluate(
    ground_truth: GroundTruthTable,
    detections: DetectionTable,
    annotation_version: AnnotationVersion,
    setups: Iterable[CaltechSetup] = SETUPS.values(),
    is_prefiltered: bool = False,
) -> dict[str, MissRateResult]:
    """The miss rates by setup; boxes in 1-based pixels, as the benchmark's files have them.

    truth: `ignore` holds what its label makes an ignore region; `visibility` of people who are not occluded is inf
    (OLD) or 1 (NEW). filtered: the truth comes from a gt-SETUP.mat of the official program, in which the setup has
    already been applied and the boxes are reshaped.
    """
    setups = list(setups)
    found = _standardize_detections(detections) if annotation_version is AnnotationVersion.ORIGINAL else detections
    people = ground_truth.boxes_xywh if is_prefiltered else standardize_aspect_ratio(ground_truth.boxes_xywh)
    least = min((setup.iou_threshold for setup in setups), default=0.5)
    pairs = matching.compute_overlaps(found, ground_truth.image_index, people, ground_truth.boxes_xywh, least)
    order = np.argsort(-found.scores, kind="stable")
    rates = {}
    for setup in setups:
        ignored = (
            ground_truth.ignore
            if is_prefiltered
            else ground_truth.ignore | ~_is_in_caltech_setup(ground_truth, setup, annotation_version)
        )
        kept = _compute_caltech_eval_mask(found, setup)
        verdict, _ = matching.match_detections(pairs, kept, ignored, setup.iou_threshold)
        count = int((~ignored).sum())
        line = compute_curve(found.scores, verdict, order[kept[order]], count, ground_truth.num_images)
        value = log_average_miss_rate(line, FPPI_POINTS, recall_before_curve=0.0)
        rates[setup.name] = make_result(line, value, count, ground_truth.num_images)
    return rates


def standardize_aspect_ratio(boxes_xywh: Floats) -> Floats:
    """[N, 4] boxes of the same height and centre, ASPECT x height wide; as bbApply('resize', bb, 1, 0, ASPECT)."""
    x, y, width, height = boxes_xywh.T
    wider = height * PERSON_ASPECT_RATIO - width
    return np.stack([x - wider / 2, y, width + wider, height], axis=1)


def _standardize_detections(detections: DetectionTable) -> DetectionTable:
    boxes = standardize_aspect_ratio(detections.boxes_xywh)
    return DetectionTable(detections.image_index, boxes, detections.scores, detections.source_row)


def _compute_caltech_eval_mask(detections: DetectionTable, setup: CaltechSetup) -> NDArray[np.bool_]:
    heights = detections.boxes_xywh[:, 3]
    return (heights >= setup.height_px[0] * (1 / setup.height_margin)) & (
        heights < setup.height_px[1] * setup.height_margin
    )


def _is_in_caltech_setup(
    ground_truth: GroundTruthTable, setup: CaltechSetup, annotation_version: AnnotationVersion
) -> NDArray[np.bool_]:
    """[N] people in the setup's ranges and inside BOUNDS."""
    x, y, width, height = ground_truth.boxes_xywh.T
    low, high = setup.height_px
    tall = (height >= low) & ((height < high) if annotation_version is AnnotationVersion.ORIGINAL else (height <= high))
    least, most = setup.visible_ratio
    if annotation_version is AnnotationVersion.CORRECTED and least == inf:
        least = most = 1.0
    seen = ground_truth.visible_ratio  # NaN for a box without area: outside for the old program, inside for the new
    visible = (
        (seen >= least) & (seen <= most)
        if annotation_version is AnnotationVersion.ORIGINAL
        else ~((seen < least) | (seen > most))
    )
    inside = (
        (x >= BOUNDS_XYXY[0]) & (x + width <= BOUNDS_XYXY[2]) & (y >= BOUNDS_XYXY[1]) & (y + height <= BOUNDS_XYXY[3])
    )
    if annotation_version is AnnotationVersion.CORRECTED:  # its program looks at both ends of both sides
        inside &= (
            (x <= BOUNDS_XYXY[2])
            & (x + width >= BOUNDS_XYXY[0])
            & (y <= BOUNDS_XYXY[3])
            & (y + height >= BOUNDS_XYXY[1])
        )
    return tall & visible & inside & _is_in_aspect_range(width, height, setup.aspect_deviation)


def _is_in_aspect_range(width: Floats, height: Floats, aspect_deviation: float) -> NDArray[np.bool_]:
    if not aspect_deviation:
        return np.ones(len(width), bool)
    ratio = np.divide(width, height, out=np.full(len(width), np.nan), where=height > 0)
    return np.sign(aspect_deviation) * np.abs(ratio - PERSON_ASPECT_RATIO) < aspect_deviation


NUM_TEST_FRAMES = {
    "set06": (61, 61, 59, 59, *[61] * 15),
    "set07": (61, 61, 61, 61, 65, 72, 61, 61, 61, 61, 61, 60),
    "set08": (59, 59, 61, 61, 61, 61, 61, 61, 61, 56, 56),
    "set09": (62, 62, 61, 61, 59, 66, 61, 61, 61, 61, 61, 62),
    "set10": (*[61] * 11, 57),
}


def count_test_frames() -> dict[str, int]:
    """Frames measured of each video, `set06/V000` and so on, in order."""
    return {
        f"{name}/V{number:03}": count for name, counts in NUM_TEST_FRAMES.items() for number, count in enumerate(counts)
    }
