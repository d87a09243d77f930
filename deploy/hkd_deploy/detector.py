"""Interface of a detector: images to detections in image pixels, with the time of each stage."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.model_metadata import ModelMetadata
from hkd_det.structures import Detections


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
