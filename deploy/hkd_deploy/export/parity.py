"""Parity: the exported file says what the trained detector says, shown on real pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hkd_deploy.export.graph import TOP, DeployedDetector
from hkd_deploy.export.onnx_file import output_names
from hkd_deploy.export.options import GraphOptions
from hkd_det.datasets import read_picture
from hkd_det.errors import DataError
from hkd_det.letterbox import Letterbox
from hkd_det.onnx_session import open_session
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


def compare(checkpoint: DetectorCheckpoint, path: Path, options: GraphOptions, pictures: Sequence[Path]) -> Parity:
    """Run both on each picture, prepared alike. Raises DataError without a picture to look at."""
    if not pictures:
        raise DataError(f"{path}: no pictures to check it on; give --data with a val split")
    deployed = DeployedDetector(checkpoint.build(), options).eval()
    session = open_session(path, "cpu")
    worst_box, worst_score = 0.0, 0.0
    with torch.no_grad():
        for picture_path in pictures:
            batch = prepare(read_picture(picture_path), options)
            wanted = [value.numpy() for value in deployed(torch.from_numpy(batch))]
            box, score = _differences(wanted, session.run(output_names(options), {"images": batch}))
            worst_box, worst_score = max(worst_box, box), max(worst_score, score)
    return Parity(len(pictures), worst_box, worst_score)


def prepare(picture_rgb: NDArray[np.uint8], options: GraphOptions) -> NDArray[Any]:
    """A picture (H, W, 3) uint8 as a graph of these options takes it, as often as it takes at once."""
    source_hw = (picture_rgb.shape[0], picture_rgb.shape[1])
    if options.letterbox_hw:
        fits = all(side <= limit for side, limit in zip(source_hw, options.letterbox_hw, strict=True))
        one = picture_rgb if fits else _content(picture_rgb, options.letterbox_hw)
    elif options.dynamic_size:
        one = _content(picture_rgb, options.imgsz_hw)
    else:
        one = Letterbox(source_hw, options.imgsz_hw).apply(picture_rgb)
    batch = np.repeat(one[None], options.batch or 1, axis=0)
    return batch if options.preprocess else (batch.transpose(0, 3, 1, 2) / 255).astype(np.float32)


def _content(picture_rgb: NDArray[np.uint8], limit_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture scaled to lie within `limit_hw`, without the grey."""
    letterbox = Letterbox((picture_rgb.shape[0], picture_rgb.shape[1]), limit_hw)
    height, width = letterbox.content_hw
    return letterbox.apply(picture_rgb)[:height, :width]


def _differences(wanted: list[NDArray[Any]], found: list[NDArray[Any]]) -> tuple[float, float]:
    """The largest of any box's side, in pixels, and of any score, of both graphs' outputs."""
    if len(wanted) == 2:  # raw
        wanted, found = _surest(*wanted), _surest(*found)
    counts = np.maximum(wanted[2], found[2])
    boxes = [
        box_difference(wanted[0][one, :count], wanted[1][one, :count], found[0][one], found[1][one])
        for one, count in enumerate(counts)
    ]
    return max(boxes), float(np.abs(wanted[1] - found[1]).max())


def _surest(boxes: NDArray[np.float32], logits: NDArray[np.float32]) -> list[NDArray[Any]]:
    """Of all candidates the best `TOP` boxes, their scores, falling, and their number, as a graph that is not raw."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    scores = 1 / (1 + np.exp(-np.take_along_axis(logits, order, 1).astype(np.float64)))
    return [np.take_along_axis(boxes, order[..., None], 1), scores, np.full(len(boxes), order.shape[1])]


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
