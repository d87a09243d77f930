"""The tally: rates and percentiles of known times."""

import pytest

from hkd_deploy.demo import run as tally_module
from hkd_deploy.demo.run import FrameStats
from hkd_deploy.pipeline import StageTimes


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(tally_module, "perf_counter", fake)
    return fake


def test_nothing_yet() -> None:
    tally = FrameStats()
    assert (tally.num_frames, tally.recent_fps, tally.mean_fps) == (0, 0.0, 0.0)
    assert tally.summary(num_dropped=0) == "no frames"


def test_rates(clock: Clock) -> None:
    tally = FrameStats()
    for interval_s in [0.1] * 30 + [0.05] * 30:
        clock.now_s += interval_s
        tally.add(StageTimes(1, 1, 1), None)
    assert tally.recent_fps == pytest.approx(20)
    assert tally.mean_fps == pytest.approx(60 / 4.5)


def test_summary(clock: Clock) -> None:
    tally = FrameStats()
    for index in range(101):  # 0 ... 100: a percentile is its own number
        clock.now_s += 0.02
        tally.add(StageTimes(preprocess_ms=index, inference_ms=2 * index, postprocess_ms=0.5), age_ms=3 * index + 7)
    assert tally.summary(num_dropped=12).splitlines() == [
        "101 frames, 12 dropped, 50.0 a second with reading and drawing",
        "milliseconds          p50      p90      p99",
        "preprocess          50.00    90.00    99.00",
        "inference          100.00   180.00   198.00",
        "postprocess          0.50     0.50     0.50",
        "frame to boxes     150.50   270.50   297.50",
        "camera to boxes    157.00   277.00   304.00",
    ]
    assert "dropped" not in tally.summary(num_dropped=0)


def test_a_recording_has_no_age(clock: Clock) -> None:
    tally = FrameStats()
    clock.now_s += 1
    tally.add(StageTimes(1, 2, 3), None)
    assert "camera" not in tally.summary(num_dropped=0)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally_module, "KEPT", 10)
    tally = FrameStats()
    for index in range(25):
        tally.add(StageTimes(index, 0, 0), None)
    assert tally.num_frames == 25
    assert "preprocess          19.50" in tally.summary(num_dropped=0)  # the median of 15 ... 24
