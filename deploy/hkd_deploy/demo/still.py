"""Writing one picture: what --save does for a source that is a single picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError
from hkd_det.files import replacing

STILL_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


class StillWriter:
    """A picture file to be."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, picture_rgb: NDArray[np.uint8], captured_s: float | None = None) -> None:  # noqa: ARG002
        """Write the picture, uint8 RGB (H, W, 3); its time does not matter."""
        if not cv2.imwrite(str(self._path), cv2.cvtColor(picture_rgb, cv2.COLOR_RGB2BGR)):
            raise DataError(f"{self._path.parent}: OpenCV cannot write a picture here; is the disk full?")


@contextmanager
def open_still(path: Path) -> Iterator[StillWriter]:
    """Write a picture to `path`, .png or .jpg; it appears when it is whole."""
    with replacing(path) as aside:
        yield StillWriter(aside)
