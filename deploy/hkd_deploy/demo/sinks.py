"""Outputs of the demo as `FrameSink`: saved files, and a window with one or several cameras."""

import errno
import math
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.output import (
    ENCODERS,
    IMAGE_OUTPUT_SUFFIXES,
    Window,
    check_video_suffix,
    open_image_writer,
    open_video_writer,
)
from hkd_deploy.streams import FrameSource
from hkd_det.draw import draw_overlay
from hkd_det.errors import UsageError
from hkd_det.letterbox import Letterbox

DEFAULT_OUTPUT_FPS = 25.0  # frame rate of a saved video if the source has none
GRID_HW = (720, 1280)  # size of the window with several cameras, pixels


class FrameWriter(Protocol):
    """A video or an image that is written."""

    def write(self, image_rgb: NDArray[np.uint8], captured_s: float | None = None) -> None:
        """Append a frame.

        Args:
            image_rgb (uint8[H, W, 3]): RGB.
            captured_s: Capture time of a live source or position in a recorded one, seconds.
        """


class FileSink:
    """The file of `--save` of one camera: an image if the source is one image, otherwise a video.

    The file is opened with the first frame, because the frame rate of a camera is known when it is open.

    Args:
        path: The file.
        source: The source, opened or opening.

    Attributes:
        path: The file.
        is_saved: Whether the file was written.

    Raises:
        UsageError: The suffix is not supported, or the file is the source itself.
        OSError: The directory cannot be written.
    """

    def __init__(self, path: Path, source: FrameSource) -> None:
        if path.exists() and Path(source.name).exists() and path.samefile(source.name):
            raise UsageError(f"--save {path}: this file is the source. Choose another name.")
        self._is_image = path.suffix.lower() in IMAGE_OUTPUT_SUFFIXES and source.num_frames == 1
        if not self._is_image:
            check_video_suffix(path)
        _check_directory(path)
        self.path, self.is_saved = path, False
        self._source = source
        self._stack = ExitStack()
        self._writer: FrameWriter | None = None

    def write(self, result: FrameResult) -> None:
        """Append the frame with its boxes; see `FrameSink.write`."""
        if self._writer is None:
            self._writer = self._stack.enter_context(self._open())
        self._writer.write(result.drawn_rgb, result.timestamp_s)

    def _open(self) -> AbstractContextManager[FrameWriter]:
        if self._is_image:
            return open_image_writer(self.path)
        return open_video_writer(self.path, self._source.fps or DEFAULT_OUTPUT_FPS)

    def write_status(self, camera: str, status: str) -> None:
        """Do nothing: a loss of the camera is a gap in the video."""

    def close(self) -> None:
        """Complete the file. Without a frame there is none.

        Raises:
            DataError: The disk is full.
        """
        self._stack.close()
        self.is_saved = self._writer is not None


class WindowSink:
    """Shows one camera in its size, or several in a grid.

    Args:
        window: The window.
        cameras: Names of all cameras.
    """

    def __init__(self, window: Window, cameras: Sequence[str]) -> None:
        self._window = window
        self._images: dict[str, NDArray[np.uint8] | None] = dict.fromkeys(cameras)
        self._warnings = dict.fromkeys(cameras, "")
        self._is_changed = False

    def write(self, result: FrameResult) -> None:
        """Update the image of a camera; see `FrameSink.write`."""
        self._images[result.camera], self._warnings[result.camera] = result.drawn_rgb, ""
        self._is_changed = True

    def write_status(self, camera: str, status: str) -> None:
        """Darken the last image of a camera that is lost and show the status; see `FrameSink.write_status`."""
        self._warnings[camera] = status if status.startswith(("camera lost", "ended")) else ""
        self._is_changed = True

    def close(self) -> None:
        """Do nothing: `open_window` closes the window."""

    def is_open(self, wait_ms: int = 1) -> bool:
        """Show changes, process window events and return whether the window is open.

        Args:
            wait_ms: Time for events, at least 1 ms.

        Returns:
            False after the user closed the window.
        """
        images = [self._render(camera) for camera in self._images] if self._is_changed else []
        if len(images) > 1 or any(image is not None for image in images):
            self._window.show(arrange_grid(images))
        self._is_changed = False
        return self._window.is_open(wait_ms)

    def _render(self, camera: str) -> NDArray[np.uint8] | None:
        image, warning = self._images[camera], self._warnings[camera]
        if warning:
            image = np.zeros((*GRID_HW, 3), np.uint8) if image is None else image // 3
            draw_overlay(image, [camera], warning=warning)
        return image


def arrange_grid(images: Sequence[NDArray[np.uint8] | None]) -> NDArray[np.uint8]:
    """Arrange the images of cameras in a grid.

    Args:
        images (list of uint8[H, W, 3]): RGB. None for a camera without an image, whose cell is black.

    Returns:
        A single image itself; otherwise the images, letterboxed to cells of an image of 1280x720.
    """
    if len(images) == 1 and images[0] is not None:
        return images[0]
    num_columns = math.ceil(math.sqrt(len(images)))
    num_rows = math.ceil(len(images) / num_columns)
    cell_hw = (GRID_HW[0] // num_rows, GRID_HW[1] // num_columns)
    grid = np.zeros((*GRID_HW, 3), np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, num_columns)
        y, x = row * cell_hw[0], column * cell_hw[1]
        if image is not None:
            letterbox = Letterbox((image.shape[0], image.shape[1]), cell_hw)
            grid[y : y + cell_hw[0], x : x + cell_hw[1]] = letterbox.apply(image)
    return grid


def make_file_paths(folder: Path, cameras: Sequence[str], suffix: str = ".mp4", flag: str = "--save") -> list[Path]:
    """Create the names of the files of several cameras.

    Args:
        folder: Directory.
        cameras: Names of the cameras.
        suffix: Suffix of the files.
        flag: Flag of the directory, for messages.

    Returns:
        One file per camera. Characters that are special in file names become `_`.

    Raises:
        UsageError: The directory has the suffix of a file.
    """
    if folder.suffix.lower() in ENCODERS or folder.suffix.lower() in IMAGE_OUTPUT_SUFFIXES:
        raise UsageError(f"{flag} {folder}: expected a directory, because there are {len(cameras)} cameras.")
    paths: list[Path] = []
    for camera in cameras:
        stem = re.sub(r"[^\w.-]+", "_", camera).strip("._") or "camera"
        number, path = 1, folder / f"{stem}{suffix}"
        while path in paths:
            number += 1
            path = folder / f"{stem}_{number}{suffix}"
        paths.append(path)
    return paths


def _check_directory(path: Path) -> None:
    """Raise OSError if the directory of a file cannot be created or written."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(existing))
    if not os.access(existing, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))
