"""Writing a film: there whole, or as far as it came, and always playable.

Writing one picture: what --save does for a source that is a single picture.

A window on the screen, where there is one.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError
from hkd_det.files import atomic_write
from hkd_det.letterbox import Letterbox

# What the pip wheels of OpenCV can write: no H.264. Browsers play only the .webm.
ENCODERS = {".mp4": "mp4v", ".avi": "MJPG", ".webm": "VP80"}


MAX_GAP_S = 2.0  # a longer silence of a live source is cut to this


class VideoWriter:
    """An open film; the first frame fixes its size, later ones of another size are letterboxed into it."""

    def __init__(self, path: Path, fps: float) -> None:
        self._path = path
        self._fps = fps
        self._size_hw = (0, 0)
        self._first_s = 0.0
        self._writer: cv2.VideoWriter | None = None
        self.num_frames = 0

    def write(self, image_rgb: NDArray[np.uint8], captured_s: float | None = None) -> None:
        """Append a frame, uint8 RGB (H, W, 3).

        captured_s: of a live source, whose frames come unevenly: the picture is held until the film is at that
        time, so that a minute of street is a minute of film.
        """
        size_hw = (image_rgb.shape[0], image_rgb.shape[1])
        if self._writer is None:
            self._writer = self._open(size_hw)
            self._size_hw, self._first_s = size_hw, captured_s or 0.0
        if size_hw != self._size_hw:
            image_rgb = Letterbox(size_hw, self._size_hw).apply(image_rgb)
        picture_bgr = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
        for _ in range(1 if captured_s is None else self._count_due_frames(captured_s)):
            self._writer.write(picture_bgr)
            self.num_frames += 1

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()

    def _open(self, size_hw: tuple[int, int]) -> cv2.VideoWriter:
        encoder = cv2.VideoWriter.fourcc(*ENCODERS[self._path.suffix.lower()])
        writer = cv2.VideoWriter(str(self._path), cv2.CAP_FFMPEG, encoder, self._fps, size_hw[::-1])
        if not writer.isOpened():
            shape = f"{size_hw[1]}x{size_hw[0]} at {self._fps:g} fps"
            raise DataError(f"{self._path.parent}: OpenCV cannot write a {self._path.suffix} film of {shape} here")
        return writer

    def _count_due_frames(self, captured_s: float) -> int:
        """Frames the film is behind `captured_s`: at least one, as each picture is kept."""
        longest = round(MAX_GAP_S * self._fps) + 1
        due = round((captured_s - self._first_s) * self._fps) + 1 - self.num_frames
        if due > longest:
            self._first_s += (due - longest) / self._fps
        return min(max(1, due), longest)


@contextmanager
def open_video_writer(path: Path, fps: float) -> Iterator[VideoWriter]:
    """Write a film to `path`, .mp4, .avi or .webm, at `fps` frames a second; it appears when it is finished.

    On Ctrl-C or an error of the source the film so far is finished and kept; the error goes on.
    Raises UsageError for another suffix, DataError if no frame came or the disk did not take them all.
    """
    if path.suffix.lower() not in ENCODERS:
        raise UsageError(f"--save {path}: expected a file ending in {', '.join(ENCODERS)}")
    stopped: BaseException | None = None
    with atomic_write(path) as aside:
        film = VideoWriter(aside, fps)
        try:
            yield film
        except (KeyboardInterrupt, HkdError) as stop:
            if film.num_frames == 0:
                raise
            stopped = stop
        finally:
            film.close()
        _check_video_file(aside, path, film.num_frames)
    if stopped is not None:
        raise stopped


def _check_video_file(temp_path: Path, path: Path, num_frames: int) -> None:
    """OpenCV says nothing when the disk is full: read the finished film's own count."""
    if num_frames == 0:
        raise DataError(f"{path}: not written, no frame came")
    reader = cv2.VideoCapture(str(temp_path), cv2.CAP_FFMPEG)
    found = reader.get(cv2.CAP_PROP_FRAME_COUNT) if reader.isOpened() else 0
    playable = reader.isOpened() and reader.read()[0]
    reader.release()
    if not playable or found < 0.99 * num_frames - 1:  # .webm has no count, only a duration
        raise DataError(f"{path}: the film could not be written whole; is the disk full?")


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


CLOSE_KEYS = (ord("q"), ord("Q"), 27)  # 27 is Esc


class Window:
    """An open window. It closes at q, Esc or its own button."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._is_shown = False

    def show(self, image_rgb: NDArray[np.uint8]) -> None:
        """Show a picture, uint8 RGB (H, W, 3)."""
        cv2.imshow(self._title, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))
        self._is_shown = True

    def is_open(self, wait_ms: int = 1) -> bool:
        """Let the window breathe for `wait_ms`, at least 1; False once the user has closed it."""
        if cv2.waitKey(max(1, wait_ms)) & 0xFF in CLOSE_KEYS:
            return False
        # Asked only after the first picture: some window systems report a window as hidden until then.
        return not self._is_shown or cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) >= 1


@contextmanager
def open_window(title: str) -> Iterator[Window]:
    """Open a window; UnavailableError, with what to do, where OpenCV or the machine has none."""
    reason = display_error(cv2.getBuildInformation(), sys.platform, os.environ)
    if reason:
        raise UnavailableError(reason)
    try:
        cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
    except cv2.error as error:
        raise UnavailableError(f"no window: {str(error).strip()}; save a film instead: --save out.mp4") from None
    try:
        yield Window(title)
    finally:
        cv2.destroyAllWindows()


def display_error(build_information: str, platform: str, environment: Mapping[str, str]) -> str:
    """Why no window can be opened, and what to do; empty if one can.

    Asked first, as OpenCV's Qt ends the whole process when it finds no display.
    """
    if re.search(r"^\s*GUI:\s*NONE\s*$", build_information, re.MULTILINE):
        return (
            "no window: this OpenCV is built without them; save a film instead (--save out.mp4), or "
            "pip uninstall -y opencv-python-headless && pip install opencv-python"
        )
    if platform.startswith("linux") and not (environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")):
        return "no window: no display here (DISPLAY is not set); save a film instead: --save out.mp4 --no-window"
    return ""
