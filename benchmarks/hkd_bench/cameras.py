"""Number of cameras that a detector holds: `hkd-bench --cameras`.

Frames arrive at a fixed rate per camera, and the cameras are shifted evenly. One process takes the frames in the order
of arrival. A camera keeps only its newest waiting frame; the frame that it replaces is dropped.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf

import numpy as np
from numpy.typing import NDArray

MAX_CAMERAS = 1024
MAX_BATCH = 256
MIN_LATE_CALLS, MAX_LATE_RATIO = 10, 0.05  # above both, p99 of a batch is not below the period
MIN_SECONDS = 3.0  # of one measurement
MIN_PERIODS = 60  # of one measurement: the delay of an overload of a sixtieth then reaches the period
MIN_FRAMES = 200  # of one measurement: p99 is then not the maximum


@dataclass(frozen=True)
class CameraPoint:
    """Measurement with one number of cameras.

    Attributes:
        cameras: Number of cameras.
        p50_ms, p99_ms: Percentiles of the time from the arrival of a frame to its boxes, in milliseconds. A dropped
            frame has no boxes and counts as infinite; None is infinite.
        dropped: Share of the frames that were dropped, 0 to 1.
        window: Start and end of the measurement, Unix time in seconds.
        joules_per_camera_s: Energy per camera and second in joules, including idle power; None if it was not measured.
        above_idle_per_camera_s: The same above idle.
    """

    cameras: int
    p50_ms: float | None
    p99_ms: float | None
    dropped: float
    window: tuple[float, float] = (0.0, 0.0)
    joules_per_camera_s: float | None = None
    above_idle_per_camera_s: float | None = None

    def is_held(self, fps: float) -> bool:
        """Return whether p99 is below the period.

        Args:
            fps: Frames per second of each camera.
        """
        return self.p99_ms is not None and self.p99_ms < 1e3 / fps


@dataclass(frozen=True)
class BatchPoint:
    """Measurement with one batch size.

    Attributes:
        batch: Number of frames that arrive together, one of each camera.
        p50_ms, p99_ms: Percentiles of the time from their arrival to the boxes of all of them, in milliseconds.
        images_per_s: Frames per second without pauses.
    """

    batch: int
    p50_ms: float
    p99_ms: float
    images_per_s: float

    def is_held(self, fps: float) -> bool:
        """Return whether p99 is below the period.

        Args:
            fps: Frames per second of each camera.
        """
        return self.p99_ms < 1e3 / fps


@dataclass(frozen=True)
class CameraResult:
    """Result of the search.

    Attributes:
        fps: Frames per second of each camera.
        batch: Largest number of frames in one call of the detector.
        cameras: Largest number of cameras with p99 below the period; 0 if one is too many.
        points: Measurements by ascending number of cameras.
        largest_batch: Largest batch with p99 below the period; 0 if the smallest is too large. None if it was not
            searched.
        batches: Measurements by ascending batch size.
        energy_reason: Reason why the energy of the points is None; empty otherwise.
    """

    fps: float
    batch: int
    cameras: int
    points: tuple[CameraPoint, ...]
    largest_batch: int | None = None
    batches: tuple[BatchPoint, ...] = ()
    energy_reason: str = "not requested: give --energy"


def search_cameras(
    detect: Callable[[Sequence[int]], object],
    fps: float,
    batch: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> CameraResult:
    """Find the number of cameras by doubling and bisection.

    Args:
        detect: Function that detects in the frames with the given numbers.
        fps: Frames per second of each camera.
        batch: Largest number of frames in one call.
        clock: Time in seconds.
        sleep: Function that waits for a number of seconds.

    Returns:
        The number of cameras, and all measurements.
    """
    points: dict[int, CameraPoint] = {}

    def is_held(cameras: int) -> bool:
        points[cameras] = measure_cameras(detect, cameras, fps, batch, clock, sleep)
        return points[cameras].is_held(fps)

    held = _search_largest(is_held, MAX_CAMERAS)
    return CameraResult(fps, batch, held, tuple(points[cameras] for cameras in sorted(points)))


def search_batches(
    detect: Callable[[Sequence[int]], object],
    fps: float,
    fixed_batch: int | None,
    max_batch: int = MAX_BATCH,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[int, tuple[BatchPoint, ...]]:
    """Find the largest batch whose frames, which arrive together, have boxes before the next ones arrive.

    Args:
        detect: Function that detects in the frames with the given numbers.
        fps: Frames per second of each camera.
        fixed_batch: Batch of a file with a fixed one, which is the only one that is measured; None if it is free.
        max_batch: Largest batch of a file with a free one.
        clock: Time in seconds.

    Returns:
        The largest batch, 0 if none, and the measurements.
    """
    points: dict[int, BatchPoint] = {}

    def is_held(batch: int) -> bool:
        points[batch] = measure_batch(detect, batch, fps, clock)
        return points[batch].is_held(fps)

    if fixed_batch is not None:
        return (fixed_batch if is_held(fixed_batch) else 0), (points[fixed_batch],)
    held = _search_largest(is_held, max_batch)
    return held, tuple(points[batch] for batch in sorted(points))


def _search_largest(is_held: Callable[[int], bool], limit: int) -> int:
    """Return the largest number that is held, by doubling and bisection; 0 if none is."""
    held, failed = 0, 1
    while failed <= limit and is_held(failed):
        held, failed = failed, min(2 * failed, limit + 1)
    while failed - held > 1:
        middle = (held + failed) // 2
        if is_held(middle):
            held = middle
        else:
            failed = middle
    return held


def measure_batch(
    detect: Callable[[Sequence[int]], object], batch: int, fps: float, clock: Callable[[], float]
) -> BatchPoint:
    """Time calls of one batch size without pauses; end early if too many calls exceed the period.

    Args:
        detect: Function that detects in the frames with the given numbers.
        batch: Number of frames per call.
        fps: Frames per second of each camera.
        clock: Time in seconds.

    Returns:
        The measurement.
    """
    detect(range(batch))  # memory of this batch size
    times_ms: list[float] = []
    start_s, num_late = clock(), 0
    while len(times_ms) < MIN_FRAMES or clock() - start_s < MIN_SECONDS:
        call_s = clock()
        detect(range(batch))
        times_ms.append(1e3 * (clock() - call_s))
        num_late += times_ms[-1] >= 1e3 / fps
        if num_late > MIN_LATE_CALLS and num_late > MAX_LATE_RATIO * len(times_ms):
            break
    p50, p99 = np.percentile(times_ms, (50, 99), method="higher").tolist()
    return BatchPoint(batch, p50, p99, batch * len(times_ms) / (clock() - start_s))


def measure_cameras(
    detect: Callable[[Sequence[int]], object],
    cameras: int,
    fps: float,
    batch: int,
    clock: Callable[[], float],
    sleep: Callable[[float], object],
) -> CameraPoint:
    """Run a detector on paced frames of several cameras.

    Args:
        detect: Function that detects in the frames with the given numbers.
        cameras: Number of cameras.
        fps: Frames per second of each camera.
        batch: Largest number of frames in one call.
        clock: Time in seconds.
        sleep: Function that waits for a number of seconds.

    Returns:
        The measurement. Frame i is one of camera i mod `cameras` and arrives after i / (`cameras` * `fps`) seconds.
    """
    num_frames = max(MIN_FRAMES, MIN_PERIODS * cameras, ceil(MIN_SECONDS * cameras * fps))
    start = time.time()
    responses_ms = run_frames(detect, cameras, fps, batch, num_frames, clock, sleep)
    end = time.time()
    p50, p99 = np.percentile(responses_ms, (50, 99), method="higher")
    dropped = float(np.isinf(responses_ms).mean())
    p50_ms, p99_ms = (float(value) if np.isfinite(value) else None for value in (p50, p99))
    return CameraPoint(cameras, p50_ms, p99_ms, dropped, (start, end))


def run_frames(
    detect: Callable[[Sequence[int]], object],
    cameras: int,
    fps: float,
    batch: int,
    num_frames: int,
    clock: Callable[[], float],
    sleep: Callable[[float], object],
) -> NDArray[np.float64]:
    """Run a detector on frames that arrive at a fixed interval.

    Args:
        detect: Function that detects in the frames with the given numbers.
        cameras: Number of cameras. Frame i is one of camera i mod `cameras`.
        fps: Frames per second of each camera.
        batch: Largest number of frames in one call.
        num_frames: Number of frames of all cameras.
        clock: Time in seconds.
        sleep: Function that waits for a number of seconds.

    Returns:
        responses_ms (float64[num_frames]): Time from the arrival of each frame to its boxes in milliseconds, infinite
            for a dropped frame.
    """
    interval_s = 1 / (cameras * fps)
    responses_ms = np.full(num_frames, inf)
    waiting: deque[int] = deque()
    start_s, arrived = clock(), 0
    while arrived < num_frames or waiting:
        now_s = clock() - start_s
        while arrived < num_frames and arrived * interval_s <= now_s:
            if waiting and waiting[0] <= arrived - cameras:
                waiting.popleft()  # the older frame of the same camera; frames wait in the order of arrival
            waiting.append(arrived)
            arrived += 1
        if not waiting:
            sleep(max(0.0, arrived * interval_s - now_s))
            continue
        frames = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
        detect(frames)
        done_s = clock() - start_s
        responses_ms[frames] = [1e3 * (done_s - frame * interval_s) for frame in frames]
    return responses_ms
