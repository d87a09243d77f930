"""Tests of latency percentiles and of the early-stopping bound, against NumPy and direct counting."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkd_bench.latency import confidence_bound_ms, summarize_latency


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=200))
def test_summarize_latency_equals_numpy(samples: list[float]) -> None:
    summary = summarize_latency(samples)
    assert (summary.p50_ms, summary.p90_ms, summary.p99_ms) == tuple(np.percentile(samples, (50, 90, 99)))
    assert summary.num_samples == len(samples) and summary.max_ms == max(samples)
    assert summary.mean_ms == pytest.approx(sum(samples) / len(samples))


def test_summarize_latency_without_samples_raises() -> None:
    with pytest.raises(ValueError, match="no latency samples"):
        summarize_latency([])


@pytest.mark.parametrize(("percentile", "min_samples"), [(90, 64), (99, 662)])
def test_confidence_bound_needs_official_minimum(percentile: float, min_samples: int) -> None:
    """MLPerf's inference rules give 64 and 662 queries for p90 and p99."""
    assert confidence_bound_ms([1.0] * (min_samples - 1), percentile) is None
    assert confidence_bound_ms([1.0] * min_samples, percentile) == 1.0


@given(st.integers(64, 400))
def test_confidence_bound_equals_direct_count(count: int) -> None:
    samples = list(np.random.default_rng(count).permutation(count).astype(float))
    allowed = 0
    while sum(comb(count, k) * 0.1**k * 0.9 ** (count - k) for k in range(allowed + 2)) <= 0.01:
        allowed += 1
    assert confidence_bound_ms(samples, 90) == sorted(samples)[count - allowed]


def test_confidence_bound_has_stated_confidence() -> None:
    """The true p90 of 400 exponential samples is below the bound in at least 97.5 % of the trials."""
    rng, true_p90 = np.random.default_rng(0), -np.log(0.1)
    is_below = [(confidence_bound_ms(rng.exponential(size=400).tolist(), 90) or 0) >= true_p90 for _ in range(600)]
    assert np.mean(is_below) > 0.975


@pytest.mark.parametrize("percentile", [0, 100, -5])
def test_confidence_bound_rejects_percentile(percentile: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        confidence_bound_ms([1.0], percentile)
