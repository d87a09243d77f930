"""Parity: how far what an exported form says is from what its reference says, on real pictures. No torch.

What exported forms are compared with: the trained detector, or where there is no torch, the ONNX file. No torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_deploy.export.options import ExportOptions, read_export_options
from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.precision.report import predict_samples
from hkd_det.errors import DataError, HkdError
from hkd_det.image import read_image
from hkd_det.letterbox import Letterbox
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Detections, Sample

# FP32 runtimes differ by rounding; seen: 2e-4 px and 5e-7 of a score (docs/export/verification.md). A thousand times as
# much leaves room for larger pictures, deeper networks, other processors. Less than this nobody sees: boxes are drawn
# in whole pixels, and a thousandth is the lowest score that counts.
BOX_TOLERANCE_PX = 0.5


SCORE_TOLERANCE = 1e-3


MAX_COMPARED_DET = 300  # of raw candidates, the best that are compared


MIN_COMPARED_SCORE = 0.3  # the score from which detections of a form in smaller numbers are compared


# A graph's outputs for a batch that is prepared as it takes it.
RunFunction = Callable[[NDArray[Any]], Sequence[NDArray[Any]]]


class ParityError(HkdError):
    """An exported form does not say what its reference says."""


@dataclass(frozen=True)
class Parity:
    """The largest differences between a form and its reference, over `pictures`.

    box_px: of any side of any box, in pixels as the graph answers. score: of any score, 0..1.
    worst: the place of the picture that differs most.
    """

    num_images: int
    box_error_px: float
    score_error: float
    worst_index: int = 0

    @property
    def within_tolerance(self) -> bool:
        """Whether both are within FP32's tolerance: half a pixel, and a thousandth."""
        return self.box_error_px <= BOX_TOLERANCE_PX and self.score_error <= SCORE_TOLERANCE


@dataclass(frozen=True, eq=False)
class ReferenceOutputs:
    """What the reference says. batches: a picture each, [1, ...], as the graph takes it. answers: its outputs."""

    batches: list[NDArray[Any]]
    outputs: list[Sequence[NDArray[Any]]]


def run_reference(run: RunFunction, options: ExportOptions, image_paths: Sequence[Path], desc: str) -> ReferenceOutputs:
    """Run the reference on each picture. what: for the progress bar. Raises DataError without a picture."""
    if not image_paths:
        raise DataError("no pictures to compare on; give --data with a val split")
    batches = [prepare_input(read_image(path), options) for path in image_paths]
    return ReferenceOutputs(batches, [run(batch) for batch in tqdm(batches, desc, unit="picture", leave=False)])


def compare_outputs(
    reference_outputs: ReferenceOutputs, run: RunFunction, batch_size: int, is_exact: bool, desc: str
) -> Parity:
    """Run a form on what the reference has seen, `batch` times the same picture at once.

    exact: every detection must be there with its score; else those from `SURE` up are compared with the nearest.
    """
    differ = max_abs_difference if is_exact else matched_difference
    found = []
    bar = tqdm(
        zip(reference_outputs.batches, reference_outputs.outputs, strict=True),
        desc,
        total=len(reference_outputs.batches),
        unit="picture",
        leave=False,
    )
    for picture, answer in bar:
        wanted = [np.repeat(value, batch_size, axis=0) for value in answer]
        found.append(differ(wanted, run(np.repeat(picture, batch_size, axis=0))))
    differences = np.array(found)  # [N, 2]
    worst = (differences / (BOX_TOLERANCE_PX, SCORE_TOLERANCE)).max(1).argmax()
    box_px, score = differences.max(0)
    return Parity(len(found), float(box_px), float(score), int(worst))


def prepare_input(image_rgb: NDArray[np.uint8], options: ExportOptions) -> NDArray[Any]:
    """A picture (H, W, 3) uint8 as a graph of these options takes it, as a batch of one."""
    source_hw = (image_rgb.shape[0], image_rgb.shape[1])
    if options.letterbox_hw:
        fits = all(side <= limit for side, limit in zip(source_hw, options.letterbox_hw, strict=True))
        one = image_rgb if fits else _resize_within(image_rgb, options.letterbox_hw)
    elif options.dynamic_size:
        one = _resize_within(image_rgb, options.imgsz_hw)
    else:
        one = Letterbox(source_hw, options.imgsz_hw).apply(image_rgb)
    batch = one[None]
    return batch if options.preprocess else (batch.transpose(0, 3, 1, 2) / 255).astype(np.float32)


def _resize_within(image_rgb: NDArray[np.uint8], limit_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture scaled to lie within `limit_hw`, without the grey."""
    letterbox = Letterbox((image_rgb.shape[0], image_rgb.shape[1]), limit_hw)
    height, width = letterbox.content_hw
    return letterbox.apply(image_rgb)[:height, :width]


def max_abs_difference(expected: Sequence[NDArray[Any]], actual: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """The largest of any box's side, in pixels, and of any score, of both graphs' outputs."""
    if len(expected) == 2:  # raw
        expected, actual = _select_top_candidates(*expected), _select_top_candidates(*actual)
    counts = np.maximum(expected[2], actual[2])
    boxes = [
        compute_box_difference(expected[0][one, :count], expected[1][one, :count], actual[0][one], actual[1][one])
        for one, count in enumerate(counts)
    ]
    return float(np.max(boxes)), float(np.abs(expected[1] - actual[1]).max())


def matched_difference(expected: Sequence[NDArray[Any]], actual: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """From each detection of either with a score from `SURE` up to the nearest of the other: the largest distance of
    any side, in pixels, and of their scores. Where the other has none at all: infinite, and the score itself.
    """
    apart = [(0.0, 0.0)]
    for one, (count, other) in enumerate(zip(expected[2], actual[2], strict=True)):
        sides = (expected[0][one, :count], expected[1][one, :count]), (actual[0][one, :other], actual[1][one, :other])
        apart += [_compute_nearest_difference(*sides[0], *sides[1]), _compute_nearest_difference(*sides[1], *sides[0])]
    boxes, scores = zip(*apart, strict=True)
    return float(np.max(boxes)), float(np.max(scores))


def _compute_nearest_difference(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    target_boxes: NDArray[np.float32],
    target_scores: NDArray[np.float32],
) -> tuple[float, float]:
    sure = scores >= MIN_COMPARED_SCORE
    if not sure.any():
        return 0.0, 0.0
    if not len(target_boxes):
        return float("inf"), float(scores.max())
    apart = np.abs(boxes[sure][:, None] - target_boxes[None]).max(-1)  # [N, M]
    nearest = apart.argmin(1)
    return float(apart.min(1).max()), float(np.abs(scores[sure] - target_scores[nearest]).max())


def _select_top_candidates(boxes: NDArray[np.float32], logits: NDArray[np.float32]) -> list[NDArray[Any]]:
    """Of all candidates the best `TOP` boxes, their scores, falling, and their number, as a graph that is not raw."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :MAX_COMPARED_DET]
    scores = 1 / (1 + np.exp(-np.take_along_axis(logits, order, 1).astype(np.float64)))
    return [np.take_along_axis(boxes, order[..., None], 1), scores, np.full(len(boxes), order.shape[1])]


def compute_box_difference(
    expected_boxes: NDArray[np.float32],
    expected_scores: NDArray[np.float32],
    actual_boxes: NDArray[np.float32],
    actual_scores: NDArray[np.float32],
) -> float:
    """The largest distance, in pixels, from a box [N, 4] to the nearest box [M, 4] of the same score.

    Rank alone does not pair them: two scores closer than rounding may come in either order. Infinite where
    no score is within `SCORE_TOLERANCE`.
    """
    if not len(expected_boxes):
        return 0.0
    apart = np.abs(expected_boxes[:, None] - actual_boxes[None]).max(-1)  # [N, M]
    apart[np.abs(expected_scores[:, None] - actual_scores[None]) > SCORE_TOLERANCE] = np.inf
    return float(apart.min(1).max())


@dataclass(frozen=True, eq=False)
class Reference:
    """What says how it should be.

    name, runs_on: for the reader. options: of the graph that `run` runs, a picture at a time.
    detect: people in whole pictures. explain: where inside an ONNX file the difference begins, by a batch of one on
    which it shows; part of a sentence.
    """

    name: str
    backend: str
    options: ExportOptions
    run: RunFunction
    predict: Callable[[Sequence[Sample]], list[Detections]]
    locate_difference: Callable[[Path, NDArray[Any]], str]


def onnx_reference(path: Path) -> Reference:
    """An ONNX file of hkd-export on ONNX Runtime. Raises as `open_session` and `Manifest.from_metadata` do."""
    session = open_session(path)
    options = read_export_options(ModelMetadata.from_metadata(session.get_modelmeta().custom_metadata_map, path))

    def run(batch: NDArray[Any]) -> list[NDArray[Any]]:
        answers = session.run(None, {"images": np.repeat(batch, options.batch or 1, axis=0)})
        return [answer[:1] for answer in answers]

    def detect(samples: Sequence[Sample]) -> list[Detections]:
        return predict_samples(path, "cpu", "onnxruntime", samples, path.name)

    return Reference(
        str(path), "onnxruntime", options, run, detect, lambda _path, _batch: "there is no torch to tell where"
    )
