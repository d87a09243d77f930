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
    """

    cameras: int
    p50_ms: float | None
    p99_ms: float | None
    dropped: float

    def is_held(self, fps: float) -> bool:
        """Return whether p99 is below the period.

        Args:
            fps: Frames per second of each camera.
        """
        return self.p99_ms is not None and self.p99_ms < 1e3 / fps


@dataclass(frozen=True)
class CameraResult:
    """Result of the search.

    Attributes:
        fps: Frames per second of each camera.
        batch: Largest number of frames in one call of the detector.
        cameras: Largest number of cameras with p99 below the period; 0 if one is too many.
        points: Measurements by ascending number of cameras.
    """

    fps: float
    batch: int
    cameras: int
    points: tuple[CameraPoint, ...]


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

    held, failed = 0, 1
    while failed <= MAX_CAMERAS and is_held(failed):
        held, failed = failed, 2 * failed
    while failed - held > 1 and held < MAX_CAMERAS:
        middle = (held + failed) // 2
        if is_held(middle):
            held = middle
        else:
            failed = middle
    return CameraResult(fps, batch, held, tuple(points[cameras] for cameras in sorted(points)))


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
    responses_ms = run_frames(detect, cameras, fps, batch, num_frames, clock, sleep)
    p50, p99 = np.percentile(responses_ms, (50, 99), method="higher")
    dropped = float(np.isinf(responses_ms).mean())
    p50_ms, p99_ms = (float(value) if np.isfinite(value) else None for value in (p50, p99))
    return CameraPoint(cameras, p50_ms, p99_ms, dropped)


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
