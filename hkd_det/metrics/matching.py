"""Which detection found whom: the matching that all miss-rate protocols share.

Picture by picture, detections best first: each takes the free person it overlaps most (IoU; of equal overlaps the
later in the list), if that reaches the threshold. One that finds nobody free may fall into an ignored truth
(intersection over the detection's own area), of which any number may; it then counts neither way.

Miss rate against false positives per picture (FPPI), and MR^-2: its geometric mean over nine FPPI points.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics.tables import DetectionTable, Floats

IGNORED, FALSE_POSITIVE, TRUE_POSITIVE = -1, 0, 1


MAX_PAIRS_PER_CHUNK = 1 << 21  # bounds the memory, some 200 MiB, however many detections there are


@dataclass(frozen=True, eq=False)
class OverlapPairs:
    """Detections and truths of the same picture that overlap, P in all.

    detection, truth: [P] indices into their tables. iou: [P] with the truth as a person. share: [P] of the detection's
    own area inside the truth as an ignore region.
    """

    detection_index: NDArray[np.intp]
    gt_index: NDArray[np.intp]
    iou: Floats
    ioa: Floats


def compute_overlaps(
    detections: DetectionTable,
    gt_image_index: NDArray[np.intp],
    gt_boxes_xywh: Floats,
    ignore_boxes_xywh: Floats,
    min_overlap: float,
) -> OverlapPairs:
    """All pairs whose IoU or share is at least `least`.

    picture: [N], of each truth. people_xywh, regions_xywh: [N, 4], the truths' boxes as people and as ignore regions:
    some protocols reshape the first.
    """
    order = np.argsort(gt_image_index, kind="stable")
    first = np.searchsorted(gt_image_index[order], detections.image_index, side="left")
    count = np.searchsorted(gt_image_index[order], detections.image_index, side="right") - first
    left, right = _compute_x_limits(detections.boxes_xywh)
    people_left, people_right = _compute_x_limits(gt_boxes_xywh)
    regions_left, regions_right = _compute_x_limits(ignore_boxes_xywh)
    truth_left, truth_right = np.minimum(people_left, regions_left), np.maximum(people_right, regions_right)
    parts = []
    for start, stop in _iterate_chunks(count):
        sizes = count[start:stop]
        detection = np.repeat(np.arange(start, stop), sizes)
        within = np.arange(len(detection)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        truth = order[np.repeat(first[start:stop], sizes) + within]
        # Most stand beside each other: that is cheap to see.
        meet = (left[detection] < truth_right[truth]) & (truth_left[truth] < right[detection])
        parts.append(
            _filter_overlapping(detections, detection[meet], truth[meet], gt_boxes_xywh, ignore_boxes_xywh, min_overlap)
        )
    return _concatenate_pairs(parts)


def _compute_x_limits(boxes_xywh: Floats) -> tuple[Floats, Floats]:
    return np.ascontiguousarray(boxes_xywh[:, 0]), boxes_xywh[:, 0] + boxes_xywh[:, 2]


def _iterate_chunks(pair_counts: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """Ranges of detections that have some PAIRS_AT_ONCE pairs together."""
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
    """Of these pairs those that overlap by `least`."""
    found, people = detections.boxes_xywh[detection_index], gt_boxes_xywh[gt_index]
    shared, own = _compute_intersection(found, people), found[:, 2] * found[:, 3]
    iou = _divide_or_zero(shared, own + people[:, 2] * people[:, 3] - shared)
    share = _divide_or_zero(_compute_intersection(found, ignore_boxes_xywh[gt_index]), own)
    near = (iou >= min_overlap) | (share >= min_overlap)
    return OverlapPairs(detection_index[near], gt_index[near], iou[near], share[near])


def match_detections(
    pairs: OverlapPairs, eval_mask: NDArray[np.bool_], gt_ignore: NDArray[np.bool_], min_overlap: float
) -> tuple[NDArray[np.int8], NDArray[np.intp]]:
    """Verdict [D] (TRUE, FALSE or IGNORED) and partner [D] (index of the truth taken, -1 for none) of each detection.

    kept: [D] bool, the detections that take part. ignored: [N] bool, the truths not to be found.
    """
    takes_part, region = eval_mask[pairs.detection_index], gt_ignore[pairs.gt_index]
    partner = np.full(len(eval_mask), -1, np.intp)
    inside = np.flatnonzero(takes_part & region & (pairs.ioa >= min_overlap))
    partner[pairs.detection_index[inside]] = pairs.gt_index[inside]
    verdict = np.where(partner >= 0, IGNORED, FALSE_POSITIVE).astype(np.int8)
    wanted = np.flatnonzero(takes_part & ~region & (pairs.iou >= min_overlap))
    wanted = wanted[np.lexsort((-pairs.gt_index[wanted], -pairs.iou[wanted], pairs.detection_index[wanted]))]
    taken: set[int] = set()
    served = -1
    for detection, truth in zip(pairs.detection_index[wanted].tolist(), pairs.gt_index[wanted].tolist(), strict=True):
        if detection != served and truth not in taken:
            taken.add(truth)
            served = detection
            verdict[detection], partner[detection] = TRUE_POSITIVE, truth
    return verdict, partner


def _compute_intersection(detection_boxes_xywh: Floats, gt_boxes_xywh: Floats) -> Floats:
    """[P] shared areas, reckoned in the order of the official programs."""
    width = np.minimum(
        detection_boxes_xywh[:, 0] + detection_boxes_xywh[:, 2], gt_boxes_xywh[:, 0] + gt_boxes_xywh[:, 2]
    ) - np.maximum(detection_boxes_xywh[:, 0], gt_boxes_xywh[:, 0])
    height = np.minimum(
        detection_boxes_xywh[:, 1] + detection_boxes_xywh[:, 3], gt_boxes_xywh[:, 1] + gt_boxes_xywh[:, 3]
    ) - np.maximum(detection_boxes_xywh[:, 1], gt_boxes_xywh[:, 1])
    return np.where((width > 0) & (height > 0), width * height, 0.0)


def _divide_or_zero(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=numerator > 0)


def _concatenate_pairs(parts: list[OverlapPairs]) -> OverlapPairs:
    none, nothing = np.zeros(0, np.intp), np.zeros(0)
    return OverlapPairs(
        np.concatenate([part.detection_index for part in parts] or [none]),
        np.concatenate([part.gt_index for part in parts] or [none]),
        np.concatenate([part.iou for part in parts] or [nothing]),
        np.concatenate([part.ioa for part in parts] or [nothing]),
    )


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
