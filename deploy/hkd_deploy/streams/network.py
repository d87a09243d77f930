"""Network cameras through PyAV (FFmpeg): RTSP over TCP or UDP, RTMP, HLS, MPEG-TS.

Live decoding adds no delay: one thread, because each further thread holds one frame back, and no reordering buffer
where the stream has no B-frames. Each failure has its own message, and no message contains a password.

Where the sender states its clock (RTCP sender reports), the age of a frame is the clock of this machine minus that of
the sender. Otherwise the timestamps of the stream show how much later than the fastest frame a frame arrives, so that a
growing backlog is visible. The constant part of the delay is that of the last sender report, also of an earlier
connection. Before the first report, it counts as the frames that FFmpeg and an encoder with B-frames hold.
"""

import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hkd_deploy.streams.decoding import (
    Hwaccel,
    convert_to_rgb,
    describe_unsupported,
    import_av,
    open_container,
    read_decoder,
)
from hkd_deploy.streams.failures import check_reachable, make_failure
from hkd_deploy.streams.live import CameraFrame, ReconnectPolicy
from hkd_deploy.streams.sources import sanitize_fps
from hkd_det.errors import UnavailableError

MIN_WAIT_S = 0.02  # a packet that arrives sooner was in a buffer
MAX_BURST_S = 1.0  # a stream that never waits is not late by more than this at its start
MAX_PENDING_TIMES = 256  # capture times of packets whose frame is still in the decoder
OPTIONS = {
    "fflags": "nobuffer",
    "flags": "low_delay",
    "analyzeduration": "1000000",  # microseconds; the default of 5 s delays the first image
    "fpsprobesize": "0",  # frames whose times are compared before the first image is returned
}
# RTSP describes the stream before it begins. `nobuffer` and a long analysis discard the first key frame, so that the
# first image is late by the key frame interval.
RTSP_OPTIONS = {
    "rtsp_flags": "prefer_tcp",  # UDP loses packets; it is used if the camera offers nothing else
    "flags": "low_delay",
    "fpsprobesize": "0",
    "probesize": "32",
}
HELD_FORMATS = ("rtsp", "mpegts")  # FFmpeg finds the end of an image by the start of the next one
NUM_INTERVAL_TIMES = 16
MAX_SENDER_AGE_S = 60.0  # a larger age, or a frame from the future, means that the clocks are not synchronized
CLOCK_TOLERANCE_S = 0.05
MAX_DRIFT = 2e-4  # relative error of the quartz of a camera, seconds per second
MAX_JUMP_S = 1.0  # timestamps that move by more than the time that passed were reset


class StreamClock:
    """Estimates when each frame of one camera was captured.

    Attributes:
        delay_s: Delay of the fastest frame, seconds, from the clock of the sender. It is kept for the next connection,
            whose first frames come before a sender report. None if unknown.
        baseline_s: Sum of the falls of the delay of the fastest frame, seconds. A frame that was measured before a
            fall is older by it.
    """

    def __init__(self) -> None:
        self.delay_s: float | None = None
        self.baseline_s = 0.0
        self.begin_connection()

    def begin_connection(self, keeps_timestamps: bool = False) -> None:
        """Start with the timestamps of a new connection.

        Args:
            keeps_timestamps: The timestamps may go on with those of the last connection. Then its fastest frame is the
                reference. If they do not go on, this is found at the first frame.
        """
        self._is_first = True
        if not keeps_timestamps:
            self._last: tuple[float, float] | None = None  # timestamp and arrival of the last frame
            self._lag_s = 0.0

    def estimate_age_s(self, timestamp_s: float | None, arrival_s: float, sender_age_s: float | None = None) -> float:
        """Estimate the age of a frame at its arrival.

        Args:
            timestamp_s: Presentation timestamp, seconds. None if the stream has none.
            arrival_s: Time of arrival by a monotonic clock, seconds.
            sender_age_s: Wall-clock time of this machine at the arrival minus capture time stated by the sender, or
                None.

        Returns:
            The age in seconds, at least 0. It is the part that timestamps show if `delay_s` is None.
        """
        lag_s = 0.0 if timestamp_s is None else self._measure_lag_s(timestamp_s, arrival_s)
        if sender_age_s is not None and -CLOCK_TOLERANCE_S <= sender_age_s <= MAX_SENDER_AGE_S:
            age_s = max(0.0, sender_age_s)
            self.delay_s = age_s - lag_s
            return age_s
        return max(0.0, lag_s + (self.delay_s or 0.0))

    def expect_arrival_s(self, timestamp_s: float) -> float | None:
        """Return the time of arrival of a frame without a lag, by the monotonic clock.

        Args:
            timestamp_s: Its timestamp, seconds.

        Returns:
            The time, seconds. None before the first frame.
        """
        return None if self._last is None else self._last[1] - self._lag_s + timestamp_s - self._last[0]

    def _measure_lag_s(self, timestamp_s: float, arrival_s: float) -> float:
        """Return how much later the frame arrives than the fastest frame of the connection."""
        if self._last is not None:
            passed_s, step_s = arrival_s - self._last[1], timestamp_s - self._last[0]
            lag_s = self._lag_s + passed_s - step_s - MAX_DRIFT * passed_s
            # A timestamp that steps back, or ahead of what the lag explains, was reset: the lag stays as it was.
            # A pause of the network is a long time with a small step.
            has_jumped = min(step_s, lag_s) <= -MAX_JUMP_S
            if self._is_first and (has_jumped or lag_s > MAX_JUMP_S):  # other timestamps, or a camera that paused
                self._lag_s = 0.0
            elif not has_jumped:
                self._lag_s = max(0.0, lag_s)
                self.baseline_s += max(0.0, -lag_s)
        self._last, self._is_first = (timestamp_s, arrival_s), False
        return self._lag_s


class _Arrival(NamedTuple):
    """Arrival of a packet.

    Attributes:
        captured_s: Capture time, as far as it was known then.
        baseline_s: `StreamClock.baseline_s` then. None if the sender stated the capture time.
        has_delay: Whether `captured_s` includes the constant delay.
    """

    captured_s: float
    baseline_s: float | None
    has_delay: bool


class StreamReader:
    """One connection to a network camera.

    Args:
        address: URL.
        name: The URL without credentials.
        policy: Timeouts.
        clock: Clock of the camera, which earlier connections used.
        hwaccel: Hardware decoder. None for the CPU.

    Raises:
        UnavailableError: PyAV is not installed, or the camera cannot be opened. The message names the reason.
    """

    def __init__(
        self, address: str, name: str, policy: ReconnectPolicy, clock: StreamClock, hwaccel: Hwaccel | None = None
    ) -> None:
        self._av = import_av()
        self._name, self._policy, self._hwaccel = name, policy, hwaccel
        check_reachable(address, name, policy.open_timeout_s)
        timeouts, start_s = (policy.open_timeout_s, policy.read_timeout_s), time.monotonic()
        try:
            self._container = open_container(
                self._av, address, name, hwaccel, options=list_options(address), timeout=timeouts
            )
        except (self._av.FFmpegError, OSError) as error:
            # FFmpeg reports RTSP without an answer as invalid data.
            is_late = time.monotonic() - start_s >= policy.open_timeout_s
            raise make_failure(self._av, TimeoutError() if is_late else error, name, address) from None
        if not self._container.streams.video:
            self._container.close()
            raise UnavailableError(f"{name}: not a video: the stream has no images. Check the path of the URL.")
        self._stream: Any = self._container.streams.video[0]
        if self._stream.codec_context is None:
            self._container.close()
            raise UnavailableError(f"{name}: FFmpeg cannot decode the codec. Set the camera to H.264 or H.265.")
        self._stream.codec_context.thread_count = 1
        self._stated_fps = sanitize_fps(float(self._stream.average_rate or 0))
        self._clock = clock
        clock.begin_connection()
        self._times_s: deque[float] = deque(maxlen=NUM_INTERVAL_TIMES)  # timestamps of the last packets
        self._arrivals: dict[int, _Arrival] = {}  # by timestamp
        self._has_unreported = False  # a packet without the clock of the sender was the last one
        self._frames = self._iterate_frames()

    @property
    def fps(self) -> float | None:
        """Frame rate of the stream, or of its last timestamps. None if unknown."""
        coded_fps = sanitize_fps(float(self._stream.codec_context.framerate or 0))
        interval_s = estimate_interval_s(self._times_s)
        return self._stated_fps or coded_fps or (sanitize_fps(round(1 / interval_s, 2)) if interval_s else None)

    @property
    def decoder(self) -> str:
        """Device that decodes; see `read_decoder`."""
        return read_decoder(self._stream.codec_context, self._hwaccel)

    def read(self) -> CameraFrame:
        """Wait for the next frame; see `CameraReader.read`."""
        try:
            return next(self._frames)
        except StopIteration:
            raise UnavailableError(f"{self._name}: the camera ended the stream. Check that it is on.") from None
        except (self._av.FFmpegError, OSError) as error:
            raise make_failure(self._av, error, self._name, self._name) from None

    def close(self) -> None:
        """Close the connection."""
        self._container.close()

    def _iterate_frames(self) -> Iterator[CameraFrame]:
        """Yield the frames. Of those that waited in buffers when the connection was opened, only the newest."""
        opened_s = requested_s = time.monotonic()
        newest, is_burst = None, True
        for packet in self._container.demux(self._stream):
            has_waited = time.monotonic() - requested_s > MIN_WAIT_S
            self._note_arrival(packet)
            is_burst = is_burst and (newest is None or not (has_waited and self._is_in_order()))
            is_burst = is_burst and time.monotonic() - opened_s < MAX_BURST_S
            try:
                frames = packet.decode()
            except self._av.InvalidDataError:  # before the first key frame, or damaged
                frames = []
            for frame in frames:
                newest = frame
                if not is_burst and (frame.pts is not None or not self._times_s):  # FFmpeg omits the first timestamp
                    yield self._make_frame(frame)
            if newest is None and time.monotonic() - opened_s > self._policy.key_frame_timeout_s:
                if self._hwaccel and self._hwaccel.is_required:
                    raise UnavailableError(f"{self._name}: {describe_unsupported(self._hwaccel)}")
                raise UnavailableError(
                    f"{self._name}: no key frame within {self._policy.key_frame_timeout_s:.0f} s. Reduce the key frame "
                    "interval (GOP) of the camera."
                )
            requested_s = time.monotonic()

    def _is_in_order(self) -> bool:
        """Return whether the last packet is no B-frame, whose delay is that of the encoder."""
        return not self._times_s or self._times_s[-1] == max(self._times_s)

    def _make_frame(self, frame: Any) -> CameraFrame:
        """Return a frame with its capture time, from all that is known when it leaves the decoder."""
        arrival = self._arrivals.pop(frame.pts, _Arrival(time.monotonic(), None, True))
        captured_s = arrival.captured_s
        if arrival.baseline_s is not None:
            captured_s -= self._clock.baseline_s - arrival.baseline_s
        if not arrival.has_delay:
            captured_s -= self._estimate_delay_s() if self._clock.delay_s is None else self._clock.delay_s
        ratio = float(self._stream.codec_context.sample_aspect_ratio or 1)
        return CameraFrame(partial(convert_to_rgb, frame, ratio), captured_s)

    def _note_arrival(self, packet: Any) -> None:
        """Remember when the image of a packet was captured; B-frames leave the decoder in another order."""
        if packet.pts is None:
            return
        arrival_s, wall_s = time.monotonic(), time.time()
        sender_age_s = None
        has_report = packet.has_sidedata("prft")  # producer reference time, from RTCP sender reports
        if has_report and not self._has_unreported:  # otherwise FFmpeg attaches that of the next image
            (captured_us,) = struct.unpack_from("<q", bytes(packet.get_sidedata("prft")))
            sender_age_s = wall_s - captured_us / 1e6
        self._has_unreported = not has_report
        timestamp_s = float(packet.pts * packet.time_base)
        self._times_s.append(timestamp_s)
        age_s = self._clock.estimate_age_s(timestamp_s, arrival_s, sender_age_s)
        if len(self._arrivals) >= MAX_PENDING_TIMES:
            self._arrivals.clear()
        baseline_s = None if sender_age_s is not None else self._clock.baseline_s
        self._arrivals[packet.pts] = _Arrival(arrival_s - age_s, baseline_s, self._clock.delay_s is not None)

    def _estimate_delay_s(self) -> float:
        """Return the delay of each frame that timestamps do not show, seconds.

        FFmpeg holds an image until the next one begins. An encoder with B-frames encodes an image when it has the next
        one, on which the type of the image depends.
        """
        interval_s = estimate_interval_s(self._times_s)
        if len(self._times_s) < NUM_INTERVAL_TIMES // 2 and self.fps:
            interval_s = 1 / self.fps
        is_reordered = any(later < earlier for earlier, later in pairwise(self._times_s))
        return interval_s * ((self._container.format.name in HELD_FORMATS) + is_reordered)


def list_options(address: str) -> dict[str, str]:
    """Return the options of FFmpeg for a URL.

    Args:
        address: URL.
    """
    return RTSP_OPTIONS if address.lower().startswith("rtsp") else OPTIONS


def estimate_interval_s(times_s: Iterable[float]) -> float:
    """Return the interval of frames in seconds, from the timestamps of successive packets in any order.

    Args:
        times_s: Timestamps, seconds.

    Returns:
        The median difference of neighbors. 0 if there are fewer than two timestamps.
    """
    steps_s = np.diff(np.unique(np.array(list(times_s))))
    return float(np.median(steps_s)) if len(steps_s) else 0.0
