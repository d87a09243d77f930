"""Data structures that the packages exchange: detections, ground truth and samples."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkd_det.boxes import box_area

IGNORE_EXTENT_PX = 1e6  # larger than any image, at any scale


@dataclass(frozen=True, eq=False)
class Detections:
    """Detected persons of one image, sorted by descending score.

    The constructor converts both arrays to float32 and sorts them.

    Attributes:
        boxes_xyxy (array[N, 4]): xyxy, pixels of the source image.
        scores (array[N]): 0 to 1.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        scores = np.asarray(self.scores, dtype=np.float32).reshape(-1)
        if len(boxes) != len(scores):
            raise ValueError(f"expected one score per box, got {len(boxes)} boxes but {len(scores)} scores")
        order = np.argsort(-scores, kind="stable")
        object.__setattr__(self, "boxes_xyxy", boxes[order])
        object.__setattr__(self, "scores", scores[order])

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> "Detections":
        """Return an empty set of detections."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))

    def filter(self, min_score: float) -> "Detections":
        """Return the detections with a minimum score.

        Args:
            min_score: Minimum score, 0 to 1, inclusive.
        """
        keep = self.scores >= min_score
        return Detections(self.boxes_xyxy[keep], self.scores[keep])


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Annotated persons and ignore regions of one image.

    Attributes:
        boxes_xyxy (array[N, 4]): Full-body boxes including hidden parts, xyxy, pixels of the source image.
        ignore (array[N], bool): True for a region that is neither a person to detect nor background, such as
            a rider, a group or a poster.
        visible_xyxy (array[N, 4]): Boxes of the visible parts, xyxy, pixels. Equal to `boxes_xyxy` if the
            dataset does not annotate visibility.
        labels: N class names of the dataset, such as "pedestrian" or "rider".
    """

    boxes_xyxy: NDArray[np.float32]
    ignore: NDArray[np.bool_]
    visible_xyxy: NDArray[np.float32]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.labels)
        if not (self.boxes_xyxy.shape == self.visible_xyxy.shape == (count, 4) and self.ignore.shape == (count,)):
            raise ValueError(
                f"expected arrays of the same length, got boxes {self.boxes_xyxy.shape}, "
                f"visible {self.visible_xyxy.shape}, ignore {self.ignore.shape} and {count} labels"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def empty(cls) -> "GroundTruth":
        """Return the ground truth of an image without annotations."""
        no_boxes = np.zeros((0, 4), np.float32)
        return cls(no_boxes, np.zeros(0, bool), no_boxes, ())

    @property
    def heights_px(self) -> NDArray[np.float64]:
        """Heights of the full-body boxes in pixels, array[N]."""
        boxes = self.boxes_xyxy.astype(np.float64)
        return boxes[:, 3] - boxes[:, 1]

    @property
    def visible_ratio(self) -> NDArray[np.float64]:
        """Visible area divided by full-body area, array[N].

        0 to 1 if the visible box is inside the full-body box; 0 for an empty box. The computation uses double
        precision because the evaluation compares the ratio with exact limits such as 0.65.
        """
        visible = box_area(self.visible_xyxy.astype(np.float64))
        full = box_area(self.boxes_xyxy.astype(np.float64))
        return np.divide(visible, full, out=np.zeros_like(full), where=full > 0)


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated image.

    Attributes:
        image_id: Identifier, unique in its dataset split.
        path: Image file.
        ground_truth: Annotations.
        size_hw: Image height and width in pixels, or None if the annotations do not contain the size.
    """

    image_id: int | str
    path: Path
    ground_truth: GroundTruth = field(default_factory=GroundTruth.empty)
    size_hw: tuple[int, int] | None = None


def unlabeled_ground_truth() -> GroundTruth:
    """Return the ground truth of an unlabeled image: one ignore region that covers every pixel.

    The region extends beyond the image, so it also covers the padding of crops. The detection loss therefore
    excludes all anchor points of the image.
    """
    extent = np.array([[-IGNORE_EXTENT_PX, -IGNORE_EXTENT_PX, IGNORE_EXTENT_PX, IGNORE_EXTENT_PX]], np.float32)
    return GroundTruth(extent, np.array([True]), extent, ("unlabeled",))
