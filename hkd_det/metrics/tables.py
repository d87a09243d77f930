"""Tables that the metrics read: all ground truth and all detections of a dataset, one row per box.

Boxes are float64 xywh, as in the official programs. Rounding decides whether an overlap of exactly 0.5 or a height of
exactly 50 counts. A table of columns holds ten million detections in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.structures import Detections, GroundTruth, xywh_from_xyxy

Floats = NDArray[np.float64]
MAX_BOX_VALUE = 1e100  # the area of a larger box overflows


def is_valid_box(boxes_xywh: Floats) -> NDArray[np.bool_]:
    """Check boxes from a file.

    Args:
        boxes_xywh (float64 array[N, 4]): Boxes in pixels.

    Returns:
        valid (bool array[N]): True for finite values and sizes of at least 0.
    """
    left, top, width, height = boxes_xywh.T
    is_finite = (np.abs(left) <= MAX_BOX_VALUE) & (np.abs(top) <= MAX_BOX_VALUE)
    return is_finite & (width >= 0) & (width <= MAX_BOX_VALUE) & (height >= 0) & (height <= MAX_BOX_VALUE)


@dataclass(frozen=True, eq=False)
class GroundTruthTable:
    """Ground-truth boxes and ignore regions of a dataset, N in all, per image in file order.

    Attributes:
        num_images: Number of evaluated images, including those without boxes.
        image_index (int array[N]): Image of each box, 0 to `num_images` - 1.
        boxes_xywh (float64 array[N, 4]): xywh, pixels.
        height_px (float64 array[N]): Annotated height in pixels. It can differ from the box height.
        visible_ratio (float64 array[N]): Visible part of the box, 0 to 1. The original Caltech protocol uses inf for
            boxes that are not occluded.
        ignore (bool array[N]): True for ignore regions of every setup.
    """

    num_images: int
    image_index: NDArray[np.intp]
    boxes_xywh: Floats
    height_px: Floats
    visible_ratio: Floats
    ignore: NDArray[np.bool_]

    def __post_init__(self) -> None:
        count = len(self.image_index)
        columns = (self.height_px, self.visible_ratio, self.ignore)
        if self.boxes_xywh.shape != (count, 4) or any(column.shape != (count,) for column in columns):
            raise ValueError("GroundTruthTable: expected columns of equal length")

    @classmethod
    def from_samples(cls, ground_truths: Sequence[GroundTruth]) -> "GroundTruthTable":
        """Build the table from the ground truth of each image, in order.

        Args:
            ground_truths: Ground truth of each image.

        Returns:
            The table.
        """
        boxes_xyxy = _concatenate_arrays([ground_truth.boxes_xyxy for ground_truth in ground_truths], 4)
        return cls(
            len(ground_truths),
            np.repeat(np.arange(len(ground_truths)), [len(ground_truth) for ground_truth in ground_truths]),
            xywh_from_xyxy(boxes_xyxy).astype(np.float64),
            boxes_xyxy[:, 3] - boxes_xyxy[:, 1],
            np.concatenate([ground_truth.visible_ratio for ground_truth in ground_truths] or [np.zeros(0)]),
            np.concatenate([ground_truth.ignore for ground_truth in ground_truths] or [np.zeros(0, bool)]),
        )


@dataclass(frozen=True, eq=False)
class DetectionTable:
    """Detections of a dataset, D in all, sorted by image and descending score.

    Use `from_rows` or `from_detections` to build a sorted table.

    Attributes:
        image_index (int array[D]): Image of each detection.
        boxes_xywh (float64 array[D, 4]): xywh, pixels.
        scores (float64 array[D]): Any range; only the order matters.
        source_row (int array[D]): Row of each detection before sorting.
    """

    image_index: NDArray[np.intp]
    boxes_xywh: Floats
    scores: Floats
    source_row: NDArray[np.intp]

    @classmethod
    def from_rows(cls, image_index: NDArray[np.intp], boxes_xywh: Floats, scores: Floats) -> "DetectionTable":
        """Sort rows by image and descending score; equal scores keep their order.

        Args:
            image_index (int array[D]): Image of each detection.
            boxes_xywh (float64 array[D, 4]): xywh, pixels.
            scores (float64 array[D]): Scores.

        Returns:
            The sorted table.
        """
        order = np.lexsort((-scores, image_index))
        return cls(image_index[order], boxes_xywh[order], scores[order], order)

    @classmethod
    def from_detections(cls, detections: Sequence[Detections]) -> "DetectionTable":
        """Build the table from the detections of each image, in order.

        Args:
            detections: Detections of each image.

        Returns:
            The table.
        """
        boxes_xyxy = _concatenate_arrays([image.boxes_xyxy for image in detections], 4)
        return cls.from_rows(
            np.repeat(np.arange(len(detections)), [len(image) for image in detections]),
            xywh_from_xyxy(boxes_xyxy).astype(np.float64),
            _concatenate_arrays([image.scores for image in detections]),
        )

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, mask: NDArray[np.bool_]) -> "DetectionTable":
        """Return the rows where `mask` (bool array[D]) is true.

        Args:
            mask (bool array[D]): Rows to keep.
        """
        return DetectionTable(self.image_index[mask], self.boxes_xywh[mask], self.scores[mask], self.source_row[mask])

    def rank_per_image(self) -> NDArray[np.intp]:
        """Return the rank of each detection in its image, int array[D], 0 for the highest score."""
        starts = np.flatnonzero(np.diff(self.image_index, prepend=-1))
        lengths = np.diff(starts, append=len(self))
        return np.arange(len(self)) - np.repeat(starts, lengths)


def _concatenate_arrays(parts: Sequence[NDArray[np.float32]], *shape: int) -> Floats:
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros((0, *shape))
