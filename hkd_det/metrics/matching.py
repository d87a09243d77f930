"""Match detections to ground truth and compute the miss-rate curve, for all protocols.

In each image, detections are processed by descending score. A detection takes the unmatched ground-truth box with the
highest IoU that reaches the threshold; among equal IoUs the last in the list wins. If there is none, the detection may
fall into an ignore region: intersection over the detection's area reaches the threshold. An ignore region accepts any
number of detections, and they count neither as true nor as false positives.

MR^-2 (Dollár et al. 2012) is the geometric mean of the miss rate at nine points of false positives per image (FPPI).
The operating point is the score threshold with the highest F1 score on that curve.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics.tables import DetectionTable, Floats, GroundTruthTable

IGNORED, FALSE_POSITIVE, TRUE_POSITIVE = -1, 0, 1
NO_GROUND_TRUTH = -1.0  # the mark of the official CityPersons program and of COCO
MAX_PAIRS_PER_CHUNK = 1 << 21  # limits memory to about 200 MiB for any number of detections


@dataclass(frozen=True, eq=False)
class OverlapPairs:
    """Pairs of a detection and a ground-truth box of the same image that overlap, P in all.

    Attributes:
        detection_index (int array[P]): Row of the detection in its table.
        gt_index (int array[P]): Row of the ground-truth box in its table.
        iou (float64 array[P]): Intersection over union, 0 to 1.
        ioa (float64 array[P]): Intersection over the detection's area, 0 to 1, with the box as an ignore region.
    """

    detection_index: NDArray[np.intp]
    gt_index: NDArray[np.intp]
    iou: Floats
    ioa: Floats


@dataclass(frozen=True, eq=False)
class CountedDetections:
    """True and false positives of one setup by descending score, D in all, for resampling of images.

    Attributes:
        image_index (int array[D]): Image of each detection, 0 to `num_images` - 1.
        is_true_positive (bool array[D]): False for a false positive.
        gt_per_image (int array[num_images]): Number of ground-truth boxes of each image in the setup.
        fppi_points: False positives per image of MR^-2.
        zero_recall_before_curve: Recall below the first FPPI of the curve: 0 if true, otherwise the last recall.
    """

    image_index: NDArray[np.int32]
    is_true_positive: NDArray[np.bool_]
    gt_per_image: NDArray[np.intp]
    fppi_points: tuple[float, ...]
    zero_recall_before_curve: bool


@dataclass(frozen=True, eq=False)
class MissRateResult:
    """Log-average miss rate of one setup and its curve.

    Attributes:
        value: MR^-2 as a fraction, or `NO_GROUND_TRUTH` (-1) if the setup contains no ground-truth box.
        fppi (float64 array[D]): False positives per image after each counted detection, by descending score.
        miss_rate (float64 array[D]): Miss rate at the same places, 0 to 1.
        scores (float64 array[D]): Scores at the same places.
        num_gt: Number of ground-truth boxes in the setup.
        num_images: Number of evaluated images.
        counted: The detections of the curve, for resampling of images.
    """

    value: float
    fppi: Floats
    miss_rate: Floats
    scores: Floats
    num_gt: int
    num_images: int
    counted: CountedDetections


def compute_overlaps(
    detections: DetectionTable,
    gt_image_index: NDArray[np.intp],
    gt_boxes_xywh: Floats,
    ignore_boxes_xywh: Floats,
    min_overlap: float,
) -> OverlapPairs:
    """Compute all pairs whose IoU or IoA reaches a minimum.

    Args:
        detections: All detections of the dataset.
        gt_image_index (int array[N]): Image of each ground-truth box.
        gt_boxes_xywh (float64 array[N, 4]): Boxes that are compared by IoU. Some protocols reshape them.
        ignore_boxes_xywh (float64 array[N, 4]): The same boxes as ignore regions, compared by IoA.
        min_overlap: Smallest IoU or IoA to keep, 0 to 1.

    Returns:
        The pairs, ordered by detection.
    """
    order = np.argsort(gt_image_index, kind="stable")
    first = np.searchsorted(gt_image_index[order], detections.image_index, side="left")
    num_pairs = np.searchsorted(gt_image_index[order], detections.image_index, side="right") - first
    left, right = _compute_x_limits(detections.boxes_xywh)
    box_left, box_right = _compute_x_limits(gt_boxes_xywh)
    ignore_left, ignore_right = _compute_x_limits(ignore_boxes_xywh)
    gt_left, gt_right = np.minimum(box_left, ignore_left), np.maximum(box_right, ignore_right)
    chunks = []
    for start, stop in _iterate_chunks(num_pairs):
        counts = num_pairs[start:stop]
        detection_index = np.repeat(np.arange(start, stop), counts)
        offset = np.arange(len(detection_index)) - np.repeat(np.cumsum(counts) - counts, counts)
        gt_index = order[np.repeat(first[start:stop], counts) + offset]
        # Most boxes of an image do not overlap in x; this test is cheaper than the areas.
        overlaps_x = (left[detection_index] < gt_right[gt_index]) & (gt_left[gt_index] < right[detection_index])
        chunks.append(
            _filter_overlapping(
                detections,
                detection_index[overlaps_x],
                gt_index[overlaps_x],
                gt_boxes_xywh,
                ignore_boxes_xywh,
                min_overlap,
            )
        )
    return _concatenate_pairs(chunks)


def match_detections(
    pairs: OverlapPairs, eval_mask: NDArray[np.bool_], gt_ignore: NDArray[np.bool_], min_overlap: float
) -> tuple[NDArray[np.int8], NDArray[np.intp]]:
    """Match detections to ground-truth boxes.

    Args:
        pairs: Overlaps from `compute_overlaps`, computed with a minimum of at most `min_overlap`.
        eval_mask (bool array[D]): Detections that are evaluated.
        gt_ignore (bool array[N]): Ground-truth boxes that are ignore regions in this setup.
        min_overlap: Threshold of IoU and IoA, 0 to 1.

    Returns:
        match_status (int8 array[D]): `TRUE_POSITIVE`, `FALSE_POSITIVE` or `IGNORED`.
        matched_gt (int array[D]): Row of the matched ground-truth box, -1 without a match.
    """
    is_evaluated, is_ignore_region = eval_mask[pairs.detection_index], gt_ignore[pairs.gt_index]
    matched_gt = np.full(len(eval_mask), -1, np.intp)
    in_ignore_region = np.flatnonzero(is_evaluated & is_ignore_region & (pairs.ioa >= min_overlap))
    matched_gt[pairs.detection_index[in_ignore_region]] = pairs.gt_index[in_ignore_region]
    match_status = np.where(matched_gt >= 0, IGNORED, FALSE_POSITIVE).astype(np.int8)
    candidates = np.flatnonzero(is_evaluated & ~is_ignore_region & (pairs.iou >= min_overlap))
    # Per detection by descending IoU, then by descending row: the last of equal overlaps comes first.
    order = np.lexsort((-pairs.gt_index[candidates], -pairs.iou[candidates], pairs.detection_index[candidates]))
    candidates = candidates[order]
    matched_rows: set[int] = set()
    last_matched = -1
    for detection, gt in zip(
        pairs.detection_index[candidates].tolist(), pairs.gt_index[candidates].tolist(), strict=True
    ):
        if detection != last_matched and gt not in matched_rows:
            matched_rows.add(gt)
            last_matched = detection
            match_status[detection], matched_gt[detection] = TRUE_POSITIVE, gt
    return match_status, matched_gt


def compute_miss_rate(
    ground_truth: GroundTruthTable,
    gt_ignore: NDArray[np.bool_],
    detections: DetectionTable,
    match_status: NDArray[np.int8],
    order: NDArray[np.intp],
    fppi_points: Sequence[float],
    zero_recall_before_curve: bool,
) -> MissRateResult:
    """Accumulate true and false positives over descending scores and compute MR^-2.

    Args:
        ground_truth: Ground truth of all images.
        gt_ignore (bool array[N]): Ground-truth boxes that are ignore regions in this setup.
        detections: Detections in the same images.
        match_status (int8 array[D]): Result of `match_detections`.
        order (int array[K]): Rows of the evaluated detections, by descending score.
        fppi_points: False positives per image, usually nine values from 0.01 to 1.
        zero_recall_before_curve: Use recall 0 at FPPI points below the first FPPI of the curve, otherwise the last
            recall of the curve.

    Returns:
        The result with its curve, without the ignored detections.
    """
    rows = order[match_status[order] != IGNORED]
    num_images = ground_truth.num_images
    counted = CountedDetections(
        detections.image_index[rows].astype(np.int32),
        match_status[rows] == TRUE_POSITIVE,
        np.bincount(ground_truth.image_index[~gt_ignore], minlength=num_images),
        tuple(fppi_points),
        zero_recall_before_curve,
    )
    num_gt = int(counted.gt_per_image.sum())
    recall = np.cumsum(counted.is_true_positive) / max(1, num_gt)
    fppi = np.cumsum(~counted.is_true_positive) / max(1, num_images)
    value = log_average_miss_rate(recall, fppi, fppi_points, zero_recall_before_curve) if num_gt else NO_GROUND_TRUTH
    return MissRateResult(value, fppi, 1 - recall, detections.scores[rows], num_gt, num_images, counted)


def log_average_miss_rate(
    recall: Floats, fppi: Floats, fppi_points: Sequence[float], zero_recall_before_curve: bool
) -> float:
    """Compute MR^-2, the geometric mean of the miss rate at the FPPI points.

    The recall at a point is that of the last detection with an FPPI of at most the point.

    Args:
        recall (float64 array[D]): Recall after each counted detection, by descending score.
        fppi (float64 array[D]): False positives per image at the same places.
        fppi_points: False positives per image, usually nine values from 0.01 to 1.
        zero_recall_before_curve: Use recall 0 at points below the first FPPI of the curve, otherwise the last recall.

    Returns:
        The miss rate as a fraction. 1 for an empty curve, 0 if the miss rate is 0 at any point.
    """
    if not len(recall):
        return 1.0
    last = np.searchsorted(fppi, np.asarray(fppi_points), side="right") - 1
    missed = 1 - np.where(last >= 0, recall[last], 0.0 if zero_recall_before_curve else recall[-1])
    return 0.0 if (missed <= 0).any() else float(np.exp(np.log(missed).mean()))


def _compute_x_limits(boxes_xywh: Floats) -> tuple[Floats, Floats]:
    return np.ascontiguousarray(boxes_xywh[:, 0]), boxes_xywh[:, 0] + boxes_xywh[:, 2]


def _iterate_chunks(pair_counts: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """Split the detections into ranges of about MAX_PAIRS_PER_CHUNK pairs."""
    ends, start = np.cumsum(pair_counts), 0
    while start < len(pair_counts):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + MAX_PAIRS_PER_CHUNK, side="right")))
        yield start, stop
        start = stop


def _filter_overlapping(
    detections: DetectionTable,
    detection_index: NDArray[np.intp],
    gt_index: NDArray[np.intp],
    gt_boxes_xywh: Floats,
    ignore_boxes_xywh: Floats,
    min_overlap: float,
) -> OverlapPairs:
    boxes, gt_boxes = detections.boxes_xywh[detection_index], gt_boxes_xywh[gt_index]
    intersection, area = _compute_intersection(boxes, gt_boxes), boxes[:, 2] * boxes[:, 3]
    iou = _divide_or_zero(intersection, area + gt_boxes[:, 2] * gt_boxes[:, 3] - intersection)
    ioa = _divide_or_zero(_compute_intersection(boxes, ignore_boxes_xywh[gt_index]), area)
    keep = (iou >= min_overlap) | (ioa >= min_overlap)
    return OverlapPairs(detection_index[keep], gt_index[keep], iou[keep], ioa[keep])


def _compute_intersection(detection_boxes_xywh: Floats, gt_boxes_xywh: Floats) -> Floats:
    """Compute intersection areas [P], with the operations in the order of the official programs."""
    width = np.minimum(
        detection_boxes_xywh[:, 0] + detection_boxes_xywh[:, 2], gt_boxes_xywh[:, 0] + gt_boxes_xywh[:, 2]
    ) - np.maximum(detection_boxes_xywh[:, 0], gt_boxes_xywh[:, 0])
    height = np.minimum(
        detection_boxes_xywh[:, 1] + detection_boxes_xywh[:, 3], gt_boxes_xywh[:, 1] + gt_boxes_xywh[:, 3]
    ) - np.maximum(detection_boxes_xywh[:, 1], gt_boxes_xywh[:, 1])
    return np.where((width > 0) & (height > 0), width * height, 0.0)


def _divide_or_zero(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=numerator > 0)


def _concatenate_pairs(chunks: list[OverlapPairs]) -> OverlapPairs:
    no_index, no_value = np.zeros(0, np.intp), np.zeros(0)
    return OverlapPairs(
        np.concatenate([chunk.detection_index for chunk in chunks] or [no_index]),
        np.concatenate([chunk.gt_index for chunk in chunks] or [no_index]),
        np.concatenate([chunk.iou for chunk in chunks] or [no_value]),
        np.concatenate([chunk.ioa for chunk in chunks] or [no_value]),
    )


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
