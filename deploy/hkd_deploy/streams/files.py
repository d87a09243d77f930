"""Recorded sources: image files and videos. All frames are returned in order, and damage raises an error."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from hkd_deploy.streams.base import Frame, FrameSource, sanitize_fps, wait_forever
from hkd_det.errors import DataError
from hkd_det.image import IMAGE_SUFFIXES, read_image

SLIDESHOW_FPS = 2.0  # display rate of image files
DEFAULT_FPS = 25.0  # for timestamps of a video without a frame rate
# Containers without an index estimate the frame count from the duration, which can differ by some percent.
MAX_MISSING_RATIO = 0.05


class ImageSource(FrameSource):
    """Image files, in order. The EXIF orientation is applied.

    Args:
        name: Display name.
        paths: The image files.
    """

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        super().__init__(name, is_live=False, fps=SLIDESHOW_FPS, num_frames=len(paths))
        self._paths = paths

    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:  # noqa: ARG002 - not live
        """Iterate over the images.

        Args:
            on_idle: No effect.

        Yields:
            The images, with timestamps at 2 frames per second.

        Raises:
            DataError: A file is damaged.
        """
        for index, path in enumerate(self._paths):
            yield Frame(read_image(path, apply_exif=True), index / SLIDESHOW_FPS)

    def close(self) -> None:
        """Do nothing: no file stays open between frames."""


class VideoSource(FrameSource):
    """A video file.

    Args:
        path: The video.

    Raises:
        DataError: OpenCV cannot read the file.
    """

    def __init__(self, path: Path) -> None:
        self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise DataError(f"{path}: not a readable video (wrong format or truncated). Try to play it with ffplay.")
        num_frames = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = sanitize_fps(self._capture.get(cv2.CAP_PROP_FPS))
        super().__init__(str(path), is_live=False, fps=fps, num_frames=num_frames if num_frames > 0 else None)

    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:  # noqa: ARG002 - not live
        """Iterate over the frames.

        Args:
            on_idle: No effect.

        Yields:
            The frames, with their position in the video as timestamp.

        Raises:
            DataError: More than 5 % of the frames are missing at the end, or there is no frame.
        """
        # The timestamp counts frames: CAP_PROP_POS_MSEC is -18 s or 0 for an AVI with B-frames.
        step_s = 1 / (self.fps or DEFAULT_FPS)
        index = 0
        while True:
            has_frame, image_bgr = self._capture.read()
            if not has_frame:
                break
            yield Frame(cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False), index * step_s)
            index += 1
        expected = self.num_frames or 1
        if index < expected * (1 - MAX_MISSING_RATIO):
            raise DataError(
                f"{self.name}: expected {expected} frames, got {index} (truncated or damaged). Copy the video again."
            )

    def close(self) -> None:
        """Close the file."""
        self._capture.release()


def list_images(folder: Path) -> list[Path]:
    """List the image files of a directory by name, without hidden files and subdirectories.

    Args:
        folder: The directory.

    Returns:
        The paths, sorted.

    Raises:
        DataError: The directory contains no images.
    """
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        raise DataError(f"{folder}: no images in this directory. Supported types: {' '.join(sorted(IMAGE_SUFFIXES))}.")
    return paths
