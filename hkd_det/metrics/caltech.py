"""Log-average miss rate by the Caltech protocol, in the two versions that papers use.

ORIGINAL uses the original annotations (.vbb) and Dollár's dbEval.m 3.2.1. CORRECTED uses the corrected annotations
(text files of Zhang et al. 2016) and the programs of CSP, ALFNet and Pedestron. The two versions differ in the labels
that count, in the limits of the ranges, and in whether the width of detections is standardized.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import inf

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics.matching import (
    MissRateResult,
    compute_miss_rate,
    compute_overlaps,
    match_detections,
)
from hkd_det.metrics.tables import DetectionTable, Floats, GroundTruthTable

FPPI_POINTS = tuple((10.0 ** np.arange(-2, 0.25, 0.25)).tolist())
PERSON_ASPECT_RATIO = 0.41  # width / height of every ground-truth box
BOUNDS_XYXY = (5, 5, 635, 475)  # 1-based pixels of 640 x 480; boxes that extend beyond are ignored

# Evaluated frames (every 30th) of each test video, 4,024 in all, in the order of the videos. The lists of test images
# that detectors for the corrected annotations use (set06_V000_I00029.jpg, ...) have the same counts.
NUM_TEST_FRAMES = {
    "set06": (61, 61, 59, 59, *[61] * 15),
    "set07": (61, 61, 61, 61, 65, 72, 61, 61, 61, 61, 61, 60),
    "set08": (59, 59, 61, 61, 61, 61, 61, 61, 61, 56, 56),
    "set09": (62, 62, 61, 61, 59, 66, 61, 61, 61, 61, 61, 62),
    "set10": (*[61] * 11, 57),
}


class AnnotationVersion(Enum):
    """Version of the Caltech annotations and their evaluation program. The values are names of `--protocol`."""

    ORIGINAL = "caltech"
    CORRECTED = "caltech-new"


@dataclass(frozen=True)
class CaltechSetup:
    """Subset of the ground truth that is evaluated, and the matching rules.

    Attributes:
        name: Name of the setup, for example Reasonable.
        height_px: Range of the box height in pixels.
        visible_ratio: Range of the visible part, 0 to 1. (inf, inf) selects boxes that are not occluded.
        aspect_deviation: Limit of |width / height - `PERSON_ASPECT_RATIO`|. A positive value selects the boxes below
            the limit, a negative value those above its amount. 0 selects all boxes.
        iou_threshold: Smallest overlap of a match, 0 to 1.
        height_margin: Factor by which detections may be outside the height range.
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
        CaltechSetup("Overall", (20, inf), (0.2, inf)),  # the first name of All in the benchmark
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
    """Compute the miss rate of each setup. Boxes are in 1-based pixels, as in the benchmark's files.

    Args:
        ground_truth: Ground truth of all frames. `ignore` contains the ignore regions that follow from the labels;
            `visible_ratio` of boxes that are not occluded is inf (ORIGINAL) or 1 (CORRECTED).
        detections: Detections in the same frames.
        annotation_version: Version of the annotations.
        setups: Setups to evaluate.
        is_prefiltered: The ground truth comes from a gt-SETUP.mat of the official program: the setup is already
            applied and the boxes are reshaped.

    Returns:
        The result of each setup, by its name.
    """
    setups = list(setups)
    if annotation_version is AnnotationVersion.ORIGINAL:
        detections = _standardize_detections(detections)
    gt_boxes = ground_truth.boxes_xywh if is_prefiltered else standardize_aspect_ratio(ground_truth.boxes_xywh)
    min_overlap = min((setup.iou_threshold for setup in setups), default=0.5)
    pairs = compute_overlaps(detections, ground_truth.image_index, gt_boxes, ground_truth.boxes_xywh, min_overlap)
    order = np.argsort(-detections.scores, kind="stable")
    results = {}
    for setup in setups:
        gt_ignore = ground_truth.ignore
        if not is_prefiltered:
            gt_ignore = gt_ignore | ~_is_in_caltech_setup(ground_truth, setup, annotation_version)
        eval_mask = _compute_caltech_eval_mask(detections, setup)
        match_status, _ = match_detections(pairs, eval_mask, gt_ignore, setup.iou_threshold)
        results[setup.name] = compute_miss_rate(
            ground_truth, gt_ignore, detections, match_status, order[eval_mask[order]], FPPI_POINTS, True
        )
    return results


def standardize_aspect_ratio(boxes_xywh: Floats) -> Floats:
    """Set the width of boxes to `PERSON_ASPECT_RATIO` times their height, as bbApply('resize', bb, 1, 0, 0.41).

    Args:
        boxes_xywh (float64 array[N, 4]): Boxes in pixels.

    Returns:
        boxes_xywh (float64 array[N, 4]): Boxes with the same height and center.
    """
    x, y, width, height = boxes_xywh.T
    added_width = height * PERSON_ASPECT_RATIO - width
    return np.stack([x - added_width / 2, y, width + added_width, height], axis=1)


def count_test_frames() -> dict[str, int]:
    """Return the number of evaluated frames of each test video (`set06/V000`, ...), in order."""
    return {
        f"{name}/V{number:03}": count for name, counts in NUM_TEST_FRAMES.items() for number, count in enumerate(counts)
    }


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
    """Return the boxes, bool array[N], in the ranges of the setup and inside `BOUNDS_XYXY`."""
    is_original = annotation_version is AnnotationVersion.ORIGINAL
    x, y, width, height = ground_truth.boxes_xywh.T
    low, high = setup.height_px
    is_height_in_range = (height >= low) & ((height < high) if is_original else (height <= high))
    min_ratio, max_ratio = setup.visible_ratio
    if not is_original and min_ratio == inf:
        min_ratio = max_ratio = 1.0
    ratio = ground_truth.visible_ratio  # NaN for a box without area: outside in ORIGINAL, inside in CORRECTED
    is_visible = (
        (ratio >= min_ratio) & (ratio <= max_ratio) if is_original else ~((ratio < min_ratio) | (ratio > max_ratio))
    )
    x_min, y_min, x_max, y_max = BOUNDS_XYXY
    is_inside = (x >= x_min) & (x + width <= x_max) & (y >= y_min) & (y + height <= y_max)
    if not is_original:  # the corrected version's programs compare both ends with both limits
        is_inside &= (x <= x_max) & (x + width >= x_min) & (y <= y_max) & (y + height >= y_min)
    return is_height_in_range & is_visible & is_inside & _is_in_aspect_range(width, height, setup.aspect_deviation)


def _is_in_aspect_range(width: Floats, height: Floats, aspect_deviation: float) -> NDArray[np.bool_]:
    if not aspect_deviation:
        return np.ones(len(width), bool)
    ratio = np.divide(width, height, out=np.full(len(width), np.nan), where=height > 0)
    return np.sign(aspect_deviation) * np.abs(ratio - PERSON_ASPECT_RATIO) < aspect_deviation
