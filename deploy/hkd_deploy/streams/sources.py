"""Image sources: their interface, image files and live cameras.

Image files are returned in order, and damage raises an error. A live source returns the newest frame: a
thread writes to a buffer of one frame, and a new frame replaces an old one, so a slow detector processes current
images. The thread reopens a failed camera after 1, 2, 4 ... 30 s. Meanwhile the source returns no frames.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event, Thread
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError, UnavailableError
from hkd_det.image import IMAGE_SUFFIXES, read_image

MAX_GAP_S = 10.0  # longer gaps are pauses, or changes of a clock
SHORTENED_GAP_S = 2.0
SLIDESHOW_FPS = 2.0  # display rate of image files
IDLE_INTERVAL_S = 0.1  # interval of on_idle calls, which process the key events of a window


class Frame(NamedTuple):
    """One image with its time.

    Attributes:
        image_rgb (uint8[H, W, 3]): RGB.
        timestamp_s: Capture time by `time.monotonic()` for a live source, otherwise the position in the video.
    """

    image_rgb: NDArray[np.uint8]
    timestamp_s: float


def wait_forever() -> bool:
    """Return True: the default of `iterate_frames` waits without a limit."""
    return True


class FrameSource(ABC):
    """An opened image source. It can be iterated once.

    Args:
        name: Display name, without credentials.
        is_live: True if only the newest image is returned and late images are dropped.
        fps: Frames per second. None if unknown.
        num_frames: Number of frames. None if unknown or unlimited.
    """

    def __init__(self, name: str, is_live: bool, fps: float | None, num_frames: int | None) -> None:
        self.name = name
        self.is_live = is_live
        self.fps = fps
        self.num_frames = num_frames

    @property
    def num_dropped(self) -> int:
        """Number of frames that arrived but were not returned."""
        return 0

    @property
    def status(self) -> str:
        """Description of a connection problem. Empty if there is none."""
        return ""

    @abstractmethod
    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:
        """Iterate over the frames.

        Args:
            on_idle: Called about ten times per second while a live source has no frame. The iteration ends if it
                returns False.

        Yields:
            The frames.
        """

    def __iter__(self) -> Iterator[Frame]:
        return self.iterate_frames()

    @abstractmethod
    def close(self) -> None:
        """Close the file or the camera."""


def sanitize_fps(fps: float) -> float | None:
    """Replace frame rates that stand for unknown by None.

    Args:
        fps: Frame rate of a container or camera.

    Returns:
        The frame rate. None for 0, NaN, and clock rates above 1000.
    """
    return fps if 0 < fps <= 1000 else None


def limit_gap(gap_s: float, step_s: float) -> float:
    """Limit the time between two frames, so that a clock that jumps does not stop or stretch a video.

    Args:
        gap_s: Difference of two times of frames, seconds.
        step_s: Time between two frames at the frame rate, seconds.

    Returns:
        The difference. `step_s` if it is not positive. 2 s, or `step_s` if that is longer, if it is more than 10 s.
    """
    if not gap_s > 0:
        return step_s
    return gap_s if gap_s <= max(MAX_GAP_S, 2 * step_s) else max(SHORTENED_GAP_S, step_s)


class ImageSource(FrameSource):
    """Image files, in order.

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
            yield Frame(read_image(path), index / SLIDESHOW_FPS)

    def close(self) -> None:
        """Do nothing: no file stays open between frames."""


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


@dataclass(frozen=True)
class ReconnectPolicy:
    """Timeouts of a camera, seconds.

    Attributes:
        open_timeout_s: Limit for opening the camera.
        read_timeout_s: Limit for reading one frame.
        initial_backoff_s: Delay before the first attempt to reconnect.
        max_backoff_s: Largest delay between two attempts.
    """

    open_timeout_s: float = 5.0
    read_timeout_s: float = 5.0
    initial_backoff_s: float = 1.0
    max_backoff_s: float = 30.0

    def compute_backoff_s(self, num_failures: int) -> float:
        """Compute the delay before the next attempt: exponential, with up to 25 % random reduction.

        The random part prevents many clients from reconnecting to a rebooted camera at the same time.

        Args:
            num_failures: Number of failed attempts.

        Returns:
            The delay, seconds.
        """
        backoff_s = min(self.max_backoff_s, self.initial_backoff_s * 2.0 ** min(num_failures, 30))
        return backoff_s * random.uniform(0.75, 1.0)


class CameraSource(FrameSource):
    """A webcam or a network camera.

    Args:
        address: Index of a webcam or URL of a network camera.
        name: Display name, without credentials.
        hint: Advice for the error message if the camera returns no image.
        reconnect_policy: Timeouts.

    Raises:
        UnavailableError: The camera returns no image.
    """

    def __init__(self, address: int | str, name: str, hint: str, reconnect_policy: ReconnectPolicy) -> None:
        self._address = address
        self._reconnect_policy = reconnect_policy
        self._stop = Event()
        self._frame_condition = Condition()
        self._latest_frame: tuple[NDArray[np.uint8], float] | None = None  # BGR; converted only if it is returned
        self._num_dropped = 0
        self._status = ""
        capture = _open_capture(address, reconnect_policy)
        has_frame, image_bgr = capture.read()
        if not has_frame:
            capture.release()
            raise UnavailableError(f"{name}: the camera returns no image. {hint}")
        super().__init__(name, is_live=True, fps=sanitize_fps(capture.get(cv2.CAP_PROP_FPS)), num_frames=None)
        self._put_frame(image_bgr)
        self._thread = Thread(target=self._run_capture_loop, args=(capture,), name=f"camera {name}", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Number of frames that a newer frame replaced before they were returned."""
        return self._num_dropped

    @property
    def status(self) -> str:
        """`camera lost ...` from a failure until the next frame, otherwise empty."""
        return self._status

    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:
        """Iterate over the newest frames, each at most once.

        Args:
            on_idle: Called about ten times per second while there is no frame. The iteration ends if it returns False.

        Yields:
            The newest frame.
        """
        while not self._stop.is_set():
            with self._frame_condition:
                self._frame_condition.wait_for(lambda: self._latest_frame is not None, timeout=IDLE_INTERVAL_S)
                latest, self._latest_frame = self._latest_frame, None
            if latest is not None:
                image_bgr, captured_s = latest
                yield Frame(cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False), captured_s)
            elif not on_idle():
                return

    def close(self) -> None:
        """Stop the thread. Waits for its last read, at most `ReconnectPolicy.read_timeout_s`."""
        self._stop.set()
        self._thread.join()

    def _put_frame(self, image_bgr: NDArray[np.uint8]) -> None:
        captured_s = time.monotonic()
        with self._frame_condition:
            self._num_dropped += self._latest_frame is not None
            self._latest_frame = (image_bgr, captured_s)
            self._frame_condition.notify()

    def _run_capture_loop(self, capture: cv2.VideoCapture) -> None:
        """Body of the thread: read until the camera fails, wait, reopen."""
        num_failures = 0
        while True:
            if self._read_until_lost(capture):
                num_failures = 0
            capture.release()
            backoff_s = self._reconnect_policy.compute_backoff_s(num_failures)
            num_failures += 1
            self._status = f"camera lost, reconnecting in {backoff_s:.0f} s (attempt {num_failures})"
            if self._stop.wait(backoff_s):
                return
            capture = _open_capture(self._address, self._reconnect_policy)

    def _read_until_lost(self, capture: cv2.VideoCapture) -> bool:
        """Read until the camera fails. Return True if it returned at least one frame."""
        has_any_frame = False
        while not self._stop.is_set():
            has_frame, image_bgr = capture.read()
            if not has_frame:
                break
            self._put_frame(image_bgr)
            self._status = ""
            has_any_frame = True
        return has_any_frame


def _open_capture(address: int | str, reconnect_policy: ReconnectPolicy) -> cv2.VideoCapture:
    if isinstance(address, int):
        return cv2.VideoCapture(address)
    # With a named reader, OpenCV does not try other readers, which print the URL with its password.
    # FFmpeg uses TCP for RTSP: UDP loses packets, which corrupts images.
    timeouts = [
        cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
        round(1e3 * reconnect_policy.open_timeout_s),
        cv2.CAP_PROP_READ_TIMEOUT_MSEC,
        round(1e3 * reconnect_policy.read_timeout_s),
    ]
    return cv2.VideoCapture(address, cv2.CAP_FFMPEG, timeouts)
