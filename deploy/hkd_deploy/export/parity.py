"""Parity: the exported file says what the trained detector says, shown on real pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hkd_deploy.backends.onnx_runtime import open_onnx_runtime
from hkd_deploy.export.graph import DeployedDetector
from hkd_det.datasets import read_picture
from hkd_det.errors import DataError
from hkd_det.letterbox import Letterbox
from hkd_det.train.checkpoint import DetectorCheckpoint

BOX_TOLERANCE_PX = 0.5
SCORE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Parity:
    """The largest differences between the trained detector and its exported file, over `pictures`.

    box_px: of any side of any box, in input pixels. score: of any score, 0..1.
    """

    pictures: int
    box_px: float
    score: float

    @property
    def holds(self) -> bool:
        """Whether both are within FP32's tolerance: half a pixel, and a thousandth."""
        return self.box_px <= BOX_TOLERANCE_PX and self.score <= SCORE_TOLERANCE


def compare(checkpoint: DetectorCheckpoint, path: Path, imgsz_hw: tuple[int, int], pictures: Sequence[Path]) -> Parity:
    """Run both on each picture, through the same letterbox. Raises DataError without a picture to look at."""
    if not pictures:
        raise DataError(f"{path}: no pictures to check it on; give --data with a val split")
    deployed = DeployedDetector(checkpoint.build()).eval()
    worst_box, worst_score = 0.0, 0.0
    with open_onnx_runtime(path, "cpu") as runtime, torch.no_grad():
        for picture_path in pictures:
            picture = read_picture(picture_path)
            batch = Letterbox((picture.shape[0], picture.shape[1]), imgsz_hw).apply(picture)[None]
            wanted = [value.numpy() for value in deployed(torch.from_numpy(batch))]
            found = runtime.run(batch)
            worst_score = max(worst_score, float(np.abs(wanted[1] - found[1]).max()))
            count = int(max(wanted[2][0], found[2][0]))
            worst_box = max(
                worst_box, box_difference(wanted[0][0, :count], wanted[1][0, :count], found[0][0], found[1][0])
            )
    return Parity(len(pictures), worst_box, worst_score)


def box_difference(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    other_boxes: NDArray[np.float32],
    other_scores: NDArray[np.float32],
) -> float:
    """The largest distance, in pixels, from a box [N, 4] to the nearest box [M, 4] of the same score.

    Rank alone does not pair them: two scores closer than rounding may come in either order. Infinite where
    no score is within `SCORE_TOLERANCE`.
    """
    if not len(boxes):
        return 0.0
    apart = np.abs(boxes[:, None] - other_boxes[None]).max(-1)  # [N, M]
    apart[np.abs(scores[:, None] - other_scores[None]) > SCORE_TOLERANCE] = np.inf
    return float(apart.min(1).max())
