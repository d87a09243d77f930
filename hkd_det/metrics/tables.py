"""What is judged: all truths and all detections of a data set, in columns.

In double precision and as x, y, width, height, because the official programs reckon so: whether an overlap is
just a half, or a height just 50, decides who counts. In columns, because ten million detections have to fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.structures import Detections, GroundTruth

Floats = NDArray[np.float64]
MAX_BOX_VALUE_PX = 1e100  # beyond it areas are too large for a number


def is_valid_box(boxes_xywh: Floats) -> NDArray[np.bool_]:
    """[N] whether a row [N, 4] from a file can be reckoned with: no NaN or infinity, sizes from 0."""
    left, top, width, height = boxes_xywh.T
    near = (np.abs(left) <= MAX_BOX_VALUE_PX) & (np.abs(top) <= MAX_BOX_VALUE_PX)
    return near & (width >= 0) & (width <= MAX_BOX_VALUE_PX) & (height >= 0) & (height <= MAX_BOX_VALUE_PX)


@dataclass(frozen=True, eq=False)
class GroundTruthTable:
    """People and ignore regions of a data set, N in all, in each picture in the order of their file.

    pictures: evaluated, those without people included. picture: [N] int, 0..pictures-1. boxes_xywh: [N, 4] float64.
    height_px, visibility: [N] float64, as annotated; visibility is inf where a protocol says so of people who are not
    occluded. ignore: [N] bool, not to be found in any setup.
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
            raise ValueError("the columns of a TruthTable must be of one length")

    @classmethod
    def from_samples(cls, ground_truths: Sequence[GroundTruth]) -> "GroundTruthTable":
        """From the truths of all pictures, in order."""
        whole = _concatenate_arrays([truth.boxes_xyxy for truth in ground_truths], 4)
        return cls(
            len(ground_truths),
            np.repeat(np.arange(len(ground_truths)), [len(truth) for truth in ground_truths]),
            box_math.xywh_from_xyxy(whole).astype(np.float64),
            whole[:, 3] - whole[:, 1],
            np.concatenate([truth.visible_ratio for truth in ground_truths] or [np.zeros(0)]),
            np.concatenate([truth.ignore for truth in ground_truths] or [np.zeros(0, bool)]),
        )


@dataclass(frozen=True, eq=False)
class DetectionTable:
    """Detections of a data set, D in all, picture by picture, in each the best first; made by `DetectionTable.sort`.

    picture: [D] int. boxes_xywh: [D, 4] float64. scores: [D] float64, of any range: only their order counts.
    row: [D] int, where each stood before it was sorted.
    """

    image_index: NDArray[np.intp]
    boxes_xywh: Floats
    scores: Floats
    source_row: NDArray[np.intp]

    @classmethod
    def from_rows(cls, image_index: NDArray[np.intp], boxes_xywh: Floats, scores: Floats) -> "DetectionTable":
        """From rows in any order; equal scores of a picture keep theirs."""
        order = np.lexsort((-scores, image_index))
        return cls(image_index[order], boxes_xywh[order], scores[order], order)

    @classmethod
    def from_detections(cls, detections: Sequence[Detections]) -> "DetectionTable":
        """From the detections of all pictures, in order."""
        return cls.from_rows(
            np.repeat(np.arange(len(detections)), [len(found) for found in detections]),
            box_math.xywh_from_xyxy(_concatenate_arrays([found.boxes_xyxy for found in detections], 4)).astype(
                np.float64
            ),
            _concatenate_arrays([found.scores for found in detections]),
        )

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, eval_mask: NDArray[np.bool_]) -> "DetectionTable":
        """Those where `kept` [D] bool is true."""
        return DetectionTable(
            self.image_index[eval_mask], self.boxes_xywh[eval_mask], self.scores[eval_mask], self.source_row[eval_mask]
        )

    def rank_per_image(self) -> NDArray[np.intp]:
        """[D] how many better ones of its picture stand before each."""
        starts = np.flatnonzero(np.diff(self.image_index, prepend=-1))
        lengths = np.diff(starts, append=len(self))
        return np.arange(len(self)) - np.repeat(starts, lengths)


def _concatenate_arrays(parts: Sequence[NDArray[np.float32]], *shape: int) -> Floats:
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros((0, *shape))
