"""Rates and strengths over a run."""

from hypothesis import given
from hypothesis import strategies as st

from hkd_det.train.config import compute_lr_factor, distill_weight_at, no_aug_start_epoch


def test_the_rate_rises_to_one_and_falls_to_the_floor() -> None:
    course = [compute_lr_factor(step, 100, warmup_ratio=0.1) for step in range(100)]
    assert course[0] == 0.1 and course[9] == 1.0 and course[10] == 1.0
    assert course == sorted(course[:10]) + sorted(course[10:], reverse=True)
    assert abs(course[-1] - 0.02) < 1e-3


@given(st.integers(1, 300), st.floats(0, 1))
def test_factors_stay_in_range_for_any_length(steps: int, warmup: float) -> None:
    assert all(0 < compute_lr_factor(step, steps, warmup) <= 1 for step in range(steps))


@given(st.integers(1, 300), st.floats(0, 1))
def test_nobody_teaches_in_the_finale(epochs: int, finale: float) -> None:
    first_plain = no_aug_start_epoch(epochs, finale)
    strengths = [distill_weight_at(epoch, epochs, finale) for epoch in range(epochs)]
    assert all(strength == 0 for strength in strengths[first_plain:])
    assert strengths[:first_plain] == sorted(strengths[:first_plain], reverse=True)
    assert first_plain == 0 or strengths[0] == 1
