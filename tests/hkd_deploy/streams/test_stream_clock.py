"""Age of frames from the timestamps of a stream, compared with closed forms."""

from collections.abc import Iterable

import pytest

from hkd_deploy.streams.network import StreamClock


def estimate(frames: Iterable[tuple[float, float]]) -> list[float]:
    """Return the ages of frames with (timestamp, arrival)."""
    return estimate_with(StreamClock(), frames)


def estimate_with(clock: StreamClock, frames: Iterable[tuple[float, float]]) -> list[float]:
    return [clock.estimate_age_s(timestamp_s, arrival_s) for timestamp_s, arrival_s in frames]


def test_constant_delay_is_no_lag() -> None:
    assert estimate((n / 15, 100 + n / 15) for n in range(100)) == pytest.approx([0] * 100, abs=1e-9)


def test_slow_line_adds_up() -> None:
    """15 frames per second arrive at 10 per second: each second adds a third."""
    ages = estimate((n / 15, n / 10) for n in range(150))
    assert ages == pytest.approx([n / 10 - n / 15 for n in range(150)], abs=0.01)


def test_lag_falls_while_frames_catch_up() -> None:
    """The line hangs for 4 s, then delivers at once what was sent."""
    frames = [(n / 10, max(n / 10, 6.0 if n >= 20 else 0)) for n in range(100)]
    ages = estimate(frames)
    assert ages[20] == pytest.approx(4, abs=0.01) and ages[40] == pytest.approx(2, abs=0.01)
    assert ages[60:] == pytest.approx([0] * 40, abs=0.01)


@pytest.mark.parametrize("jump_s", [-3600, -30, 30, 3600])
def test_timestamps_that_jump_keep_the_lag(jump_s: float) -> None:
    frames = [(n / 10 + (jump_s if n >= 50 else 0), n / 10 + (0.5 if n >= 20 else 0)) for n in range(100)]
    ages = estimate(frames)
    assert ages[:20] == pytest.approx([0] * 20, abs=1e-9)
    assert ages[20:] == pytest.approx([0.5] * 80, abs=0.11)


def test_quartz_of_the_camera_may_drift() -> None:
    """A camera clock that is slow by 100 ppm looks like a lag that grows by 0.36 s per hour."""
    assert max(estimate((n * (1 - 1e-4), float(n)) for n in range(3600))) < 0.01


def test_clock_of_the_sender_wins_where_it_is_plausible() -> None:
    clock = StreamClock()
    assert clock.estimate_age_s(0.0, 0.0, sender_age_s=0.12) == 0.12
    assert clock.estimate_age_s(0.1, 0.1, sender_age_s=-0.01) == 0  # the clocks differ by 10 ms
    assert clock.estimate_age_s(0.2, 0.5, sender_age_s=7200) == pytest.approx(0.3, abs=1e-3)  # not synchronized
    assert clock.estimate_age_s(None, 0.6) == 0


def test_arrival_of_a_frame_without_a_lag_is_expected() -> None:
    clock = StreamClock()
    assert clock.expect_arrival_s(0.0) is None
    estimate_with(clock, [(n / 10, 100 + n / 10 + 0.5 * (n > 5)) for n in range(10)])
    assert clock.expect_arrival_s(3.0) == pytest.approx(103, abs=0.01)


def test_delay_is_kept_for_the_next_connection() -> None:
    clock = StreamClock()
    assert clock.estimate_age_s(0.0, 0.0) == 0 and clock.delay_s is None
    assert clock.estimate_age_s(0.1, 0.3, sender_age_s=0.5) == 0.5
    assert clock.delay_s == pytest.approx(0.3, abs=1e-3)  # 0.2 s of the 0.5 s are a lag
    clock.begin_connection()
    ages = [clock.estimate_age_s(90 + n / 10, 5 + n / 10 + 0.2 * (n > 0)) for n in range(5)]
    assert ages == pytest.approx([0.3, 0.5, 0.5, 0.5, 0.5], abs=1e-3)


def test_baseline_falls_with_the_delay_of_the_fastest_frame() -> None:
    clock = StreamClock()
    for n in range(10):  # ten frames arrive at once, then each at its time
        clock.estimate_age_s(n / 10, 1.0)
    assert clock.baseline_s == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("timestamp_s", "expected_s"),
    [
        (40.0, 0.3),  # the timestamps went on: the segment is late by 0.3 s
        (40.5, 0.0),  # faster than the fastest one before
        (11.0, 0.0),  # the camera paused while it was away
        (0.0, 0.0),  # it was restarted
        (9000.0, 0.0),
    ],
)
def test_timestamps_that_go_on_keep_their_reference(timestamp_s: float, expected_s: float) -> None:
    clock = StreamClock()
    assert estimate_with(clock, [(n / 10, 100 + n / 10) for n in range(101)])[-1] == pytest.approx(0)
    clock.begin_connection(keeps_timestamps=True)
    ages = estimate_with(clock, [(timestamp_s + n / 10, 140.3 + n / 10) for n in range(5)])
    assert ages == pytest.approx([expected_s] * 5, abs=0.01)
