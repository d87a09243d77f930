"""Percentiles and the early-stopping bound, against numpy and against counting."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkd_bench.result import confidence_bound_ms, summarize_latency


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=200))
def test_percentiles_are_numpys_and_nothing_is_left_out(samples: list[float]) -> None:
    found = summarize_latency(samples)
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == tuple(np.percentile(samples, (50, 90, 99)))
    assert found.num_samples == len(samples) and found.max_ms == max(samples)
    assert found.mean_ms == pytest.approx(sum(samples) / len(samples))


def test_no_samples_no_summary() -> None:
    with pytest.raises(ValueError, match="no latency samples"):
        summarize_latency([])


@pytest.mark.parametrize(("percentile", "least"), [(90, 64), (99, 662)])
def test_the_official_minima(percentile: float, least: int) -> None:
    """MLPerf's inference rules give 64 and 662 queries for p90 and p99."""
    assert confidence_bound_ms([1.0] * (least - 1), percentile) is None
    assert confidence_bound_ms([1.0] * least, percentile) == 1.0


@given(st.integers(64, 400))
def test_the_bound_equals_a_plain_count(count: int) -> None:
    samples = list(np.random.default_rng(count).permutation(count).astype(float))
    allowed = 0
    while sum(comb(count, k) * 0.1**k * 0.9 ** (count - k) for k in range(allowed + 2)) <= 0.01:
        allowed += 1
    assert confidence_bound_ms(samples, 90) == sorted(samples)[count - allowed]


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Of 400 exponential samples the true p90 lies below the bound in 99 of 100 draws or more."""
    chance, true_p90 = np.random.default_rng(0), -np.log(0.1)
    below = [(confidence_bound_ms(chance.exponential(size=400).tolist(), 90) or 0) >= true_p90 for _ in range(600)]
    assert np.mean(below) > 0.975


@pytest.mark.parametrize("percentile", [0, 100, -5])
def test_no_percentile_outside_its_range(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        confidence_bound_ms([1.0], percentile)
