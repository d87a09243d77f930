"""`Detections`: what a detector says about one picture. The only value that crosses the folders."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math


@dataclass(frozen=True, eq=False)
class Detections:
    """People found in one picture, best score first.

    boxes_xyxy: [N, 4] float32, pixels of the original picture.
    scores: [N] float32, 0..1.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        scores = np.asarray(self.scores, dtype=np.float32).reshape(-1)
        if len(boxes) != len(scores):
            raise ValueError(f"{len(boxes)} boxes but {len(scores)} scores")
        order = np.argsort(-scores, kind="stable")
        object.__setattr__(self, "boxes_xyxy", boxes[order])
        object.__setattr__(self, "scores", scores[order])

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def empty(cls) -> "Detections":
        """No detections."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))

    def filter(self, min_score: float) -> "Detections":
        """Those with a score of at least `conf`."""
        keep = self.scores >= min_score
        return Detections(self.boxes_xyxy[keep], self.scores[keep])


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """People annotated in one picture, and the regions in which nothing may be judged.

    boxes_xyxy: [N, 4] float32, pixels: the whole person, hidden parts included.
    ignore: [N] bool: a region that is neither a person to find nor background (a rider, a group, a poster).
    visible_xyxy: [N, 4] float32, pixels: the part that can be seen; equal to the box where the data set does not say.
    labels: N names as the data set means them ("pedestrian", "rider", "group", ...).
    """

    boxes_xyxy: NDArray[np.float32]
    ignore: NDArray[np.bool_]
    visible_xyxy: NDArray[np.float32]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.labels)
        if not (self.boxes_xyxy.shape == self.visible_xyxy.shape == (count, 4) and self.ignore.shape == (count,)):
            raise ValueError(
                f"boxes {self.boxes_xyxy.shape}, visible {self.visible_xyxy.shape}, "
                f"ignore {self.ignore.shape} and {count} labels do not belong together"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def empty(cls) -> "GroundTruth":
        """Nobody."""
        nothing = np.zeros((0, 4), np.float32)
        return cls(nothing, np.zeros(0, bool), nothing, ())

    @property
    def heights_px(self) -> NDArray[np.float64]:
        """[N] heights of the whole boxes in pixels."""
        boxes = self.boxes_xyxy.astype(np.float64)
        return boxes[:, 3] - boxes[:, 1]

    @property
    def visible_ratio(self) -> NDArray[np.float64]:
        """[N] visible area over whole area, 0..1 where the visible box lies inside the box; 0 for an empty box.

        In double precision: whether a ratio is just below 0.65 decides who counts.
        """
        seen, whole = (
            box_math.box_area(self.visible_xyxy.astype(np.float64)),
            box_math.box_area(self.boxes_xyxy.astype(np.float64)),
        )
        return np.divide(seen, whole, out=np.zeros_like(whole), where=whole > 0)


@dataclass(frozen=True, eq=False)
class Sample:
    """One annotated picture. `size_hw` (height, width) is None where only opening the file would tell."""

    image_id: int | str
    path: Path
    ground_truth: GroundTruth = field(default_factory=GroundTruth.empty)
    size_hw: tuple[int, int] | None = None


IGNORE_EXTENT_PX = 1e6  # beyond every picture's borders, at any scale


def unlabeled_ground_truth() -> GroundTruth:
    """The truth of a picture that nobody has looked at."""
    everywhere = np.array([[-IGNORE_EXTENT_PX, -IGNORE_EXTENT_PX, IGNORE_EXTENT_PX, IGNORE_EXTENT_PX]], np.float32)
    return GroundTruth(everywhere, np.array([True]), everywhere, ("unlabeled",))
