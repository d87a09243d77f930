"""Log-average miss rate by the CityPersons protocol, as computed by the official `eval_MR_multisetup.py`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics.matching import (
    TRUE_POSITIVE,
    MissRateResult,
    compute_miss_rate,
    compute_overlaps,
    match_detections,
)
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.structures import Detections, GroundTruth, Sample

FPPI_POINTS = (0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0000)
HEIGHT_MARGIN = 1.25
MAX_DETECTIONS = 1000  # per image, applied before the height margin
IOU_THRESHOLD = min(0.5, 1 - 1e-10)


@dataclass(frozen=True)
class CityPersonsSetup:
    """Subset of the ground truth that is evaluated; boxes outside the ranges are ignore regions.

    Attributes:
        name: Name of the setup, for example Reasonable.
        height_px: Closed range of the box height in pixels.
        visible_ratio: Closed range of the visible part, 0 to 1.
    """

    name: str
    height_px: tuple[float, float]
    visible_ratio: tuple[float, float]


REASONABLE = CityPersonsSetup("Reasonable", (50, 1e10), (0.65, 1e10))
SETUPS: dict[str, CityPersonsSetup] = {
    setup.name: setup
    for setup in (
        REASONABLE,
        CityPersonsSetup("Reasonable_small", (50, 75), (0.65, 1e10)),
        CityPersonsSetup("Reasonable_occ=heavy", (50, 1e10), (0.2, 0.65)),
        CityPersonsSetup("All", (20, 1e10), (0.2, 1e10)),
        # Setups that papers add. Their heavy differs from the official one: it has no lower limit.
        CityPersonsSetup("bare", (50, 1e10), (0.9, 1e10)),
        CityPersonsSetup("partial", (50, 1e10), (0.65, 0.9)),
        CityPersonsSetup("heavy", (50, 1e10), (0.0, 0.65)),
    )
}


def evaluate(
    ground_truth: GroundTruthTable,
    detections: DetectionTable,
    setups: Iterable[CityPersonsSetup] = SETUPS.values(),
    zero_recall_before_curve: bool = False,
) -> dict[str, MissRateResult]:
    """Compute the miss rate of each setup.

    Args:
        ground_truth: Ground truth of all images.
        detections: Detections in the same images.
        setups: Setups to evaluate.
        zero_recall_before_curve: Use recall 0 at FPPI points below the first FPPI of the curve. The official program
            uses the last recall of the curve there, because its index is -1.

    Returns:
        The result of each setup, by its name.
    """
    top_detections = detections.select(detections.rank_per_image() < MAX_DETECTIONS)
    pairs = compute_overlaps(
        top_detections, ground_truth.image_index, ground_truth.boxes_xywh, ground_truth.boxes_xywh, IOU_THRESHOLD
    )
    order = np.argsort(-top_detections.scores, kind="stable")
    results = {}
    for setup in setups:
        gt_ignore = _compute_gt_ignore(ground_truth, setup)
        eval_mask = _compute_citypersons_eval_mask(top_detections, setup)
        match_status, _ = match_detections(pairs, eval_mask, gt_ignore, IOU_THRESHOLD)
        results[setup.name] = compute_miss_rate(
            ground_truth,
            gt_ignore,
            top_detections,
            match_status,
            order[eval_mask[order]],
            FPPI_POINTS,
            zero_recall_before_curve,
        )
    return results


def evaluate_detections(
    samples: Sequence[Sample],
    detections: Sequence[Detections],
    setups: Iterable[CityPersonsSetup] = SETUPS.values(),
) -> dict[str, MissRateResult]:
    """Compute the miss rate of detections in memory.

    Args:
        samples: Annotated images.
        detections: Detections of each sample, in the same order. An empty sequence means no detections at all.
        setups: Setups to evaluate.

    Returns:
        The result of each setup, by its name.
    """
    ground_truth = GroundTruthTable.from_samples([sample.ground_truth for sample in samples])
    return evaluate(ground_truth, DetectionTable.from_detections(detections), setups)


@dataclass(frozen=True, eq=False)
class ImageMatches:
    """Match status of the detections of one image in one setup.

    Attributes:
        eval_indices (int array[K]): Rows of the evaluated detections, by descending score.
        match_status (int8 array[K]): `TRUE_POSITIVE`, `FALSE_POSITIVE` or `IGNORED`.
        matched_gt (int array[K]): Row of the matched ground-truth box, -1 without a match.
        gt_ignore (bool array[M]): Ground-truth boxes that are ignore regions in the setup.
    """

    eval_indices: NDArray[np.intp]
    match_status: NDArray[np.int8]
    matched_gt: NDArray[np.intp]
    gt_ignore: NDArray[np.bool_]

    @property
    def missed_gt(self) -> NDArray[np.intp]:
        """Rows of the ground-truth boxes that are evaluated and not matched, int array."""
        is_matched = np.zeros(len(self.gt_ignore), bool)
        is_matched[self.matched_gt[self.match_status == TRUE_POSITIVE]] = True
        return np.flatnonzero(~is_matched & ~self.gt_ignore)


def match_image(ground_truth: GroundTruth, detections: Detections, setup: CityPersonsSetup) -> ImageMatches:
    """Match the detections of one image, for visualization.

    Args:
        ground_truth: Ground truth of the image.
        detections: Detections in the image.
        setup: Setup that selects the evaluated boxes.

    Returns:
        The match status of each evaluated detection.
    """
    gt_table, table = GroundTruthTable.from_samples([ground_truth]), DetectionTable.from_detections([detections])
    gt_ignore = _compute_gt_ignore(gt_table, setup)
    eval_mask = _compute_citypersons_eval_mask(table, setup) & (table.rank_per_image() < MAX_DETECTIONS)
    pairs = compute_overlaps(table, gt_table.image_index, gt_table.boxes_xywh, gt_table.boxes_xywh, IOU_THRESHOLD)
    match_status, matched_gt = match_detections(pairs, eval_mask, gt_ignore, IOU_THRESHOLD)
    return ImageMatches(np.flatnonzero(eval_mask), match_status[eval_mask], matched_gt[eval_mask], gt_ignore)


def _compute_gt_ignore(ground_truth: GroundTruthTable, setup: CityPersonsSetup) -> NDArray[np.bool_]:
    return (
        ground_truth.ignore
        | (ground_truth.height_px < setup.height_px[0])
        | (ground_truth.height_px > setup.height_px[1])
        | (ground_truth.visible_ratio < setup.visible_ratio[0])
        | (ground_truth.visible_ratio > setup.visible_ratio[1])
    )


def _compute_citypersons_eval_mask(detections: DetectionTable, setup: CityPersonsSetup) -> NDArray[np.bool_]:
    heights = detections.boxes_xywh[:, 3]
    return (heights >= setup.height_px[0] / HEIGHT_MARGIN) & (heights < setup.height_px[1] * HEIGHT_MARGIN)
