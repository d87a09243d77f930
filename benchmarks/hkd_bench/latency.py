"""Statistics of latency samples: percentiles and their upper bounds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom


@dataclass(frozen=True)
class LatencySummary:
    """Statistics of latency samples in milliseconds.

    Attributes:
        p50_ms, p90_ms, p99_ms: Percentiles.
        mean_ms: Mean.
        max_ms: Maximum.
        num_samples: Number of samples.
        cv: Coefficient of variation: standard deviation / mean.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    max_ms: float
    num_samples: int
    cv: float


def summarize_latency(samples_ms: Sequence[float]) -> LatencySummary:
    """Compute the statistics of latency samples; percentiles are interpolated as in NumPy.

    Args:
        samples_ms: Latencies in milliseconds, at least one.

    Returns:
        The statistics, milliseconds.

    Raises:
        ValueError: There are no samples.
    """
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
    """Compute an upper bound of a latency percentile.

    This is MLPerf's early-stopping rule (Reddi et al. 2020; inference rules, appendix "Early Stopping"). Let t be the
    largest number with BinomCDF(t; n, 1 - p) <= 1 - confidence for n samples. The t - 1 slowest samples are discarded,
    and the slowest of the rest is the bound. It needs at least 64 samples for p90 and 662 for p99.

    Args:
        samples_ms: Independent latencies in milliseconds.
        percentile: Greater than 0 and less than 100.
        confidence: Probability that the true percentile is below the bound, 0 to 1.

    Returns:
        The bound in milliseconds, or None if there are too few samples.

    Raises:
        ValueError: `percentile` is out of range.
    """
    if not 0 < percentile < 100:
        raise ValueError(f"percentile: expected a value between 0 and 100, got {percentile}")
    num_samples = len(samples_ms)
    num_discarded = np.arange(1, num_samples + 1)
    allowed = num_discarded[binom.cdf(num_discarded, num_samples, 1 - percentile / 100) <= 1 - confidence]
    if not len(allowed):
        return None
    return float(np.sort(np.asarray(samples_ms, np.float64))[num_samples - int(allowed[-1])])


def is_percentile_met(num_late: int, num_samples: int, percentile: float, confidence: float = 0.99) -> bool:
    """Return whether a percentile of the latency is below its limit, by MLPerf's early-stopping rule for Server.

    It is if BinomCDF(num_late; num_samples, 1 - p) <= 1 - confidence: without late samples from 459 samples for p99.

    Args:
        num_late: Number of samples above the limit.
        num_samples: Number of samples.
        percentile: Greater than 0 and less than 100.
        confidence: Probability that the true percentile is below the limit, 0 to 1.
    """
    return bool(binom.cdf(num_late, num_samples, 1 - percentile / 100) <= 1 - confidence)
