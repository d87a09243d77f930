"""Recording of one camera to segments of fragmented MP4, in a thread.

The camera has a thread that encodes and writes. The thread of the detector only appends to a bounded queue. With
`--record-on person` the newest seconds are encoded and held in memory, so that a recording begins before the event.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.demo.delivery import Report
from hkd_deploy.demo.fragmented_mp4 import EncodedFrame, FragmentedMp4, H264Encoder

QUEUE_BYTES, MIN_QUEUE, MAX_QUEUE = 64 << 20, 4, 64  # of images that wait for the encoder, per camera
MAX_GAP_MS = 5000  # a longer pause of a camera ends the segment
RETRY_S = 5.0  # after an error of the disk
MIN_FREE_BYTES = 32 << 20  # recording continues on a disk that was full when this is free
CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class RecordingConfig:
    """What is recorded and how long it is kept.

    Attributes:
        directory: Directory. Each camera has a subdirectory.
        segment_s: Length of a file, seconds.
        only_persons: True to record only while there are persons.
        pre_roll_s: Time before the first person, seconds.
        post_roll_s: Time after the last person, seconds.
        max_age_s: Files that ended longer ago are deleted. None keeps them.
        max_bytes: The oldest files are deleted if all together are larger. None keeps them.
        min_free_bytes: Recording continues on a disk that was full when this is free.
    """

    directory: Path
    segment_s: float = 600.0
    only_persons: bool = False
    pre_roll_s: float = 5.0
    post_roll_s: float = 5.0
    max_age_s: float | None = None
    max_bytes: int | None = None
    min_free_bytes: int = MIN_FREE_BYTES


class _QueuedFrame(NamedTuple):
    """A frame on its way to the encoder: image, time in ms, wall-clock time in seconds, presence of a person."""

    image_rgb: NDArray[np.uint8]
    time_ms: int
    utc_s: float
    has_person: bool


class _RecentFrame(NamedTuple):
    """An encoded frame in memory: wall-clock time in seconds; whether it is part of a recording."""

    encoded: EncodedFrame
    utc_s: float
    is_wanted: bool


class CameraRecorder:
    """Records one camera in a thread.

    Args:
        directory: Directory of the camera.
        config: What is recorded.
        is_live: True to drop frames while the encoder or the disk is too slow. False to wait.
        report: Called with one line when recording stops or continues.
        on_segment: Called after a file is complete.

    Attributes:
        num_frames: Number of recorded frames.
        num_dropped: Number of frames that should have been recorded and were not.
        path: File that is being written. None between files.
    """

    def __init__(
        self,
        directory: Path,
        config: RecordingConfig,
        is_live: bool,
        report: Report,
        on_segment: Callable[[], None],
    ) -> None:
        self._directory, self._config, self._is_live = directory, config, is_live
        self._report, self._on_segment = report, on_segment
        self.num_frames = self.num_dropped = 0
        self.path: Path | None = None
        self._queue: Queue[_QueuedFrame | None] | None = None
        self._thread = Thread(target=self._run, name=f"record {directory.name}", daemon=True)
        self._encoder: H264Encoder | None = None
        self._segment: FragmentedMp4 | None = None
        self._recent: deque[_RecentFrame] = deque()  # empty, or begins with a key frame
        self._last_ms: int | None = None
        self._person_ms: int | None = None
        self._retry_s: float | None = None  # time of the next attempt after an error of the disk

    def write(self, image_rgb: NDArray[np.uint8], captured_s: float, has_person: bool) -> None:
        """Append a frame to the queue.

        Args:
            image_rgb (uint8[H, W, 3]): RGB, with people redacted if they are to be. It must not change afterwards.
            captured_s: Capture time by `time.monotonic()` of a live source, otherwise position, seconds.
            has_person: True if a person was detected.
        """
        if self._queue is None:
            self._queue = Queue(min(max(QUEUE_BYTES // max(1, image_rgb.nbytes), MIN_QUEUE), MAX_QUEUE))
            self._thread.start()
        age_s = max(0.0, time.monotonic() - captured_s) if self._is_live else 0.0
        item = _QueuedFrame(image_rgb, round(1000 * captured_s), time.time() - age_s, has_person)
        while self._thread.is_alive():
            try:
                self._queue.put(item, block=not self._is_live, timeout=1.0)
                return
            except Full:
                if self._is_live:
                    break
        self.num_dropped += 1

    def close(self) -> None:
        """Record what is in the queue and complete the file, at most for a second."""
        if self._queue is not None:
            end_s = time.monotonic() + CLOSE_TIMEOUT_S
            try:
                self._queue.put(None, timeout=CLOSE_TIMEOUT_S)
            except Full:
                return  # the disk hangs
            self._thread.join(max(0.0, end_s - time.monotonic()))

    def _run(self) -> None:
        assert self._queue is not None
        while True:
            try:
                item = self._queue.get(timeout=MAX_GAP_MS / 1000)
            except Empty:
                self._end_segment()  # the last frames of a silent camera belong on the disk
                continue
            if item is None:
                break
            self._record(item)
        self._end_segment()
        self._drop_recent(len(self._recent))

    def _record(self, item: _QueuedFrame) -> None:
        """Encode a frame, and write it or hold it in memory."""
        time_ms = self._check_time(item)
        if self._encoder is None:
            self._encoder = H264Encoder((item.image_rgb.shape[0], item.image_rgb.shape[1]))
        if item.has_person:
            self._person_ms = time_ms
        is_full = self._segment is not None and time_ms - (self._segment.start_ms or 0) >= 1000 * self._config.segment_s
        must_be_key = is_full or (self._segment is None and not self._recent)
        frame = self._encoder.encode(item.image_rgb, time_ms, must_be_key)
        is_wanted = self._is_wanted(time_ms)
        if self._segment is not None and (is_full or not is_wanted):
            self._end_segment()
            if not frame.is_key:  # the recent frames must begin with a key frame
                return
        if self._segment is not None:
            self._write([frame])
            return
        self._recent.append(_RecentFrame(frame, item.utc_s, is_wanted))
        self._trim_recent(time_ms)
        if is_wanted and (self._retry_s is None or self._may_retry()):
            self._begin_segment()

    def _check_time(self, item: _QueuedFrame) -> int:
        """Return the time of a frame, which increases. A pause, a jump or another size ends the segment."""
        time_ms, last_ms = item.time_ms, self._last_ms
        if self._encoder is not None and last_ms is not None:
            has_jumped = not -1000 < time_ms - last_ms <= MAX_GAP_MS
            if has_jumped or self._encoder.size_hw != item.image_rgb.shape[:2]:
                self._end_segment()
                self._drop_recent(len(self._recent))
                self._encoder, self._person_ms = None, None
            else:
                time_ms = max(time_ms, last_ms + 1)
        self._last_ms = time_ms
        return time_ms

    def _is_wanted(self, time_ms: int) -> bool:
        if not self._config.only_persons:
            return True
        return self._person_ms is not None and time_ms - self._person_ms <= 1000 * self._config.post_roll_s

    def _trim_recent(self, time_ms: int) -> None:
        """Remove frames that are older than the pre-roll, up to a key frame."""
        limit_ms = time_ms - (1000 * self._config.pre_roll_s if self._config.only_persons else 0)
        frames = [recent.encoded for recent in self._recent]
        keys = [index for index, frame in enumerate(frames) if frame.is_key and frame.time_ms <= limit_ms]
        self._drop_recent(keys[-1] if keys else 0)

    def _drop_recent(self, num_frames: int) -> None:
        """Remove the oldest frames. Those of a recording are there only while the disk accepts no data."""
        for _ in range(num_frames):
            self.num_dropped += self._recent.popleft().is_wanted

    def _begin_segment(self) -> None:
        """Open a file and write the recent frames."""
        assert self._encoder is not None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            path = make_segment_path(self._directory, self._recent[0].utc_s)
            self._segment = FragmentedMp4(path, self._encoder.size_hw)
        except OSError as error:
            self._pause(error, 0)
            return
        self.path = path
        frames = [recent.encoded for recent in self._recent]
        self._recent.clear()
        self._write(frames)

    def _write(self, frames: Sequence[EncodedFrame]) -> None:
        assert self._segment is not None
        for index, frame in enumerate(frames):
            num_pending, num_bytes = self._segment.num_pending, self._segment.num_bytes
            try:
                self._segment.write(frame)
            except OSError as error:
                self._segment = self.path = None
                self.num_frames -= num_pending
                self._pause(error, num_pending + len(frames) - index)
                return
            self.num_frames += 1
            if self._retry_s is not None and self._segment.num_bytes > num_bytes:
                self._retry_s = None
                self._report(f"--record {self._directory}: recording continues.")

    def _end_segment(self) -> None:
        if self._segment is None:
            return
        segment, self._segment, self.path = self._segment, None, None
        try:
            segment.close()
        except OSError as error:
            self.num_frames -= segment.num_pending
            self._pause(error, segment.num_pending)
        self._on_segment()

    def _pause(self, error: OSError, num_lost: int) -> None:
        """Report an error of the disk once, and try again later."""
        self.num_dropped += num_lost
        if self._retry_s is None:
            reason = error.strerror or type(error).__name__
            text = f"--record {self._directory}: {reason}. Recording pauses until the disk accepts data."
            self._report(text, level="error")
        self._retry_s = time.monotonic() + RETRY_S

    def _may_retry(self) -> bool:
        if self._retry_s is not None and time.monotonic() < self._retry_s:
            return False
        try:
            is_free = shutil.disk_usage(self._directory.parent).free >= self._config.min_free_bytes
        except OSError:
            is_free = False
        if not is_free:
            self._retry_s = time.monotonic() + RETRY_S
        return is_free


def make_segment_path(directory: Path, utc_s: float, suffix: str = ".mp4") -> Path:
    """Return a path that does not exist yet: the time in UTC, `2026-11-30T12-00-00.000Z.mp4`.

    Args:
        directory: Directory of the camera.
        utc_s: Time of the first frame, seconds since 1970.
        suffix: Suffix of the file.
    """
    moment = datetime.fromtimestamp(utc_s, timezone.utc)
    name = f"{moment:%Y-%m-%dT%H-%M-%S}.{moment.microsecond // 1000:03d}Z"
    path, number = directory / f"{name}{suffix}", 2
    while path.exists():
        path, number = directory / f"{name}_{number}{suffix}", number + 1
    return path
