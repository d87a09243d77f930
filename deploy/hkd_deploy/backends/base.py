"""Interfaces of a runtime backend and of a detector, and the check of models.

A backend runs a graph. A detector converts images to detections in image pixels, with the time of each stage.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.model_metadata import ModelMetadata, TensorInfo
from hkd_det.config import check_range
from hkd_det.errors import DataError
from hkd_det.image import ImageInput, ImageReference, is_path, load_image
from hkd_det.structures import Detections

# boxes [B, K, 4] float32 xyxy, scores [B, K] float32, count [B] int64
RuntimeOutputs = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
PerformanceHint = Literal["latency", "throughput"]

INPUT_NAME, INPUT_DTYPE = "images", "uint8"
OUTPUT_DTYPES = {"boxes": "float32", "scores": "float32", "count": "int64"}

DEFAULT_CONF = 0.3  # minimum score if the model file does not suggest one
MAX_LOADED_FILES = 64  # images of a list of files that are in memory at the same time


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
    return ValueError(f"{path}: the model is closed. Call it before `close`, inside its `with` block.")


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
    """An opened detector, ready to use. It keeps no state between calls.

    A detector is released by `close`, at the end of its `with` block, or when the program releases it.

    Attributes:
        metadata: Metadata of the model.
        backend: Name of the backend.
        device: Device that runs the model.
        max_batch: Largest batch of `predict_timed_batch` that is one call of the graph. None for no limit.
    """

    metadata: ModelMetadata
    backend: str
    device: str
    max_batch: int | None = 1
    _release: Callable[[], object] | None = None

    @overload
    def __call__(  # type: ignore[overload-overlap] # a str is a sequence of str
        self, images: ImageInput, *, bgr: bool = False, conf: float | None = None
    ) -> Detections: ...

    @overload
    def __call__(
        self, images: Sequence[ImageInput], *, bgr: bool = False, conf: float | None = None
    ) -> list[Detections]: ...

    def __call__(
        self, images: ImageInput | Sequence[ImageInput], *, bgr: bool = False, conf: float | None = None
    ) -> Detections | list[Detections]:
        """Run inference on one image or on a list of images.

        A list is processed in the largest batches that the graph accepts. Files of a list are read in parts of
        `MAX_LOADED_FILES`, so that a list can be longer than the memory.

        Args:
            images: uint8 array (H, W, 3), path of an image file, PIL image, or a list of them, of any size. Files and
                PIL images are turned upright by their EXIF orientation.
            bgr: True if arrays are BGR, as from OpenCV. No effect on files and PIL images.
            conf: Minimum score, 0 to 1. None for all detections, as a miss rate needs them. `default_conf` is a
                value to show or count persons.

        Returns:
            Detections in image pixels, for a list one entry per image.

        Raises:
            ValueError: An argument is not an image, or the detector is closed.
            UsageError: `conf` is outside 0 to 1.
            DataError: A file is missing or is not a readable image, or an image exceeds the limit of a graph that
                letterboxes.
        """
        if conf is not None:
            check_range("conf", conf, 0, 1)
        if isinstance(images, (list, tuple)):
            step = MAX_LOADED_FILES if any(map(is_path, images)) else max(1, len(images))
            parts = [images[start : start + step] for start in range(0, len(images), step)]
            results = [detections for part in parts for detections in self._predict_images(part, bgr)]
            return [_finish(*pair, bgr, conf) for pair in zip(results, images, strict=True)]
        image: ImageInput = images  # type: ignore[assignment] # load_image raises for other sequences
        return _finish(self.predict_timed(load_image(image, bgr))[0], image, bgr, conf)

    def __enter__(self) -> "Detector":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def default_conf(self) -> float:
        """Suggested minimum score: `hkd.conf` of the metadata, or 0.3 if the file does not contain it."""
        return DEFAULT_CONF if self.metadata.conf is None else self.metadata.conf

    def attach_resources(self, resources: ExitStack) -> None:
        """Take over resources, to release them once: in `close`, with the detector, or at the end of the program.

        Args:
            resources: Opened resources. They must not refer to the detector.
        """
        self._release = weakref.finalize(self, resources.close)

    def close(self) -> None:
        """Release the model. Later calls raise ValueError; a second `close` has no effect."""
        if self._release:
            self._release()

    def _predict_images(self, images: Sequence[ImageInput], bgr: bool) -> list[Detections]:
        return self.predict_batches([load_image(image, bgr) for image in images])

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

    def predict_timed_batch(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[tuple[Detections, StageTimes]]:
        """Run inference on a list of images and measure the stages.

        Args:
            images_rgb (list of uint8[H, W, 3]): RGB images of any size.

        Returns:
            Detections in image pixels and time of each stage, one entry per image. Images of one batch have the times
            of the batch.

        Raises:
            ValueError: An array is not an image.
            DataError: An image exceeds the limit of a graph that letterboxes.
        """
        return [self.predict_timed(image) for image in images_rgb]

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


def _finish(detections: Detections, image: ImageInput, bgr: bool, conf: float | None) -> Detections:
    """Apply the minimum score and add the reference to the image."""
    kept = detections if conf is None else detections.filter(conf)
    return replace(kept, source=ImageReference(image, bgr))
