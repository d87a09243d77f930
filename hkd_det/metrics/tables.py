"""What is judged: all truths and all detections of a data set, in columns.

In double precision and as x, y, width, height, because the official programs reckon so: whether an overlap is
just a half, or a height just 50, decides who counts. In columns, because ten million detections have to fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.datasets.sample import Truth
from hkd_det.detections import Detections

Floats = NDArray[np.float64]
FARTHEST_PX = 1e100  # beyond it areas are too large for a number


def are_boxes(boxes_xywh: Floats) -> NDArray[np.bool_]:
    """[N] whether a row [N, 4] from a file can be reckoned with: no NaN or infinity, sizes from 0."""
    left, top, width, height = boxes_xywh.T
    near = (np.abs(left) <= FARTHEST_PX) & (np.abs(top) <= FARTHEST_PX)
    return near & (width >= 0) & (width <= FARTHEST_PX) & (height >= 0) & (height <= FARTHEST_PX)


@dataclass(frozen=True, eq=False)
class TruthTable:
    """People and ignore regions of a data set, N in all, in each picture in the order of their file.

    pictures: evaluated, those without people included. picture: [N] int, 0..pictures-1. boxes_xywh: [N, 4] float64.
    height_px, visibility: [N] float64, as annotated; visibility is inf where a protocol says so of people who are not
    occluded. ignore: [N] bool, not to be found in any setup.
    """

    pictures: int
    picture: NDArray[np.intp]
    boxes_xywh: Floats
    height_px: Floats
    visibility: Floats
    ignore: NDArray[np.bool_]

    def __post_init__(self) -> None:
        count = len(self.picture)
        columns = (self.height_px, self.visibility, self.ignore)
        if self.boxes_xywh.shape != (count, 4) or any(column.shape != (count,) for column in columns):
            raise ValueError("the columns of a TruthTable must be of one length")

    @classmethod
    def of(cls, truths: Sequence[Truth]) -> "TruthTable":
        """From the truths of all pictures, in order."""
        whole = _joined([truth.boxes_xyxy for truth in truths], 4)
        return cls(
            len(truths),
            np.repeat(np.arange(len(truths)), [len(truth) for truth in truths]),
            box_math.xywh_from_xyxy(whole).astype(np.float64),
            whole[:, 3] - whole[:, 1],
            np.concatenate([truth.visibility for truth in truths] or [np.zeros(0)]),
            np.concatenate([truth.ignore for truth in truths] or [np.zeros(0, bool)]),
        )


@dataclass(frozen=True, eq=False)
class DetectionTable:
    """Detections of a data set, D in all, picture by picture, in each the best first; made by `DetectionTable.sort`.

    picture: [D] int. boxes_xywh: [D, 4] float64. scores: [D] float64, of any range: only their order counts.
    row: [D] int, where each stood before it was sorted.
    """

    picture: NDArray[np.intp]
    boxes_xywh: Floats
    scores: Floats
    row: NDArray[np.intp]

    @classmethod
    def sort(cls, picture: NDArray[np.intp], boxes_xywh: Floats, scores: Floats) -> "DetectionTable":
        """From rows in any order; equal scores of a picture keep theirs."""
        order = np.lexsort((-scores, picture))
        return cls(picture[order], boxes_xywh[order], scores[order], order)

    @classmethod
    def of(cls, detections: Sequence[Detections]) -> "DetectionTable":
        """From the detections of all pictures, in order."""
        return cls.sort(
            np.repeat(np.arange(len(detections)), [len(found) for found in detections]),
            box_math.xywh_from_xyxy(_joined([found.boxes_xyxy for found in detections], 4)).astype(np.float64),
            _joined([found.scores for found in detections]),
        )

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, kept: NDArray[np.bool_]) -> "DetectionTable":
        """Those where `kept` [D] bool is true."""
        return DetectionTable(self.picture[kept], self.boxes_xywh[kept], self.scores[kept], self.row[kept])

    def rank(self) -> NDArray[np.intp]:
        """[D] how many better ones of its picture stand before each."""
        starts = np.flatnonzero(np.diff(self.picture, prepend=-1))
        lengths = np.diff(starts, append=len(self))
        return np.arange(len(self)) - np.repeat(starts, lengths)


def _joined(parts: Sequence[NDArray[np.float32]], *shape: int) -> Floats:
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros((0, *shape))
