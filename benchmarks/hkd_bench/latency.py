"""Latency percentiles, and the bound that so few samples can vouch for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom


@dataclass(frozen=True)
class LatencySummary:
    """Milliseconds of `count` samples. variation: standard deviation over mean."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    max_ms: float
    num_samples: int
    cv: float


def summarize_latency(samples_ms: Sequence[float]) -> LatencySummary:
    """Percentiles as numpy interpolates them. Raises ValueError without samples."""
    if not len(samples_ms):
        raise ValueError("no latency samples")
    samples = np.asarray(samples_ms, np.float64)
    p50, p90, p99 = np.percentile(samples, (50, 90, 99))
    mean = samples.mean()
    return LatencySummary(
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        mean_ms=float(mean),
        max_ms=float(samples.max()),
        num_samples=len(samples),
        cv=float(samples.std() / mean) if mean else 0.0,
    )


def confidence_bound_ms(samples_ms: Sequence[float], percentile: float, confidence: float = 0.99) -> float | None:
    """The latency below which the true percentile lies with `confidence`; None if the samples are too few.

    MLPerf's early stopping (Reddi et al. 2020; inference rules, appendix "Early Stopping"): with n samples, of which
    t may be over, t is the largest with BinomCDF(t; n, 1 - p) <= 1 - confidence; the t - 1 slowest are discarded
    and the slowest of the rest is reported. The official minima follow: 64 samples for p90, 662 for p99.
    percentile: 0..100, exclusive.
    """
    if not 0 < percentile < 100:
        raise ValueError(f"a percentile between 0 and 100, not {percentile}")
    count, over = len(samples_ms), 1 - percentile / 100
    allowed = np.arange(1, count + 1)
    passing = allowed[binom.cdf(allowed, count, over) <= 1 - confidence]
    if not len(passing):
        return None
    return float(np.sort(np.asarray(samples_ms, np.float64))[count - int(passing[-1])])
