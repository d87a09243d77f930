"""Latency, clocks, temperature and power over time: `hkd-bench --sustained`.

A model runs without pauses. The latency of the last tenth is the one to quote; the drift compares it with the start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_ind

from hkd_bench.device_state import DeviceState
from hkd_bench.energy import PowerTrace
from hkd_bench.worker import BLOCK_S
from hkd_deploy.power_rails import SensorMissingError
from hkd_det.metrics.bootstrap import CONFIDENCE

LAST_RATIO = 0.1
MAX_FIRST_S = 60.0
MAX_POINTS = 120
MIN_BLOCKS, MAX_BLOCKS = 5, 20  # of the first and of the last part
DriftConclusion = Literal["slower", "faster", "no change shown", "too short for a conclusion"]


@dataclass(frozen=True)
class SustainedPart:
    """Measurements of a part of a sustained run.

    Attributes:
        start_s: Start in seconds since the start of the run.
        seconds: Duration.
        frames: Number of frames.
        p50_ms, p90_ms, p99_ms: Percentiles of the latency in milliseconds.
        cpu_mhz: Median clock of the busy CPUs in MHz; None if it cannot be read.
        gpu_mhz: Median clock of the GPU in MHz.
        temperature_c: Highest temperature of all sensors in degrees Celsius.
        watts: Mean power of all sensors; None without sensors.
    """

    start_s: float
    seconds: float
    frames: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cpu_mhz: float | None = None
    gpu_mhz: float | None = None
    temperature_c: float | None = None
    watts: float | None = None


@dataclass(frozen=True)
class SustainedResult:
    """Result of a sustained run of one model.

    Attributes:
        requested_s: Requested duration in seconds.
        seconds: Measured duration; shorter if the run was interrupted.
        is_interrupted: Whether Ctrl-C ended the run.
        first: The first minute, or the first tenth if that is shorter.
        last: The last tenth, which is the part to quote.
        points: Parts of equal duration over the whole run, for plots.
        drift: Change of p50 from `first` to `last` as a fraction: the geometric means of the medians of blocks.
        drift_low, drift_high: 95 % interval of `drift` (Welch's t-test of the logarithms); None if the parts are too
            short.
        conclusion: Whether the interval excludes 0.
        power_reason: Reason why the power is None; empty otherwise.
        window: Start and end, Unix time in seconds.
        marks: What makes the run incomparable; throttling and changed clocks are expected results of a sustained run.
    """

    requested_s: float
    seconds: float
    is_interrupted: bool
    first: SustainedPart
    last: SustainedPart
    points: tuple[SustainedPart, ...]
    drift: float
    drift_low: float | None
    drift_high: float | None
    conclusion: DriftConclusion
    power_reason: str
    window: tuple[float, float]
    marks: tuple[str, ...] = ()


class SustainedRun:
    """Samples of one run: latencies, and the state and power of the device with their times.

    Args:
        starts (float64[N]): Start of each frame, Unix time in seconds, ascending.
        latencies_ms (float64[N]): Latency of each frame in milliseconds.
        states: Unix time in seconds and state of the device, ascending.
        traces: Power sensors by name; empty without sensors.
    """

    def __init__(
        self,
        starts: NDArray[np.float64],
        latencies_ms: NDArray[np.float64],
        states: Sequence[tuple[float, DeviceState]],
        traces: Mapping[str, PowerTrace],
    ) -> None:
        self.window = float(starts[0]), float(starts[-1] + latencies_ms[-1] / 1e3)
        self._starts, self._latencies_ms = starts, latencies_ms
        self._states, self._traces = states, traces
        self.power_reason = "" if traces else "no power sensor"

    def get_latencies_ms(self, start: float, end: float) -> NDArray[np.float64]:
        """Return the latencies of the frames that start in an interval.

        Args:
            start: Unix time in seconds.
            end: Unix time in seconds.
        """
        first, last = np.searchsorted(self._starts, (start, end))
        return self._latencies_ms[first:last]

    def summarize_part(self, start: float, end: float) -> SustainedPart | None:
        """Summarize an interval.

        Args:
            start: Unix time in seconds.
            end: Unix time in seconds.

        Returns:
            The part, or None if no frame starts in it.
        """
        latencies_ms = self.get_latencies_ms(start, end)
        if not len(latencies_ms):
            return None
        states = [state for when, state in self._states if start <= when <= end]
        p50, p90, p99 = np.percentile(latencies_ms, (50, 90, 99)).tolist()
        temperatures = [max(state.temperatures_c.values()) for state in states if state.temperatures_c]
        return SustainedPart(
            start_s=start - self.window[0],
            seconds=end - start,
            frames=len(latencies_ms),
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            cpu_mhz=_get_median([state.cpu_mhz for state in states]),
            gpu_mhz=_get_median([state.gpu_mhz for state in states]),
            temperature_c=max(temperatures, default=None),
            watts=self._get_watts(start, end),
        )

    def _get_watts(self, start: float, end: float) -> float | None:
        if not self._traces:
            return None
        try:
            return sum(trace.compute_energy(start, end) for trace in self._traces.values()) / (end - start)
        except SensorMissingError as error:
            self.power_reason = str(error)
            return None


def summarize_sustained(run: SustainedRun, requested_s: float, is_interrupted: bool) -> SustainedResult:
    """Summarize a run.

    Args:
        run: Samples of at least one frame.
        requested_s: Requested duration in seconds.
        is_interrupted: Whether Ctrl-C ended the run.

    Returns:
        The first minute, the last tenth, the drift and the course over time.
    """
    start, end = run.window
    seconds = end - start
    last_s = LAST_RATIO * seconds
    first_s = min(MAX_FIRST_S, last_s)
    whole = run.summarize_part(start, end)
    assert whole is not None
    edges = np.linspace(start, end, min(MAX_POINTS, max(1, int(seconds / BLOCK_S))) + 1).tolist()
    points = [run.summarize_part(*pair) for pair in pairwise(edges)]
    first_medians, last_medians = (
        _get_block_medians(run, *part) for part in ((start, start + first_s), (end - last_s, end))
    )
    drift, low, high = compute_drift(first_medians, last_medians)
    return SustainedResult(
        requested_s=requested_s,
        seconds=seconds,
        is_interrupted=is_interrupted,
        first=run.summarize_part(start, start + first_s) or whole,  # a part of a very short run may have no frame
        last=run.summarize_part(end - last_s, end) or whole,
        points=tuple(point for point in points if point is not None),
        drift=drift,
        drift_low=low,
        drift_high=high,
        conclusion=_conclude(low, high),
        power_reason=run.power_reason,
        window=run.window,
    )


def compute_drift(
    first_ms: Sequence[float], last_ms: Sequence[float], min_blocks: int = MIN_BLOCKS
) -> tuple[float, float | None, float | None]:
    """Compute the change of the latency between two parts, with its 95 % interval.

    Args:
        first_ms: Median of each block of the first part in milliseconds; blocks are taken as independent.
        last_ms: The same of the last part.
        min_blocks: Minimum number of blocks in each part for an interval.

    Returns:
        The ratio of the geometric means minus 1, and its lower and upper end; None if there are too few blocks.
    """
    if not first_ms or not last_ms:
        return 0.0, None, None
    first, last = np.log(first_ms), np.log(last_ms)
    drift = float(np.expm1(last.mean() - first.mean()))
    if min(len(first), len(last)) < min_blocks:
        return drift, None, None
    if not (np.ptp(first) or np.ptp(last)):
        return drift, drift, drift
    interval = ttest_ind(last, first, equal_var=False).confidence_interval(CONFIDENCE)
    return drift, float(np.expm1(interval.low)), float(np.expm1(interval.high))


def _conclude(low: float | None, high: float | None) -> DriftConclusion:
    if low is None or high is None:
        return "too short for a conclusion"
    if low > 0:
        return "slower"
    return "faster" if high < 0 else "no change shown"


def _get_block_medians(run: SustainedRun, start: float, end: float) -> list[float]:
    """Return the median latency of each block of at least `BLOCK_S`."""
    blocks = min(MAX_BLOCKS, max(1, int((end - start) / BLOCK_S + 1e-6)))
    edges = np.linspace(start, end, blocks + 1).tolist()
    latencies = [run.get_latencies_ms(*pair) for pair in pairwise(edges)]
    return [float(np.median(one)) for one in latencies if len(one)]


def _get_median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
