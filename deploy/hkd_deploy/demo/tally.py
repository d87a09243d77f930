"""`Tally`: what a run of the demo has measured so far."""

from collections import deque
from time import perf_counter

import numpy as np

from hkd_deploy.pipeline import StageTimes

FPS_WINDOW = 30  # frames the shown rate is taken over
MAX_SAMPLES = 100_000  # frames the summary is taken over, the last ones: a camera never ends, memory does
PERCENTILES = (50, 90, 99)


class FrameStats:
    """Counts `frames` and keeps the times of each."""

    def __init__(self) -> None:
        self._times: deque[StageTimes] = deque(maxlen=MAX_SAMPLES)
        self._ages_ms: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._ticks_s = deque([perf_counter()], maxlen=FPS_WINDOW + 1)
        self._start_s = self._ticks_s[0]
        self.num_frames = 0

    def add(self, times: StageTimes, age_ms: float | None) -> None:
        """Record one frame; age_ms from its capture to its detections, None where no clock says."""
        self.num_frames += 1
        self._times.append(times)
        if age_ms is not None:
            self._ages_ms.append(age_ms)
        self._ticks_s.append(perf_counter())

    @property
    def recent_fps(self) -> float:
        """Frames a second over the last 30 frames: reading, drawing and saving included."""
        span_s = self._ticks_s[-1] - self._ticks_s[0]
        return (len(self._ticks_s) - 1) / span_s if span_s > 0 else 0.0

    @property
    def mean_fps(self) -> float:
        """Frames a second from start to the last frame: reading, drawing and saving included."""
        span_s = self._ticks_s[-1] - self._start_s
        return self.num_frames / span_s if span_s > 0 else 0.0

    def summary(self, num_dropped: int) -> str:
        """Frames, rate and a table of stage percentiles in milliseconds, to be printed."""
        if not self._times:
            return "no frames"
        rows = {
            "preprocess": [times.preprocess_ms for times in self._times],
            "inference": [times.inference_ms for times in self._times],
            "postprocess": [times.postprocess_ms for times in self._times],
            "frame to boxes": [times.total_ms for times in self._times],
        }
        if self._ages_ms:
            rows["camera to boxes"] = list(self._ages_ms)
        drops = f", {num_dropped} dropped" if num_dropped else ""
        lines = [
            f"{self.num_frames} frames{drops}, {self.mean_fps:.1f} a second with reading and drawing",
            f"{'milliseconds':<16}" + "".join(f"{f'p{percent}':>9}" for percent in PERCENTILES),
        ]
        for name, values in rows.items():
            lines.append(f"{name:<16}" + "".join(f"{value:9.2f}" for value in np.percentile(values, PERCENTILES)))
        return "\n".join(lines)
