"""`FrameBoxes`: what Caltech's annotations say about one frame, in the numbers of the file.

The official miss rate is reckoned from just these numbers: 1-based pixels, in double precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_COORDINATE_PX = 2.0**24  # whole pixels beyond it are not exact in float32


@dataclass(frozen=True, eq=False)
class FrameAnnotations:
    """The objects of one frame, in the order of the file.

    labels: N names ("person", "people", "person?", "person-fa", "ignore").
    boxes_xywh: [N, 4] float64, 1-based pixels: the whole object, hidden parts included.
    visible_xywh: [N, 4] float64, 1-based pixels: what can be seen of it; all zero where nobody marked it.
    occluded, ignore: [N] bool: the file's own flags.
    objects: [N] int64: the same number is the same person in all frames of a film; -1 where the file does not say.
    lines: the N lines of a text file, counted from 1; none for another file.
    """

    labels: tuple[str, ...]
    boxes_xywh: NDArray[np.float64]
    visible_xywh: NDArray[np.float64]
    occluded: NDArray[np.bool_]
    ignore: NDArray[np.bool_]
    object_ids: NDArray[np.int64]
    line_numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.labels)
        boxes, flags = (self.boxes_xywh, self.visible_xywh), (self.occluded, self.ignore, self.object_ids)
        if any(one.shape != (count, 4) for one in boxes) or any(one.shape != (count,) for one in flags):
            raise ValueError(f"{[one.shape for one in (*boxes, *flags)]} and {count} labels do not belong together")

    def __len__(self) -> int:
        return len(self.labels)


def check_box(box_xywh: Sequence[float], visible_xywh: Sequence[float]) -> str:
    """What is wrong with an object's numbers; empty if nothing is."""
    for box in (box_xywh, visible_xywh):
        if not all(abs(value) <= MAX_COORDINATE_PX for value in box):  # as a comparison with NaN is false, so told too
            return f"the box {list(box)} holds NaN, infinity or no pixels"
        if box[2] < 0 or box[3] < 0:
            return f"the box {list(box)} has a negative width or height"
    return ""
