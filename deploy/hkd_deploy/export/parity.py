"""Parity: how far what an exported form says is from what its reference says, on real pictures. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_deploy.export.options import GraphOptions
from hkd_det.datasets.sample import read_picture
from hkd_det.errors import DataError, HkdError
from hkd_det.letterbox import Letterbox

# FP32 runtimes differ by rounding; seen: 2e-4 px and 5e-7 of a score (docs/export/verification.md). A thousand times as
# much leaves room for larger pictures, deeper networks, other processors. Less than this nobody sees: boxes are drawn
# in whole pixels, and a thousandth is the lowest score that counts.
BOX_TOLERANCE_PX = 0.5
SCORE_TOLERANCE = 1e-3
TOP = 300  # of raw candidates, the best that are compared
SURE = 0.3  # the score from which detections of a form in smaller numbers are compared

# A graph's outputs for a batch that is prepared as it takes it.
Run = Callable[[NDArray[Any]], Sequence[NDArray[Any]]]


class ParityError(HkdError):
    """An exported form does not say what its reference says."""


@dataclass(frozen=True)
class Parity:
    """The largest differences between a form and its reference, over `pictures`.

    box_px: of any side of any box, in pixels as the graph answers. score: of any score, 0..1.
    worst: the place of the picture that differs most.
    """

    pictures: int
    box_px: float
    score: float
    worst: int = 0

    @property
    def holds(self) -> bool:
        """Whether both are within FP32's tolerance: half a pixel, and a thousandth."""
        return self.box_px <= BOX_TOLERANCE_PX and self.score <= SCORE_TOLERANCE


@dataclass(frozen=True, eq=False)
class Seen:
    """What the reference says. batches: a picture each, [1, ...], as the graph takes it. answers: its outputs."""

    batches: list[NDArray[Any]]
    answers: list[Sequence[NDArray[Any]]]


def look(run: Run, options: GraphOptions, pictures: Sequence[Path], what: str) -> Seen:
    """Run the reference on each picture. what: for the progress bar. Raises DataError without a picture."""
    if not pictures:
        raise DataError("no pictures to compare on; give --data with a val split")
    batches = [prepare(read_picture(path), options) for path in pictures]
    return Seen(batches, [run(batch) for batch in tqdm(batches, what, unit="picture", leave=False)])


def compare(seen: Seen, run: Run, batch: int, exact: bool, what: str) -> Parity:
    """Run a form on what the reference has seen, `batch` times the same picture at once.

    exact: every detection must be there with its score; else those from `SURE` up are compared with the nearest.
    """
    differ = exact_differences if exact else sure_differences
    found = []
    bar = tqdm(zip(seen.batches, seen.answers, strict=True), what, total=len(seen.batches), unit="picture", leave=False)
    for picture, answer in bar:
        wanted = [np.repeat(value, batch, axis=0) for value in answer]
        found.append(differ(wanted, run(np.repeat(picture, batch, axis=0))))
    differences = np.array(found)  # [N, 2]
    worst = (differences / (BOX_TOLERANCE_PX, SCORE_TOLERANCE)).max(1).argmax()
    box_px, score = differences.max(0)
    return Parity(len(found), float(box_px), float(score), int(worst))


def prepare(picture_rgb: NDArray[np.uint8], options: GraphOptions) -> NDArray[Any]:
    """A picture (H, W, 3) uint8 as a graph of these options takes it, as a batch of one."""
    source_hw = (picture_rgb.shape[0], picture_rgb.shape[1])
    if options.letterbox_hw:
        fits = all(side <= limit for side, limit in zip(source_hw, options.letterbox_hw, strict=True))
        one = picture_rgb if fits else _content(picture_rgb, options.letterbox_hw)
    elif options.dynamic_size:
        one = _content(picture_rgb, options.imgsz_hw)
    else:
        one = Letterbox(source_hw, options.imgsz_hw).apply(picture_rgb)
    batch = one[None]
    return batch if options.preprocess else (batch.transpose(0, 3, 1, 2) / 255).astype(np.float32)


def _content(picture_rgb: NDArray[np.uint8], limit_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture scaled to lie within `limit_hw`, without the grey."""
    letterbox = Letterbox((picture_rgb.shape[0], picture_rgb.shape[1]), limit_hw)
    height, width = letterbox.content_hw
    return letterbox.apply(picture_rgb)[:height, :width]


def exact_differences(wanted: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """The largest of any box's side, in pixels, and of any score, of both graphs' outputs."""
    if len(wanted) == 2:  # raw
        wanted, found = _surest(*wanted), _surest(*found)
    counts = np.maximum(wanted[2], found[2])
    boxes = [
        box_difference(wanted[0][one, :count], wanted[1][one, :count], found[0][one], found[1][one])
        for one, count in enumerate(counts)
    ]
    return float(np.max(boxes)), float(np.abs(wanted[1] - found[1]).max())


def sure_differences(wanted: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """From each detection of either with a score from `SURE` up to the nearest of the other: the largest distance of
    any side, in pixels, and of their scores. Where the other has none at all: infinite, and the score itself.
    """
    apart = [(0.0, 0.0)]
    for one, (count, other) in enumerate(zip(wanted[2], found[2], strict=True)):
        sides = (wanted[0][one, :count], wanted[1][one, :count]), (found[0][one, :other], found[1][one, :other])
        apart += [_farthest(*sides[0], *sides[1]), _farthest(*sides[1], *sides[0])]
    boxes, scores = zip(*apart, strict=True)
    return float(np.max(boxes)), float(np.max(scores))


def _farthest(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    other_boxes: NDArray[np.float32],
    other_scores: NDArray[np.float32],
) -> tuple[float, float]:
    sure = scores >= SURE
    if not sure.any():
        return 0.0, 0.0
    if not len(other_boxes):
        return float("inf"), float(scores.max())
    apart = np.abs(boxes[sure][:, None] - other_boxes[None]).max(-1)  # [N, M]
    nearest = apart.argmin(1)
    return float(apart.min(1).max()), float(np.abs(scores[sure] - other_scores[nearest]).max())


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
