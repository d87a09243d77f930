"""Recorded sources: every frame is given, in order, and a damaged file is said to be one."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from hkd_deploy.streams.base import Frame, FrameSource, sanitize_fps, wait_forever
from hkd_det.errors import DataError
from hkd_det.image import read_image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})


SLIDESHOW_FPS = 2.0  # a folder has no clock: long enough to look at each


DEFAULT_FPS = 25.0  # for the timestamps of a film that does not say


# Containers without an index estimate their frame count from the duration: a few per cent short is no damage.
MAX_MISSING_RATIO = 0.05


class ImageSource(FrameSource):
    """Picture files, one after the other; a photograph taken with the camera on its side is turned."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        super().__init__(name, is_live=False, fps=SLIDESHOW_FPS, num_frames=len(paths))
        self._paths = paths

    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:  # noqa: ARG002 (never waits)
        """Raises DataError, naming the file, for one that is truncated or no picture."""
        for index, path in enumerate(self._paths):
            yield Frame(read_image(path, apply_exif=True), index / SLIDESHOW_FPS)

    def close(self) -> None:
        """Nothing is held between pictures."""


class VideoSource(FrameSource):
    """A film file."""

    def __init__(self, path: Path) -> None:
        self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise DataError(
                f"{path}: not a film OpenCV can read (no film at all, or cut off); try playing it with ffplay"
            )
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = sanitize_fps(self._capture.get(cv2.CAP_PROP_FPS))
        super().__init__(str(path), is_live=False, fps=fps, num_frames=count if count > 0 else None)

    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:  # noqa: ARG002 (never waits)
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
        expected = self.num_frames or 1
        if index < expected * (1 - MAX_MISSING_RATIO):
            raise DataError(f"{self.name}: ends after {index} of {expected} frames: cut off or damaged; fetch it again")

    def close(self) -> None:
        """Close the file."""
        self._capture.release()


def list_images(folder: Path) -> list[Path]:
    """The picture files of a folder, by name; hidden ones and sub-folders are left out. DataError if there is none."""
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        raise DataError(f"{folder}: no pictures in this folder ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return paths
