"""Rates and strengths over a run, and the round trip of a configuration."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkd_det.distill import METHODS, load_method
from hkd_det.train.config import TrainConfig, compute_distill_weight, compute_lr_factor, get_last_phase_start


@pytest.mark.parametrize("name", METHODS)
def test_saved_settings_of_a_method_are_read_back(name: str) -> None:
    methods = dict.fromkeys(["hkd", name] if name == "mokd" else [name])  # mokd balances the losses of another method
    distill = {method: load_method(method).Config() for method in methods}
    config = TrainConfig(data="d.yaml", model="m", save_dir="r", distill=distill, teacher="t")
    assert TrainConfig.from_dict(config.as_dict()) == config


def test_lr_factor_rises_to_one_and_falls() -> None:
    history = [compute_lr_factor(step, 100, warmup_ratio=0.1) for step in range(100)]
    assert history[0] == 0.1 and history[9] == 1.0 and history[10] == 1.0
    assert history == sorted(history[:10]) + sorted(history[10:], reverse=True)
    assert abs(history[-1] - 0.02) < 1e-3


@given(st.integers(1, 300), st.floats(0, 1))
def test_lr_factor_stays_in_range(steps: int, warmup: float) -> None:
    assert all(0 < compute_lr_factor(step, steps, warmup) <= 1 for step in range(steps))


@given(st.integers(1, 300), st.floats(0, 1))
def test_distill_weight_is_zero_in_last_epochs(epochs: int, finale: float) -> None:
    first_plain = get_last_phase_start(epochs, finale)
    strengths = [compute_distill_weight(epoch, epochs, finale) for epoch in range(epochs)]
    assert all(strength == 0 for strength in strengths[first_plain:])
    assert strengths[:first_plain] == sorted(strengths[:first_plain], reverse=True)
    assert first_plain == 0 or strengths[0] == 1


def test_distill_weight_falls_to_its_minimum() -> None:
    """Four epochs with distillation and one without: half a cosine from 1 toward 0.2."""
    weights = [compute_distill_weight(epoch, 5, 0.2, "cosine", 0.2) for epoch in range(5)]
    expected = [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.0]
    assert weights == pytest.approx(expected)
    assert [compute_distill_weight(epoch, 5, 0.2, "constant") for epoch in range(5)] == [1, 1, 1, 1, 0]
