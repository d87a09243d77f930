"""`Detections`: what a detector says about one picture. The only value that crosses the folders."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
