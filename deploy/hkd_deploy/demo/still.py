"""Writing one picture: what --save does for a source that is a single picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError
from hkd_det.files import atomic_write

IMAGE_OUTPUT_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


class ImageWriter:
    """A picture file to be."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, image_rgb: NDArray[np.uint8], captured_s: float | None = None) -> None:  # noqa: ARG002
        """Write the picture, uint8 RGB (H, W, 3); its time does not matter."""
        if not cv2.imwrite(str(self._path), cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)):
            raise DataError(f"{self._path.parent}: OpenCV cannot write a picture here; is the disk full?")


@contextmanager
def open_image_writer(path: Path) -> Iterator[ImageWriter]:
    """Write a picture to `path`, .png or .jpg; it appears when it is whole."""
    with atomic_write(path) as aside:
        yield ImageWriter(aside)
