"""Live sources: the newest frame of a camera, with its age, across losses of the connection.

A thread reads the camera and writes to a buffer of one frame. A new frame replaces an old one, so a slow detector
processes current images. A camera that fails is opened again. Until it answers, the source returns nothing, and a
frame from before the loss is never returned after it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Condition, Event, Thread
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.streams.sources import Frame, FrameSource, sanitize_fps, wait_forever
from hkd_det.errors import DataError, UnavailableError

IDLE_INTERVAL_S = 0.1  # interval of on_idle calls, which process the key events of a window
CLOSE_TIMEOUT_S = 0.5  # a read of a camera that hangs is not waited for
THUMBNAIL_WH = (64, 36)
FROZEN_DIFFERENCE = 2  # largest change of a gray value of the thumbnail; an encoder that repeats an image makes 1
FROZEN_AFTER_S = 4.0
LATE_AFTER_S = 1.0  # age of a frame that is reported
MAX_DOUBLINGS = 16  # of the delay after a refused login, whose limit is reached before


@dataclass(frozen=True)
class ReconnectPolicy:
    """Timeouts of a camera, seconds.

    Attributes:
        open_timeout_s: Limit for opening the camera.
        read_timeout_s: Limit for reading one frame.
        key_frame_timeout_s: Limit for the first image of an opened stream. Cameras send up to 20 s without a key frame.
        retry_s: Delay before the camera is opened again.
        login_retry_s: Delay after a refused login. It grows by a factor of 2 with each further one, because cameras
            lock accounts after a few wrong passwords.
        max_login_retry_s: Largest delay after a refused login.
    """

    open_timeout_s: float = 5.0
    read_timeout_s: float = 5.0
    key_frame_timeout_s: float = 25.0
    retry_s: float = 0.5
    login_retry_s: float = 10.0
    max_login_retry_s: float = 60.0


class LoginError(UnavailableError):
    """A camera refuses user and password."""


class CameraFrame(NamedTuple):
    """A decoded image of a camera, converted only if it is returned.

    Attributes:
        to_rgb: Returns the image (uint8[H, W, 3]). Raises DataError if it is damaged.
        captured_s: Capture time by `time.monotonic()`.
    """

    to_rgb: Callable[[], NDArray[np.uint8]]
    captured_s: float


class CameraReader(Protocol):
    """One connection to a camera."""

    @property
    def fps(self) -> float | None:
        """Frame rate. None if unknown."""
        ...

    @property
    def decoder(self) -> str:
        """Device that decoded the last frame: `cpu`, `cuda` ... Empty if no hardware decoder was requested."""
        ...

    def read(self) -> CameraFrame:
        """Wait for the next frame.

        Raises:
            UnavailableError: The connection is lost.
        """
        ...

    def close(self) -> None:
        """Close the connection."""


class LiveSource(FrameSource):
    """The newest frames of a camera.

    Args:
        name: Display name, without credentials.
        open_reader: Opens a connection.
        reconnect_policy: Timeouts.
        on_frame: Called by the thread of the camera after each frame that it receives. None waits until the camera is
            open. With a function, the camera opens in the background: while it fails, `open_error` is set, and it is
            opened again.

    Attributes:
        open_error: Error of the last attempt to open the camera. None after the first image.

    Raises:
        UnavailableError: The camera returns no image, and `on_frame` is None.
    """

    def __init__(
        self,
        name: str,
        open_reader: Callable[[], CameraReader],
        reconnect_policy: ReconnectPolicy,
        on_frame: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(name, is_live=True, fps=None, num_frames=None)
        self._open_reader = open_reader
        self._reconnect_policy = reconnect_policy
        self._stop, self._is_opened = Event(), Event()
        self._on_frame = on_frame
        self.open_error: UnavailableError | None = None
        self._condition = Condition()
        self._latest: CameraFrame | None = None
        self._num_dropped = self._num_refused = 0
        self._status = ""
        self._thumbnail: NDArray[np.uint8] | None = None
        self._changed_s = self._received_s = self._stopped_s = time.monotonic()
        # A daemon, and opened by the thread: a signal ends the program also while a camera hangs.
        self._thread = Thread(target=self._run, name=f"camera {name}", daemon=True)
        self._thread.start()
        if on_frame is None:
            self._wait_until_open()

    def _wait_until_open(self) -> None:
        try:
            self._is_opened.wait()
        except BaseException:
            self._stop.set()
            raise
        if self.open_error:
            raise self.open_error

    @property
    def num_dropped(self) -> int:
        """Number of frames that a newer frame replaced before they were returned."""
        return self._num_dropped

    @property
    def status(self) -> str:
        """`camera lost ...` from a failure until the next frame; late or unchanged images; otherwise empty."""
        return self._status

    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:
        """Iterate over the newest frames, each at most once.

        Args:
            on_idle: Called about ten times per second while there is no frame. The iteration ends if it returns False.

        Yields:
            The newest frame.
        """
        while not self._stop.is_set():
            frame = self.take_frame(IDLE_INTERVAL_S)
            if frame is not None:
                yield frame
            elif not on_idle():
                return

    def take_frame(self, timeout_s: float = 0.0) -> Frame | None:
        """Return the newest frame.

        Args:
            timeout_s: Time to wait for it, seconds.

        Returns:
            The frame. None if there is none that was not returned before.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._latest is not None, timeout=timeout_s)
            latest, self._latest = self._latest, None
        image_rgb = self._convert(latest) if latest is not None else None
        if latest is None or image_rgb is None:
            self._report_silence()
            return None
        self._update_status(image_rgb, latest.captured_s)
        return Frame(image_rgb, latest.captured_s)

    def stop(self) -> None:
        """Let the thread end, without waiting for it. Call it for all cameras before `close` of the first."""
        if not self._stop.is_set():
            self._stop.set()
            self._stopped_s = time.monotonic()

    def close(self) -> None:
        """Stop the thread. A camera that hangs is left behind half a second after `stop`."""
        self.stop()
        self._thread.join(max(0.0, self._stopped_s + CLOSE_TIMEOUT_S - time.monotonic()))

    def _put(self, frame: CameraFrame) -> None:
        with self._condition:
            self._num_dropped += self._latest is not None
            self._latest, self._received_s = frame, time.monotonic()
            if self._status.startswith("camera lost"):
                self._status = ""
            self._condition.notify()
        if self._on_frame:
            self._on_frame()

    def _convert(self, frame: CameraFrame) -> NDArray[np.uint8] | None:
        """Return the image of a frame, or None if it is damaged."""
        try:
            return frame.to_rgb()
        except DataError:
            self._num_dropped += 1
            return None

    def _report_silence(self) -> None:
        limit_s = self._reconnect_policy.read_timeout_s
        if not self._status.startswith("camera lost") and time.monotonic() - self._received_s > limit_s:
            self._set_lost(f"no data for {limit_s:g} s")

    def _set_lost(self, reason: str) -> None:
        with self._condition:
            self._latest = None  # a frame from before the loss is old
            self._status = f"camera lost: {reason}"

    def _update_status(self, image_rgb: NDArray[np.uint8], captured_s: float) -> None:
        """Report images that are late, or that do not change, as of a camera that repeats its last image."""
        now_s = time.monotonic()
        thumbnail = cv2.resize(image_rgb, THUMBNAIL_WH, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        if self._thumbnail is None or cv2.absdiff(thumbnail, self._thumbnail).max() > FROZEN_DIFFERENCE:
            self._thumbnail, self._changed_s = thumbnail, now_s
        with self._condition:
            if self._status.startswith("camera lost"):
                return
            self._status = ""
            if now_s - captured_s > LATE_AFTER_S:
                self._status = f"images are {now_s - captured_s:.0f} s late"
            if now_s - self._changed_s >= FROZEN_AFTER_S:
                self._status = f"image unchanged for {now_s - self._changed_s:.0f} s"

    def _run(self) -> None:
        """Body of the thread: open the camera, read until it fails, wait, open it again."""
        while not self._stop.is_set():
            retry_s = self._reconnect_policy.retry_s
            try:
                self._read_connection()
            except UnavailableError as error:
                if not self._is_opened.is_set():
                    self.open_error = error
                    if self._on_frame is None:
                        break
                reason = str(error).removeprefix(f"{self.name}: ")
                if isinstance(error, LoginError):
                    retry_s = self._count_refused_login()
                    reason += f" Next attempt in {retry_s:g} s."
                self._set_lost(reason)
            self._stop.wait(retry_s)
        self._is_opened.set()

    def _read_connection(self) -> None:
        """Open the camera and read until it fails, which raises UnavailableError, or the source is closed."""
        try:
            reader = self._open_reader()
            try:
                self._read_until_lost(reader)
            finally:
                reader.close()
        except UnavailableError:
            raise
        except Exception as error:  # the thread would end, and the camera be blind without a message
            text = f"{type(error).__name__}: {error}"
            raise UnavailableError(f"{self.name}: unexpected error {text}. Report it as a bug of hkd-det.") from error

    def _count_refused_login(self) -> float:
        """Return the delay before the next login, seconds. Only an image ends the series of refused logins."""
        policy = self._reconnect_policy
        delay_s = min(policy.login_retry_s * 2.0**self._num_refused, policy.max_login_retry_s)
        self._num_refused = min(self._num_refused + 1, MAX_DOUBLINGS)
        return delay_s

    def _read_until_lost(self, reader: CameraReader) -> None:
        """Read until the camera fails, which raises UnavailableError, or the source is closed."""
        first = reader.read()
        self.fps, self.decoder, self.open_error, self._num_refused = reader.fps, reader.decoder, None, 0
        self._put(first)
        self._is_opened.set()
        while not self._stop.is_set():
            frame = reader.read()
            # FFmpeg returns the last image of its buffers when a read ends without data.
            if time.monotonic() - self._received_s > self._reconnect_policy.read_timeout_s:
                raise UnavailableError(f"{self.name}: no data. Check that the camera is on and reachable.")
            self.fps, self.decoder = reader.fps, reader.decoder
            self._put(frame)


class WebcamReader:
    """A webcam, read with OpenCV.

    Args:
        index: Index of the webcam.

    Raises:
        UnavailableError: There is no such webcam, or it returns no image.
    """

    def __init__(self, index: int) -> None:
        self._name, self.decoder = f"camera {index}", ""
        self._capture = cv2.VideoCapture(index)
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        self.fps = sanitize_fps(self._capture.get(cv2.CAP_PROP_FPS))

    def read(self) -> CameraFrame:
        """Wait for the next frame; see `CameraReader.read`."""
        has_frame, image_bgr = self._capture.read()
        if not has_frame:
            raise UnavailableError(
                f"{self._name}: the camera returns no image. Check that it is connected (ls /dev/video*) and not in "
                "use by another program."
            )
        return CameraFrame(
            lambda: cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False), time.monotonic()
        )

    def close(self) -> None:
        """Release the webcam."""
        self._capture.release()
