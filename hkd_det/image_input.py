"""Images that Python users pass to a detector: arrays, files and PIL images.

PIL is optional and is never imported here before the caller has imported it.
"""

import importlib
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError
from hkd_det.image import read_image, scale_to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

ImageInput: TypeAlias = Union[NDArray[np.uint8], str, os.PathLike[str], "Image"]


class ImageReference:
    """Reference to the image of detections that does not keep its pixels in memory.

    Args:
        image: Image of the detections. Of a file, the path is kept; of an array or PIL image, a weak reference.
        bgr: Whether an array is BGR.
    """

    def __init__(self, image: ImageInput, bgr: bool) -> None:
        self.bgr = bgr
        self._resolve: Callable[[], Any] = (lambda: image) if is_path(image) else weakref.ref(image)

    def resolve(self) -> ImageInput | None:
        """Return the image, or None if the program has released it."""
        return self._resolve()


def load_image(image: ImageInput, bgr: bool = False) -> NDArray[np.uint8]:
    """Return the pixels of an image.

    Args:
        image: uint8 array (H, W, 3), image file or PIL image. Files and PIL images are turned upright by their EXIF
            orientation.
        bgr: True if an array is BGR, as from `cv2.imread`. No effect on files and PIL images.

    Returns:
        array[H, W, 3]: RGB, uint8. An RGB array is returned as it is.

    Raises:
        ValueError: The argument is not an image.
        DataError: The file is missing or is not a readable image.
    """
    if is_path(image):
        path = Path(image)
        if not path.is_file():
            problem = "expected an image file, got a directory" if path.is_dir() else "no such image file"
            raise DataError(f"{path}: {problem}. Pass the path of an image file, or a list of paths.")
        return read_image(path)
    if _is_pil_image(image):
        return _convert_pil_image(image)
    check_image(image)
    pixels: NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if bgr else np.asarray(image)
    return pixels


def is_path(image: object) -> TypeGuard[str | os.PathLike[str]]:
    """Return whether an image is given by its path.

    Args:
        image: Image of any type.
    """
    return isinstance(image, (str, os.PathLike))


def check_image(image_rgb: object) -> None:
    """Check the type and shape of an image array.

    Args:
        image_rgb: Expected to be uint8[H, W, 3].

    Raises:
        ValueError: It is not.
    """
    if not isinstance(image_rgb, np.ndarray):
        raise ValueError(
            f"image: expected a uint8 array (H, W, 3), a path or a PIL image, got {type(image_rgb).__name__}."
        )
    if image_rgb.dtype != np.uint8 or image_rgb.ndim != 3 or image_rgb.shape[2] != 3:
        hint = _suggest_conversion(image_rgb)
        raise ValueError(f"image: expected uint8 (H, W, 3), got {image_rgb.dtype} {image_rgb.shape}. {hint}")
    if image_rgb.size == 0:
        raise ValueError(f"image: expected at least one pixel, got shape {image_rgb.shape}.")


def _suggest_conversion(array: NDArray[Any]) -> str:
    """Name the conversion of an array to uint8 (H, W, 3)."""
    if array.ndim == 4:
        return "Pass a list of images."
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        return "Convert a gray image with cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)."
    if array.ndim == 3 and array.shape[2] == 4:
        return "Remove the alpha channel: image[..., :3]."
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        return "Move the channels to the end: image.transpose(1, 2, 0)."
    return "Convert the values to uint8, 0 to 255."


def _is_pil_image(image: object) -> bool:
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(image, pil.Image)


def _convert_pil_image(image: Any) -> NDArray[np.uint8]:
    """Convert a PIL image as `read_image` reads its file."""
    image = importlib.import_module("PIL.ImageOps").exif_transpose(image)
    if not image.width * image.height:
        raise ValueError(f"image: expected at least one pixel, got {image.width} x {image.height}.")
    if image.mode == "F":
        raise ValueError("image: expected a PIL image of integers, got mode F. Convert the values to uint8, 0 to 255.")
    if image.mode.startswith("I"):  # 16 bits per value
        gray = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        return scale_to_uint8(np.repeat(gray[..., None], 3, axis=2))
    return np.asarray(image.convert("RGB"))
