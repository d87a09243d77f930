"""Which detection found whom: the matching that all miss-rate protocols share.

Picture by picture, detections best first: each takes the free person it overlaps most (IoU; of equal overlaps the
later in the list), if that reaches the threshold. One that finds nobody free may fall into an ignored truth
(intersection over the detection's own area), of which any number may; it then counts neither way.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics.tables import DetectionTable, Floats

IGNORED, FALSE, TRUE = -1, 0, 1
PAIRS_AT_ONCE = 1 << 21  # bounds the memory, some 200 MiB, however many detections there are


@dataclass(frozen=True, eq=False)
class Pairs:
    """Detections and truths of the same picture that overlap, P in all.

    detection, truth: [P] indices into their tables. iou: [P] with the truth as a person. share: [P] of the detection's
    own area inside the truth as an ignore region.
    """

    detection: NDArray[np.intp]
    truth: NDArray[np.intp]
    iou: Floats
    share: Floats


def overlapping(
    detections: DetectionTable, picture: NDArray[np.intp], people_xywh: Floats, regions_xywh: Floats, least: float
) -> Pairs:
    """All pairs whose IoU or share is at least `least`.

    picture: [N], of each truth. people_xywh, regions_xywh: [N, 4], the truths' boxes as people and as ignore regions:
    some protocols reshape the first.
    """
    order = np.argsort(picture, kind="stable")
    first = np.searchsorted(picture[order], detections.picture, side="left")
    count = np.searchsorted(picture[order], detections.picture, side="right") - first
    left, right = _sides(detections.boxes_xywh)
    people_left, people_right = _sides(people_xywh)
    regions_left, regions_right = _sides(regions_xywh)
    truth_left, truth_right = np.minimum(people_left, regions_left), np.maximum(people_right, regions_right)
    parts = []
    for start, stop in _chunks(count):
        sizes = count[start:stop]
        detection = np.repeat(np.arange(start, stop), sizes)
        within = np.arange(len(detection)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        truth = order[np.repeat(first[start:stop], sizes) + within]
        # Most stand beside each other: that is cheap to see.
        meet = (left[detection] < truth_right[truth]) & (truth_left[truth] < right[detection])
        parts.append(_near(detections, detection[meet], truth[meet], people_xywh, regions_xywh, least))
    return _joined(parts)


def _sides(boxes_xywh: Floats) -> tuple[Floats, Floats]:
    return np.ascontiguousarray(boxes_xywh[:, 0]), boxes_xywh[:, 0] + boxes_xywh[:, 2]


def _chunks(count: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """Ranges of detections that have some PAIRS_AT_ONCE pairs together."""
    ends, start = np.cumsum(count), 0
    while start < len(count):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")))
        yield start, stop
        start = stop


def _near(
    detections: DetectionTable,
    detection: NDArray[np.intp],
    truth: NDArray[np.intp],
    people_xywh: Floats,
    regions_xywh: Floats,
    least: float,
) -> Pairs:
    """Of these pairs those that overlap by `least`."""
    found, people = detections.boxes_xywh[detection], people_xywh[truth]
    shared, own = _shared(found, people), found[:, 2] * found[:, 3]
    iou = _over(shared, own + people[:, 2] * people[:, 3] - shared)
    share = _over(_shared(found, regions_xywh[truth]), own)
    near = (iou >= least) | (share >= least)
    return Pairs(detection[near], truth[near], iou[near], share[near])


def match(
    pairs: Pairs, kept: NDArray[np.bool_], ignored: NDArray[np.bool_], least: float
) -> tuple[NDArray[np.int8], NDArray[np.intp]]:
    """Verdict [D] (TRUE, FALSE or IGNORED) and partner [D] (index of the truth taken, -1 for none) of each detection.

    kept: [D] bool, the detections that take part. ignored: [N] bool, the truths not to be found.
    """
    takes_part, region = kept[pairs.detection], ignored[pairs.truth]
    partner = np.full(len(kept), -1, np.intp)
    inside = np.flatnonzero(takes_part & region & (pairs.share >= least))
    partner[pairs.detection[inside]] = pairs.truth[inside]
    verdict = np.where(partner >= 0, IGNORED, FALSE).astype(np.int8)
    wanted = np.flatnonzero(takes_part & ~region & (pairs.iou >= least))
    wanted = wanted[np.lexsort((-pairs.truth[wanted], -pairs.iou[wanted], pairs.detection[wanted]))]
    taken: set[int] = set()
    served = -1
    for detection, truth in zip(pairs.detection[wanted].tolist(), pairs.truth[wanted].tolist(), strict=True):
        if detection != served and truth not in taken:
            taken.add(truth)
            served = detection
            verdict[detection], partner[detection] = TRUE, truth
    return verdict, partner


def _shared(found: Floats, truth: Floats) -> Floats:
    """[P] shared areas, reckoned in the order of the official programs."""
    width = np.minimum(found[:, 0] + found[:, 2], truth[:, 0] + truth[:, 2]) - np.maximum(found[:, 0], truth[:, 0])
    height = np.minimum(found[:, 1] + found[:, 3], truth[:, 1] + truth[:, 3]) - np.maximum(found[:, 1], truth[:, 1])
    return np.where((width > 0) & (height > 0), width * height, 0.0)


def _over(shared: Floats, whole: Floats) -> Floats:
    return np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)


def _joined(parts: list[Pairs]) -> Pairs:
    none, nothing = np.zeros(0, np.intp), np.zeros(0)
    return Pairs(
        np.concatenate([part.detection for part in parts] or [none]),
        np.concatenate([part.truth for part in parts] or [none]),
        np.concatenate([part.iou for part in parts] or [nothing]),
        np.concatenate([part.share for part in parts] or [nothing]),
    )
