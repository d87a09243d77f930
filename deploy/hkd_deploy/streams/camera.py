"""Live sources: a thread keeps the newest frame of a camera, and finds the camera again when it is lost.

The thread puts frames into a one-slot mailbox: the newest wins, so a slow detector sees the world as
it is now and not as it was. A lost camera is asked again after 1, 2, 4 ... 30 s; meanwhile there is
no frame, never a black or an old one.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Condition, Event, Thread

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.streams.base import Frame, FrameSource, sanitize_fps, wait_forever
from hkd_det.errors import UnavailableError

IDLE_INTERVAL_S = 0.1  # between two looks at a window's keys while no frame comes


@dataclass(frozen=True)
class ReconnectPolicy:
    """How long to wait for a camera, in seconds: to open, for a frame, before asking again at first and at most."""

    open_timeout_s: float = 5.0
    read_timeout_s: float = 5.0
    initial_backoff_s: float = 1.0
    max_backoff_s: float = 30.0

    def compute_backoff_s(self, num_failures: int) -> float:
        """Before the next try after so many failed ones: doubled each time, and up to a quarter off so that a
        room full of viewers does not ask a rebooted camera in step."""
        return min(self.max_backoff_s, self.initial_backoff_s * 2.0 ** min(num_failures, 30)) * random.uniform(
            0.75, 1.0
        )


class CameraSource(FrameSource):
    """A webcam (its index) or a network camera (its address)."""

    def __init__(self, address: int | str, name: str, hint: str, reconnect_policy: ReconnectPolicy) -> None:
        self._address = address
        self._reconnect_policy = reconnect_policy
        self._stop = Event()
        self._frame_condition = Condition()
        self._latest_frame: tuple[NDArray[np.uint8], float] | None = None  # BGR: converted only if somebody looks
        self._num_dropped = 0
        self._status = ""
        capture = _open_capture(address, reconnect_policy)
        found, picture_bgr = capture.read()
        if not found:
            capture.release()
            raise UnavailableError(f"{name}: gives no picture; {hint}")
        super().__init__(name, is_live=True, fps=sanitize_fps(capture.get(cv2.CAP_PROP_FPS)), num_frames=None)
        self._put_frame(picture_bgr)
        self._thread = Thread(target=self._run_capture_loop, args=(capture,), name=f"camera {name}", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Frames that a newer one took the place of before anybody looked."""
        return self._num_dropped

    @property
    def status(self) -> str:
        """`camera lost ...` from the loss until a frame comes again."""
        return self._status

    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:
        """The newest frame each time, never one twice; waits while there is none."""
        while not self._stop.is_set():
            with self._frame_condition:
                self._frame_condition.wait_for(lambda: self._latest_frame is not None, timeout=IDLE_INTERVAL_S)
                newest, self._latest_frame = self._latest_frame, None
            if newest is not None:
                picture_bgr, captured_s = newest
                yield Frame(cv2.cvtColor(picture_bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False), captured_s)
            elif not on_idle():
                return

    def close(self) -> None:
        """Stop the thread; waits for its last read, `Patience.read_s` at most."""
        self._stop.set()
        self._thread.join()

    def _put_frame(self, image_bgr: NDArray[np.uint8]) -> None:
        captured_s = time.monotonic()
        with self._frame_condition:
            self._num_dropped += self._latest_frame is not None
            self._latest_frame = (image_bgr, captured_s)
            self._frame_condition.notify()

    def _run_capture_loop(self, capture: cv2.VideoCapture) -> None:
        """The thread: read until the camera is lost, wait, open again."""
        failures = 0
        while True:
            if self._read_until_lost(capture):
                failures = 0
            capture.release()
            wait_s = self._reconnect_policy.compute_backoff_s(failures)
            failures += 1
            self._status = f"camera lost, asking again in {wait_s:.0f} s (try {failures})"
            if self._stop.wait(wait_s):
                return
            capture = _open_capture(self._address, self._reconnect_policy)

    def _read_until_lost(self, capture: cv2.VideoCapture) -> bool:
        """Read until nothing more comes; True if anything came."""
        came = False
        while not self._stop.is_set():
            found, picture_bgr = capture.read()
            if not found:
                break
            self._put_frame(picture_bgr)
            self._status = ""
            came = True
        return came


def _open_capture(address: int | str, reconnect_policy: ReconnectPolicy) -> cv2.VideoCapture:
    if isinstance(address, int):
        return cv2.VideoCapture(address)
    # Named, so that no other reader of OpenCV tries the address and prints it with its password.
    # FFmpeg prefers TCP for RTSP here: UDP loses packets and smears the picture.
    limits = [
        cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
        round(1e3 * reconnect_policy.open_timeout_s),
        cv2.CAP_PROP_READ_TIMEOUT_MSEC,
        round(1e3 * reconnect_policy.read_timeout_s),
    ]
    return cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)
