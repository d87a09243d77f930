"""Tests of the frame statistics of the demo, with known times."""

import tracemalloc

import pytest

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo import output
from hkd_deploy.demo.output import FrameStats


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(output, "perf_counter", fake)
    return fake


def test_stats_without_frames() -> None:
    stats = FrameStats()
    assert (stats.num_frames, stats.recent_fps, stats.mean_fps) == (0, 0.0, 0.0)
    assert stats.format_summary(num_dropped=0) == "no frames"


def test_stats_rates(clock: Clock) -> None:
    stats = FrameStats()
    for interval_s in [0.1] * 30 + [0.05] * 30:
        clock.now_s += interval_s
        stats.add(StageTimes(1, 1, 1), None)
    assert stats.recent_fps == pytest.approx(20)
    assert stats.mean_fps == pytest.approx(60 / 4.5)


def test_format_summary_percentiles(clock: Clock) -> None:
    stats = FrameStats()
    for index in range(101):  # times 0 to 100: percentile p is p
        clock.now_s += 0.02
        stats.add(StageTimes(preprocess_ms=index, inference_ms=2 * index, postprocess_ms=0.5), age_ms=3 * index + 7)
    assert stats.format_summary(num_dropped=12).splitlines() == [
        "101 frames, 12 dropped, 50.0 fps including reading and drawing",
        "milliseconds          p50      p90      p99",
        "preprocess          50.00    90.00    99.00",
        "inference          100.00   180.00   198.00",
        "postprocess          0.50     0.50     0.50",
        "total              150.50   270.50   297.50",
        "since capture      157.00   277.00   304.00",
    ]
    assert "dropped" not in stats.format_summary(num_dropped=0)


def test_format_summary_recorded_source_has_no_age(clock: Clock) -> None:
    stats = FrameStats()
    clock.now_s += 1
    stats.add(StageTimes(1, 2, 3), None)
    assert "capture" not in stats.format_summary(num_dropped=0)


def test_stats_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MAX_SAMPLES", 10)
    stats = FrameStats()
    for index in range(25):
        stats.add(StageTimes(index, 0, 0), None)
    assert stats.num_frames == 25
    assert "preprocess          19.50" in stats.format_summary(num_dropped=0)  # the median of 15 ... 24


def test_memory_does_not_grow_with_the_frames() -> None:
    stats = FrameStats()
    tracemalloc.start()
    try:
        for index in range(20_000):
            stats.add(StageTimes(index + 0.5, 1.5, 2.5), index + 0.25)
        assert tracemalloc.get_traced_memory()[0] < 50_000  # bytes
    finally:
        tracemalloc.stop()
    assert stats.compute_latencies()[0] == pytest.approx(9999.75)
