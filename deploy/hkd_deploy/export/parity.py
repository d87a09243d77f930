"""Parity of an exported model and its reference: largest differences of boxes and scores on real images. No torch.

The reference is the trained detector in torch, or an ONNX file where torch is not installed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.model_metadata import ExportOptions, ModelMetadata, read_export_options
from hkd_deploy.precision.model import make_progress_bar, predict_samples
from hkd_det.errors import DataError, HkdError
from hkd_det.image import read_image
from hkd_det.letterbox import Letterbox
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Detections, Sample

# FP32 runtimes differ by rounding, about 2e-4 px and 5e-7 in score (docs/how-to/export.md). The tolerances are a
# thousand times larger, for larger images, deeper networks and other processors. Smaller differences have no effect:
# boxes are drawn in whole pixels, and the miss rate ignores scores below 0.001.
BOX_TOLERANCE_PX = 0.5
SCORE_TOLERANCE = 1e-3
MAX_COMPARED_DET = 300  # raw outputs: number of best candidates that are compared
MIN_COMPARED_SCORE = 0.3  # reduced precision: lowest score that is compared

# Maps a prepared batch to the outputs of a graph.
RunFunction = Callable[[NDArray[Any]], Sequence[NDArray[Any]]]


class ParityError(HkdError):
    """The outputs of an exported model differ from the reference by more than the tolerance."""


@dataclass(frozen=True)
class Parity:
    """Largest differences between an exported model and its reference.

    Attributes:
        num_images: Number of compared images.
        box_error_px: Largest difference of a box side, in pixels of the graph output.
        score_error: Largest difference of a score, 0 to 1.
        worst_index: Index of the image with the largest difference relative to the tolerances.
        num_compared: Number of compared detections of both models. 0 if the differences mean nothing.
    """

    num_images: int
    box_error_px: float
    score_error: float
    worst_index: int = 0
    num_compared: int = 1

    @property
    def within_tolerance(self) -> bool:
        """Whether both differences are within the FP32 tolerances, 0.5 px and 0.001. False for NaN."""
        return self.box_error_px <= BOX_TOLERANCE_PX and self.score_error <= SCORE_TOLERANCE


@dataclass(frozen=True, eq=False)
class Reference:
    """The model that exported models are compared with.

    Attributes:
        name: File name for the table and messages.
        backend: Runtime name for the table and messages.
        options: Options of the graph that `run` executes.
        run: Function that runs a batch of one image.
        predict: Function that returns the detections of samples, in image pixels.
        locate_difference: Function that takes an ONNX file and a batch of one image and returns a clause that states
            where in the file the difference begins.
    """

    name: str
    backend: str
    options: ExportOptions
    run: RunFunction
    predict: Callable[[Sequence[Sample]], list[Detections]]
    locate_difference: Callable[[Path, NDArray[Any]], str]


@dataclass(frozen=True, eq=False)
class ReferenceOutputs:
    """Inputs and outputs of the reference.

    Attributes:
        batches: Prepared batches of one image.
        outputs: Graph outputs of each batch.
    """

    batches: list[NDArray[Any]]
    outputs: list[Sequence[NDArray[Any]]]


def make_onnx_reference(path: Path) -> Reference:
    """Return an ONNX file on ONNX Runtime as the reference.

    Args:
        path: ONNX file of hkd-export.

    Raises:
        HkdError: If the file cannot be opened or was not written by hkd-export.
    """
    session = open_session(path)
    options = read_export_options(ModelMetadata.from_metadata(session.get_modelmeta().custom_metadata_map, path))

    def run(batch: NDArray[Any]) -> list[NDArray[Any]]:
        outputs = session.run(None, {"images": np.repeat(batch, options.batch or 1, axis=0)})
        return [output[:1] for output in outputs]

    def predict(samples: Sequence[Sample]) -> list[Detections]:
        return predict_samples(path, "cpu", "onnxruntime", samples, path.name)

    def locate_difference(_path: Path, _batch: NDArray[Any]) -> str:
        return "the layer that differs cannot be located without torch"

    return Reference(str(path), "onnxruntime", options, run, predict, locate_difference)


def run_reference(run: RunFunction, options: ExportOptions, image_paths: Sequence[Path], desc: str) -> ReferenceOutputs:
    """Run the reference on images.

    Args:
        run: Function that runs a batch of one image.
        options: Options of the graph, which determine the preprocessing.
        image_paths: Image files.
        desc: Label of the progress bar.

    Returns:
        Inputs and outputs of the reference.

    Raises:
        DataError: If there is no image, or an image cannot be read.
    """
    if not image_paths:
        raise DataError("parity: no image to compare on. Set --data to a dataset with a val split.")
    batches = [prepare_input(read_image(path), options) for path in image_paths]
    return ReferenceOutputs(batches, [run(batch) for batch in make_progress_bar(batches, desc, "image")])


def compare_outputs(
    reference_outputs: ReferenceOutputs, run: RunFunction, batch_size: int, is_exact: bool, desc: str
) -> Parity:
    """Run an exported model on the inputs of the reference and compare the outputs.

    Args:
        reference_outputs: Inputs and outputs of the reference.
        run: Function that runs the exported model.
        batch_size: Batch size of the exported model; each image is repeated to fill the batch.
        is_exact: Compare every detection with one of the same score. If False (reduced precision), compare detections
            with a score of at least `MIN_COMPARED_SCORE` with the nearest box.
        desc: Label of the progress bar.

    Returns:
        The largest differences over all images.
    """
    difference = compute_max_difference if is_exact else compute_matched_difference
    pairs = list(zip(reference_outputs.batches, reference_outputs.outputs, strict=True))
    rows, num_compared = [], 0
    for batch, outputs in make_progress_bar(pairs, desc, "image"):
        expected = [np.repeat(value, batch_size, axis=0) for value in outputs]
        actual = run(np.repeat(batch, batch_size, axis=0))
        rows.append(difference(expected, actual))
        num_compared += _count_compared(expected, is_exact) + _count_compared(actual, is_exact)
    differences = np.array(rows)  # [N, 2]: pixels, score
    worst_index = (differences / (BOX_TOLERANCE_PX, SCORE_TOLERANCE)).max(1).argmax()
    box_error_px, score_error = differences.max(0)
    return Parity(len(rows), float(box_error_px), float(score_error), int(worst_index), num_compared)


def _count_compared(outputs: Sequence[NDArray[Any]], is_exact: bool) -> int:
    """Return the number of detections that `compare_outputs` compares. The candidates of a raw graph always count."""
    if len(outputs) == 2:
        return outputs[0].shape[1]
    min_score = 0.0 if is_exact else MIN_COMPARED_SCORE
    rows = zip(outputs[1], outputs[2], strict=True)
    return sum(int((scores[: int(count)] >= min_score).sum()) for scores, count in rows)


def prepare_input(image_rgb: NDArray[np.uint8], options: ExportOptions) -> NDArray[Any]:
    """Convert an image to the input of a graph.

    Args:
        image_rgb (uint8 array[H, W, 3]): RGB.
        options: Options of the graph.

    Returns:
        batch (array): uint8 [1, h, w, 3], or float32 [1, 3, h, w], 0 to 1, without `options.preprocess`.
    """
    source_hw = (image_rgb.shape[0], image_rgb.shape[1])
    if options.letterbox_hw:
        fits = all(side <= limit for side, limit in zip(source_hw, options.letterbox_hw, strict=True))
        network_input = image_rgb if fits else _resize_within(image_rgb, options.letterbox_hw)
    elif options.dynamic_size:
        network_input = _resize_within(image_rgb, options.imgsz_hw)
    else:
        network_input = Letterbox(source_hw, options.imgsz_hw).apply(image_rgb)
    batch = network_input[None]
    return batch if options.preprocess else (batch.transpose(0, 3, 1, 2) / 255).astype(np.float32)


def compute_max_difference(expected: Sequence[NDArray[Any]], actual: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """Compare every detection (or the best raw candidates) of two outputs.

    Args:
        expected: boxes [B, K, 4], scores [B, K] and count [B]; or raw boxes [B, A, 4] and logits [B, A].
        actual: The same of the other model.

    Returns:
        Largest difference of a box side in pixels and of a score. The box difference is infinite if a box has no
        counterpart with the same score.
    """
    if len(expected) == 2:  # raw
        expected, actual = _select_top_candidates(*expected), _select_top_candidates(*actual)
    counts = np.maximum(expected[2], actual[2])
    box_errors = [
        compute_box_difference(
            expected[0][index, :count], expected[1][index, :count], actual[0][index], actual[1][index]
        )
        for index, count in enumerate(counts)
    ]
    return float(np.max(box_errors)), float(np.abs(expected[1] - actual[1]).max())


def compute_matched_difference(expected: Sequence[NDArray[Any]], actual: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """Compare each detection with a score of at least `MIN_COMPARED_SCORE` with the nearest box, in both directions.

    Args:
        expected: boxes [B, K, 4], scores [B, K] and count [B].
        actual: The same of the other model.

    Returns:
        Largest difference of a box side in pixels and of a score. If one model has no detection, the box difference is
        infinite and the score difference is the highest score of the other model.
    """
    differences = [(0.0, 0.0)]
    for index, (num_expected, num_actual) in enumerate(zip(expected[2], actual[2], strict=True)):
        expected_det = expected[0][index, :num_expected], expected[1][index, :num_expected]
        actual_det = actual[0][index, :num_actual], actual[1][index, :num_actual]
        differences.append(_compute_nearest_difference(*expected_det, *actual_det))
        differences.append(_compute_nearest_difference(*actual_det, *expected_det))
    box_errors, score_errors = zip(*differences, strict=True)
    return float(np.max(box_errors)), float(np.max(score_errors))


def compute_box_difference(
    expected_boxes: NDArray[np.float32],
    expected_scores: NDArray[np.float32],
    actual_boxes: NDArray[np.float32],
    actual_scores: NDArray[np.float32],
) -> float:
    """Return the largest distance from an expected box to the nearest actual box of the same score, in pixels.

    Scores within `SCORE_TOLERANCE` are the same. Boxes are not paired by rank, because rounding can change the order
    of nearly equal scores.

    Args:
        expected_boxes (array[N, 4]): xyxy.
        expected_scores (array[N]): 0 to 1.
        actual_boxes (array[M, 4]): xyxy.
        actual_scores (array[M]): 0 to 1.

    Returns:
        The largest difference of a box side; infinite if no actual box has the score of an expected one.
    """
    if not len(expected_boxes):
        return 0.0
    distances = np.abs(expected_boxes[:, None] - actual_boxes[None]).max(-1)  # [N, M]
    distances[np.abs(expected_scores[:, None] - actual_scores[None]) > SCORE_TOLERANCE] = np.inf
    return float(distances.min(1).max())


def _resize_within(image_rgb: NDArray[np.uint8], limit_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Scale an image to fit into `limit_hw`, without padding."""
    letterbox = Letterbox((image_rgb.shape[0], image_rgb.shape[1]), limit_hw)
    height, width = letterbox.content_hw
    return letterbox.apply(image_rgb)[:height, :width]


def _select_top_candidates(boxes: NDArray[np.float32], logits: NDArray[np.float32]) -> list[NDArray[Any]]:
    """Return boxes, descending scores and count of the best raw candidates, as a graph that is not raw returns them."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :MAX_COMPARED_DET]
    scores = 1 / (1 + np.exp(-np.take_along_axis(logits, order, 1).astype(np.float64)))
    return [np.take_along_axis(boxes, order[..., None], 1), scores, np.full(len(boxes), order.shape[1])]


def _compute_nearest_difference(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    target_boxes: NDArray[np.float32],
    target_scores: NDArray[np.float32],
) -> tuple[float, float]:
    is_compared = scores >= MIN_COMPARED_SCORE
    if not is_compared.any():
        return 0.0, 0.0
    if not len(target_boxes):
        return float("inf"), float(scores.max())
    distances = np.abs(boxes[is_compared][:, None] - target_boxes[None]).max(-1)  # [N, M]
    nearest = distances.argmin(1)
    return float(distances.min(1).max()), float(np.abs(scores[is_compared] - target_scores[nearest]).max())
