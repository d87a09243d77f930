"""Interfaces of a runtime backend and of a detector, and the checks of models and images.

A backend runs a graph. A detector converts images to detections in image pixels, with the time of each stage.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.model_metadata import ModelMetadata, TensorInfo
from hkd_det.errors import DataError
from hkd_det.structures import Detections

# boxes [B, K, 4] float32 xyxy, scores [B, K] float32, count [B] int64
RuntimeOutputs = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
PerformanceHint = Literal["latency", "throughput"]

INPUT_NAME, INPUT_DTYPE = "images", "uint8"
OUTPUT_DTYPES = {"boxes": "float32", "scores": "float32", "count": "int64"}


class Backend(Protocol):
    """A model opened by a runtime. Several threads may call `run` at the same time.

    Attributes:
        path: The model file.
        device: Device that runs the model: cpu, cuda or cuda:N.
        metadata: Metadata strings of the file.
        batch: Fixed batch size. None if the batch dimension is free.
        input_hw: Fixed (height, width) of the input, pixels. None if the size is free.
    """

    path: Path
    device: str
    metadata: dict[str, str]
    batch: int | None
    input_hw: tuple[int, int] | None

    def run(self, images: NDArray[np.uint8]) -> RuntimeOutputs:
        """Run inference on a batch.

        Args:
            images (uint8[B, H, W, 3]): RGB, letterboxed.

        Returns:
            boxes (float32[B, K, 4]): xyxy, input pixels.
            scores (float32[B, K]): 0 to 1, descending.
            count (int64[B]): Number of valid rows per image.
        """

    def close(self) -> None:
        """Release the memory of the model."""


def validate_io(
    path: Path, metadata: Mapping[str, str], inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]
) -> tuple[int | None, tuple[int, int] | None]:
    """Check that a `Backend` can run a model.

    Args:
        path: The model file, for error messages.
        metadata: Metadata strings of the file.
        inputs: Inputs of the graph.
        outputs: Outputs of the graph.

    Returns:
        batch: Fixed batch size. None if it is free.
        input_hw: Fixed (height, width), pixels. None if it is free.

    Raises:
        DataError: Another tool wrote the file, or it was exported with `--raw` or `--no-preprocess`.
    """
    model_metadata = ModelMetadata.from_metadata(metadata, path)
    for flag, is_set in (("--raw", model_metadata.raw), ("--no-preprocess", model_metadata.preprocess != "uint8")):
        if is_set:
            raise DataError(f"{path}: exported with {flag}, which no backend supports. Export it again without {flag}.")
    if {output.name: output.dtype for output in outputs} != OUTPUT_DTYPES:
        raise _make_io_error(path, f"outputs {OUTPUT_DTYPES}", outputs)
    match [(tensor.name, tensor.dtype, tensor.shape) for tensor in inputs]:
        case [("images", "uint8", (batch, int(height), int(width), 3))]:
            return batch, (height, width)
        case [("images", "uint8", (batch, None, None, 3))]:
            return batch, None
    raise _make_io_error(path, "one input images uint8 (B, H, W, 3)", inputs)


def _make_io_error(path: Path, expected: str, actual: Sequence[TensorInfo]) -> DataError:
    listed = ", ".join(map(str, actual)) or "none"
    return DataError(f"{path}: not a model of hkd-export: expected {expected}, got {listed}.")


def make_closed_error(path: Path) -> ValueError:
    """Create the error for a call after `close`.

    Args:
        path: The model file.

    Returns:
        The error, for the caller to raise.
    """
    return ValueError(f"{path}: the model is closed. Call it inside its `with` block.")


@dataclass(frozen=True)
class StageTimes:
    """Wall-clock times of one image.

    Attributes:
        preprocess_ms: Check, letterbox and, outside the graph, normalization. Near zero if the graph letterboxes.
        inference_ms: Execution of the graph.
        postprocess_ms: Conversion of the boxes to image pixels and, outside the graph, decoding and NMS.
    """

    preprocess_ms: float
    inference_ms: float
    postprocess_ms: float

    @property
    def total_ms(self) -> float:
        """Time from the image to its detections."""
        return self.preprocess_ms + self.inference_ms + self.postprocess_ms


class Detector(ABC):
    """An opened detector. It keeps no state between calls.

    Attributes:
        metadata: Metadata of the model.
        backend: Name of the backend.
        device: Device that runs the model.
    """

    metadata: ModelMetadata
    backend: str
    device: str

    @overload
    def __call__(self, images_rgb: NDArray[np.uint8]) -> Detections: ...

    @overload
    def __call__(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]: ...

    def __call__(self, images_rgb: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> Detections | list[Detections]:
        """Run inference on one image or on a list of images.

        A list is processed in the largest batches that the graph accepts.

        Args:
            images_rgb (uint8[H, W, 3] or a list of such arrays): RGB images of any size.

        Returns:
            Detections in image pixels, for a list one entry per image.

        Raises:
            ValueError: An array is not an image.
            DataError: An image exceeds the limit of a graph that letterboxes.
        """
        if isinstance(images_rgb, (list, tuple)):
            return self.predict_batches(images_rgb)
        return self.predict_timed(images_rgb)[0]  # type: ignore[arg-type] # other sequences raise ValueError there

    @abstractmethod
    def predict_timed(self, image_rgb: NDArray[np.uint8]) -> tuple[Detections, StageTimes]:
        """Run inference on one image and measure the stages.

        Args:
            image_rgb (uint8[H, W, 3]): RGB image of any size.

        Returns:
            detections: Detections in image pixels.
            times: Time of each stage.

        Raises:
            ValueError: The array is not an image.
            DataError: The image exceeds the limit of a graph that letterboxes.
        """

    @abstractmethod
    def predict_batches(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Run inference on a list of images, in the largest batches that the graph accepts.

        Args:
            images_rgb (list of uint8[H, W, 3]): RGB images of any size.

        Returns:
            Detections in image pixels, one entry per image.

        Raises:
            ValueError: An array is not an image.
            DataError: An image exceeds the limit of a graph that letterboxes.
        """


def check_image(image_rgb: object) -> None:
    """Check the type and shape of an image.

    Args:
        image_rgb: Expected to be uint8[H, W, 3].

    Raises:
        ValueError: It is not.
    """
    if not isinstance(image_rgb, np.ndarray):
        raise ValueError(f"image: expected a uint8 array (H, W, 3), got {type(image_rgb).__name__}.")
    if image_rgb.dtype != np.uint8 or image_rgb.ndim != 3 or image_rgb.shape[2] != 3:
        raise ValueError(f"image: expected uint8 (H, W, 3), got {image_rgb.dtype} {image_rgb.shape}.")
    if image_rgb.size == 0:
        raise ValueError(f"image: expected at least one pixel, got shape {image_rgb.shape}.")
