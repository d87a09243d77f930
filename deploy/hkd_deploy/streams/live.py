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

from hkd_deploy.streams.frames import Frame, FrameSource, carry_on, plausible_fps
from hkd_det.errors import UnavailableError

WAITING_S = 0.1  # between two looks at a window's keys while no frame comes


@dataclass(frozen=True)
class Patience:
    """How long to wait for a camera, in seconds: to open, for a frame, before asking again at first and at most."""

    open_s: float = 5.0
    read_s: float = 5.0
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0

    def wait_s(self, failures: int) -> float:
        """Before the next try after so many failed ones: doubled each time, and up to a quarter off so that a
        room full of viewers does not ask a rebooted camera in step."""
        return min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(failures, 30)) * random.uniform(0.75, 1.0)


class LiveSource(FrameSource):
    """A webcam (its index) or a network camera (its address)."""

    def __init__(self, address: int | str, name: str, remedy: str, patience: Patience) -> None:
        self._address = address
        self._patience = patience
        self._stop = Event()
        self._mailbox = Condition()
        self._newest: tuple[NDArray[np.uint8], float] | None = None  # BGR: converted only if somebody looks
        self._overwritten = 0
        self._trouble = ""
        capture = _open(address, patience)
        found, picture_bgr = capture.read()
        if not found:
            capture.release()
            raise UnavailableError(f"{name}: gives no picture; {remedy}")
        super().__init__(name, live=True, fps=plausible_fps(capture.get(cv2.CAP_PROP_FPS)), frame_count=None)
        self._put(picture_bgr)
        self._thread = Thread(target=self._watch, args=(capture,), name=f"camera {name}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Frames that a newer one took the place of before anybody looked."""
        return self._overwritten

    @property
    def trouble(self) -> str:
        """`camera lost ...` from the loss until a frame comes again."""
        return self._trouble

    def frames(self, waiting: Callable[[], bool] = carry_on) -> Iterator[Frame]:
        """The newest frame each time, never one twice; waits while there is none."""
        while not self._stop.is_set():
            with self._mailbox:
                self._mailbox.wait_for(lambda: self._newest is not None, timeout=WAITING_S)
                newest, self._newest = self._newest, None
            if newest is not None:
                picture_bgr, captured_s = newest
                yield Frame(cv2.cvtColor(picture_bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False), captured_s)
            elif not waiting():
                return

    def close(self) -> None:
        """Stop the thread; waits for its last read, `Patience.read_s` at most."""
        self._stop.set()
        self._thread.join()

    def _put(self, picture_bgr: NDArray[np.uint8]) -> None:
        captured_s = time.monotonic()
        with self._mailbox:
            self._overwritten += self._newest is not None
            self._newest = (picture_bgr, captured_s)
            self._mailbox.notify()

    def _watch(self, capture: cv2.VideoCapture) -> None:
        """The thread: read until the camera is lost, wait, open again."""
        failures = 0
        while True:
            if self._read_on(capture):
                failures = 0
            capture.release()
            wait_s = self._patience.wait_s(failures)
            failures += 1
            self._trouble = f"camera lost, asking again in {wait_s:.0f} s (try {failures})"
            if self._stop.wait(wait_s):
                return
            capture = _open(self._address, self._patience)

    def _read_on(self, capture: cv2.VideoCapture) -> bool:
        """Read until nothing more comes; True if anything came."""
        came = False
        while not self._stop.is_set():
            found, picture_bgr = capture.read()
            if not found:
                break
            self._put(picture_bgr)
            self._trouble = ""
            came = True
        return came


def _open(address: int | str, patience: Patience) -> cv2.VideoCapture:
    if isinstance(address, int):
        return cv2.VideoCapture(address)
    # Named, so that no other reader of OpenCV tries the address and prints it with its password.
    # FFmpeg prefers TCP for RTSP here: UDP loses packets and smears the picture.
    limits = [
        cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
        round(1e3 * patience.open_s),
        cv2.CAP_PROP_READ_TIMEOUT_MSEC,
        round(1e3 * patience.read_s),
    ]
    return cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)
