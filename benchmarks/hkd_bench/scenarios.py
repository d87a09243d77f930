"""Load scenarios of `hkd-bench --scenario`: the four of MLPerf Inference, and frames at the rate of a camera.

`loadgen` runs the scenarios of MLPerf with LoadGen. The paced scenario is not one of MLPerf: frames arrive at a fixed
interval as from one camera, which keeps its newest frame only.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil

import numpy as np

from hkd_bench.cameras import run_frames
from hkd_det.config import check_range
from hkd_det.errors import UnavailableError, UsageError

LOADGEN_SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")
PACED = "Paced"
SCENARIOS = (*LOADGEN_SCENARIOS, PACED)
RATE_SCENARIOS = ("Server", PACED)  # the others send the next query when the device is ready
# The early-stopping rule needs these numbers to estimate p90 and p99. Offline has one query and no percentile.
MIN_QUERIES = {"SingleStream": 64, "MultiStream": 662, "Server": 662, "Offline": 1, PACED: 662}
STREAMS = 8  # images of a query of MultiStream, as MLPerf sets it
PERCENTILES = {"SingleStream": 90, "MultiStream": 99, "Server": 99, PACED: 99}
MIN_DURATION_S = 60.0
TARGET_LATENCY_MS = 100.0


@dataclass(frozen=True)
class ScenarioSettings:
    """Settings of the scenarios.

    Attributes:
        target_qps: Queries per second of Server (mean of a Poisson process), frames per second of Paced. None if
            neither is measured.
        target_latency_ms: Limit of p99 of Server in milliseconds. That of Paced is the period.
        min_duration_s: Minimum duration in seconds.
        min_queries: Minimum number of queries, of Offline that of images; None for `MIN_QUERIES`.
        batch: Largest number of images in one call for Offline and Server, with a file whose batch is free.
    """

    target_qps: float | None = None
    target_latency_ms: float = TARGET_LATENCY_MS
    min_duration_s: float = MIN_DURATION_S
    min_queries: int | None = None
    batch: int = 1

    def get_min_queries(self, scenario: str) -> int:
        """Return the minimum number of queries of a scenario.

        Args:
            scenario: One of `SCENARIOS`.
        """
        return MIN_QUERIES[scenario] if self.min_queries is None else self.min_queries

    def get_target_qps(self) -> float:
        """Return the rate of a scenario that has one."""
        if self.target_qps is None:
            raise ValueError("the scenario has no rate")
        return self.target_qps


@dataclass(frozen=True)
class ScenarioResult:
    """Result of one scenario of one model.

    Attributes:
        scenario: SingleStream, MultiStream, Server, Offline or Paced.
        is_valid: Whether LoadGen states a valid result. Paced: whether the run is long enough and p99 is below the
            period with 99 % confidence.
        reasons: Why the result is invalid.
        queries: Number of queries; a query of MultiStream has eight images, that of Offline all.
        images: Number of images.
        seconds: Duration.
        images_per_s: Images per second; of SingleStream with the overhead of LoadGen.
        p50_ms, p90_ms, p99_ms: Percentiles of the latency of a query in milliseconds, of Offline those of an image.
            Server and Paced count from the arrival. None if the frame of this percentile was dropped.
        percentile: Percentile that MLPerf reports; None for Offline.
        percentile_ms: Latency at this percentile in milliseconds.
        bound_ms: Estimate of this percentile by the early-stopping rule: it exceeds the true one with 99 % confidence.
            None if there are too few queries; LoadGen states none for Server.
        target_qps: Queries or frames per second; None without a rate.
        target_latency_ms: Limit of the latency in milliseconds; None without limit.
        min_duration_s: Minimum duration in seconds.
        min_queries: Minimum number of queries, of Offline that of images.
        batch: Largest number of images in one call of the detector.
        late: Number of queries above the limit, with dropped frames; None without limit.
        dropped: Number of frames that a newer one replaced before their turn; None except for Paced.
        log_dir: Directory of LoadGen's logs; empty for Paced.
        loadgen: Version of LoadGen; empty for Paced.
        window: Start and end, Unix time in seconds.
        marks: What makes the run incomparable; empty for a quiet run.
    """

    scenario: str
    is_valid: bool
    reasons: tuple[str, ...]
    queries: int
    images: int
    seconds: float
    images_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    percentile: int | None
    percentile_ms: float | None
    bound_ms: float | None
    target_qps: float | None
    target_latency_ms: float | None
    min_duration_s: float
    min_queries: int
    batch: int = 1
    late: int | None = None
    dropped: int | None = None
    log_dir: str = ""
    loadgen: str = ""
    window: tuple[float, float] = (0.0, 0.0)
    marks: tuple[str, ...] = ()


def parse_scenarios(text: str) -> tuple[str, ...]:
    """Parse the value of `--scenario`.

    Args:
        text: Comma-separated names such as "single-stream,server", or as LoadGen spells them: "SingleStream".

    Returns:
        Names of `SCENARIOS` without repetition.

    Raises:
        UsageError: A name is unknown.
    """
    known = {name.lower(): name for name in SCENARIOS}
    names = []
    for part in text.split(","):
        name = known.get(part.strip().lower().replace("-", ""))
        if name is None:
            raise UsageError(
                f"--scenario {part}: expected single-stream, multi-stream, server, offline or paced, or several of "
                "them with commas."
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def check_scenarios(scenarios: Sequence[str], settings: ScenarioSettings) -> None:
    """Check the settings before the measurement.

    Args:
        scenarios: Names of `SCENARIOS`.
        settings: Settings of all of them.

    Raises:
        UsageError: A value is out of range or missing.
        UnavailableError: LoadGen is not installed.
    """
    rated = [name for name in scenarios if name in RATE_SCENARIOS]
    if rated and settings.target_qps is None:
        raise UsageError(
            f"--target-qps: required by --scenario {','.join(rated).lower()}. Set the queries per second of server, or "
            "the frames per second of paced."
        )
    if settings.target_qps is not None:
        check_range("--target-qps", settings.target_qps, 0.01, 1e6)
    check_range("--target-latency", settings.target_latency_ms, 0.01, 1e6)
    if settings.min_queries is not None:
        check_range("--min-queries", settings.min_queries, 1)
    check_range("--scenario-batch", settings.batch, 1, 4096)
    if any(name in LOADGEN_SCENARIOS for name in scenarios) and find_spec("mlperf_loadgen") is None:
        raise UnavailableError(
            "mlcommons-loadgen: not installed. Run pip install 'hkd-det[loadgen]'; --scenario paced needs no LoadGen."
        )


def measure_paced(
    detect: Callable[[Sequence[int]], object],
    settings: ScenarioSettings,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> ScenarioResult:
    """Run a detector on the frames of one camera, which arrive at a fixed interval.

    A frame is late if its boxes are complete after the next frame has arrived. The rule for a valid result is that of
    Server with the period as limit.

    Args:
        detect: Function that detects in the frames with the given numbers.
        settings: Rate, minimum duration and minimum number of frames.
        clock: Time in seconds.
        sleep: Function that waits for a number of seconds.

    Returns:
        The result.
    """
    from hkd_bench.latency import confidence_bound_ms, is_percentile_met  # noqa: PLC0415  # SciPy needs memory

    fps, min_queries = settings.get_target_qps(), settings.get_min_queries(PACED)
    num_frames = max(min_queries, ceil(settings.min_duration_s * fps))
    start, start_s = time.time(), clock()
    latencies_ms = run_frames(detect, 1, fps, 1, num_frames, clock, sleep)
    seconds, end = clock() - start_s, time.time()
    period_ms = 1e3 / fps
    percentiles = [_to_finite(value) for value in np.percentile(latencies_ms, (50, 90, 99), method="higher")]
    bound_ms = confidence_bound_ms(latencies_ms.tolist(), PERCENTILES[PACED])
    late, dropped = int((latencies_ms > period_ms).sum()), int(np.isinf(latencies_ms).sum())
    reasons = []
    if not is_percentile_met(late, num_frames, PERCENTILES[PACED]):
        reasons.append(
            f"{late} of {num_frames} frames are late: p99 is not below the period of {period_ms:.1f} ms with 99 % "
            "confidence"
        )
    return ScenarioResult(
        scenario=PACED,
        is_valid=not reasons,
        reasons=tuple(reasons),
        queries=num_frames,
        images=num_frames,
        seconds=seconds,
        images_per_s=(num_frames - dropped) / seconds,
        p50_ms=percentiles[0],
        p90_ms=percentiles[1],
        p99_ms=percentiles[2],
        percentile=PERCENTILES[PACED],
        percentile_ms=percentiles[2],
        bound_ms=None if bound_ms is None else _to_finite(bound_ms),
        target_qps=fps,
        target_latency_ms=period_ms,
        min_duration_s=settings.min_duration_s,
        min_queries=min_queries,
        late=late,
        dropped=dropped,
        window=(start, end),
    )


def _to_finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
