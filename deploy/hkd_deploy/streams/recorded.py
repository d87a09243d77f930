"""Recorded sources: every frame is given, in order, and a damaged file is said to be one."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from hkd_deploy.streams.frames import Frame, FrameSource, carry_on, plausible_fps
from hkd_det.datasets.sample import read_picture
from hkd_det.errors import DataError

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
PICTURES_PER_S = 2.0  # a folder has no clock: long enough to look at each
DEFAULT_FPS = 25.0  # for the timestamps of a film that does not say

# Containers without an index estimate their frame count from the duration: a few per cent short is no damage.
SHORT = 0.05


class Pictures(FrameSource):
    """Picture files, one after the other; a photograph taken with the camera on its side is turned."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        super().__init__(name, live=False, fps=PICTURES_PER_S, frame_count=len(paths))
        self._paths = paths

    def frames(self, waiting: Callable[[], bool] = carry_on) -> Iterator[Frame]:  # noqa: ARG002 (never waits)
        """Raises DataError, naming the file, for one that is truncated or no picture."""
        for index, path in enumerate(self._paths):
            yield Frame(read_picture(path, upright=True), index / PICTURES_PER_S)

    def close(self) -> None:
        """Nothing is held between pictures."""


class Film(FrameSource):
    """A film file."""

    def __init__(self, path: Path) -> None:
        self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise DataError(
                f"{path}: not a film OpenCV can read (no film at all, or cut off); try playing it with ffplay"
            )
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = plausible_fps(self._capture.get(cv2.CAP_PROP_FPS))
        super().__init__(str(path), live=False, fps=fps, frame_count=count if count > 0 else None)

    def frames(self, waiting: Callable[[], bool] = carry_on) -> Iterator[Frame]:  # noqa: ARG002 (never waits)
        """Raises DataError after the last readable frame if many are missing, or if there is none."""
        # Counted, not CAP_PROP_POS_MSEC: FFmpeg gives -18 s and zeros there for an AVI with B-frames.
        step_s = 1 / (self.fps or DEFAULT_FPS)
        index = 0
        while True:
            found, picture_bgr = self._capture.read()
            if not found:
                break
            yield Frame(cv2.cvtColor(picture_bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False), index * step_s)
            index += 1
        expected = self.frame_count or 1
        if index < expected * (1 - SHORT):
            raise DataError(f"{self.name}: ends after {index} of {expected} frames: cut off or damaged; fetch it again")

    def close(self) -> None:
        """Close the file."""
        self._capture.release()


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, by name; hidden ones and sub-folders are left out. DataError if there is none."""
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        raise DataError(f"{folder}: no pictures in this folder ({' '.join(sorted(PICTURE_SUFFIXES))})")
    return paths
