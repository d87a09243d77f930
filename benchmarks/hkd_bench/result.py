"""Latency percentiles, and the bound that so few samples can vouch for.

`BenchResult`: everything one measurement found, and its JSON form.
"""

import dataclasses
import json
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from scipy.stats import binom

from hkd_bench.host import HostField
from hkd_det.errors import DataError
from hkd_det.files import write_text
from hkd_det.metrics.matching import MissRateResult


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


SCHEMA_VERSION = 1


MAX_CURVE_POINTS = 2000


@dataclass(frozen=True)
class StoredCurve:
    """Miss rate (0..1) against false positives per picture, by falling score; thinned to CURVE_POINTS."""

    fppi: tuple[float, ...]
    miss_rate: tuple[float, ...]

    @classmethod
    def from_miss_rate(cls, result: MissRateResult) -> "StoredCurve":
        """The curve, thinned evenly on a logarithmic axis; first and last point stay."""
        count = len(result.fppi)
        kept = np.arange(count)
        if count > MAX_CURVE_POINTS:
            kept = np.unique(np.geomspace(1, count, MAX_CURVE_POINTS).round().astype(int)) - 1
        return cls(tuple(result.fppi[kept].tolist()), tuple(result.miss_rate[kept].tolist()))


@dataclass(frozen=True)
class StageSamples:
    """Milliseconds of each stage, one entry a staged run."""

    preprocess_ms: tuple[float, ...]
    inference_ms: tuple[float, ...]
    postprocess_ms: tuple[float, ...]


@dataclass(frozen=True)
class ModelResult:
    """One model file, measured.

    path: as it was given. sha256: of the file, or of the digests of a folder's files. backend: what ran it.
    flops: of one picture, a multiply-add counts as two. miss_rates: MR^-2 as a fraction by setup, None where no one was
    to be found. people: to be found, by setup. curve, curve_all: of Reasonable and of All. e2e_ms: one entry a run,
    from frame to detections. load_ms: of opening the file, one entry a round. peak_memory_mib: most resident while
    timing, the largest of the rounds; baseline_mib: before the model was opened, with the interpreter, the libraries
    and the decoded pictures, of the same round.
    """

    name: str
    path: str
    sha256: str
    model: str
    parameters: int
    flops: int
    imgsz_hw: tuple[int, int]
    file_mib: float
    miss_rates: dict[str, float | None]
    num_gt: dict[str, int]
    curve: StoredCurve
    e2e_ms: tuple[float, ...]
    stages: StageSamples
    load_ms: tuple[float, ...]
    peak_memory_mib: float
    baseline_mib: float
    curve_all: StoredCurve | None = None  # results of version 0.1.0 may be without
    backend: str = "onnxruntime"  # the only one there was, in results that are without

    @property
    def latency(self) -> LatencySummary:
        """Of the runs from frame to detections."""
        return summarize_latency(self.e2e_ms)

    @property
    def memory_mib(self) -> float:
        """What the model added to the process at most."""
        return self.peak_memory_mib - self.baseline_mib


@dataclass(frozen=True)
class BenchResult:
    """Models measured side by side on one machine, one data set, one day.

    command: what was typed, empty from Python. date: ISO 8601. threads: CPU threads of an operator, None left it to the
    runtime. pictures: evaluated, 0 where only time and memory were measured. timed_pictures: different pictures that
    were timed. runs: timed a model, over all rounds. warm_up, warm_up_s: untimed runs a round, at least so many and for
    at least so long. rounds: fresh processes a model, in turn with the other models.
    """

    schema: int
    command: str
    date: str
    host: tuple[HostField, ...]
    device: str
    threads: int | None
    data: str
    split: str
    num_images: int
    num_timed_images: int
    runs: int
    rounds: int
    warmup: int
    models: tuple[ModelResult, ...]
    warmup_s: float = 0.0


def write_result(path: Path, result: BenchResult) -> None:
    """JSON, in one step."""
    write_text(path, json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False) + "\n")


def read_result(path: Path) -> BenchResult:
    """What `write_result` wrote. Raises DataError, naming the file and the place, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such result; hkd-bench --json writes one") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA_VERSION:
        raise DataError(
            f"{path}: not a result of hkd-bench that this version reads (schema {schema}, not {SCHEMA_VERSION})"
        )
    try:
        found = _decode_value(BenchResult, content, "result")
    except ValueError as error:
        raise DataError(f"{path}: {error}; measure again with hkd-bench --json") from None
    assert isinstance(found, BenchResult)
    return found


def _decode_value(cls: Any, value: Any, location: str) -> Any:
    """A JSON value as the type asks; ValueError, naming the place, for what does not fit."""
    if dataclasses.is_dataclass(cls):
        return _decode_dataclass(cls, value, location)
    origin, inner = get_origin(cls), get_args(cls)
    if origin in (Union, types.UnionType):
        return None if value is None else _decode_value(inner[0], value, location)
    if origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is ... else list(inner)
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_decode_value(one, item, f"{location}[{place}]") for place, (one, item) in pairs)
    elif origin is dict and isinstance(value, dict):
        return {key: _decode_value(inner[1], item, f"{location}.{key}") for key, item in value.items()}
    elif cls is float and type(value) in (int, float):
        return float(value)
    elif type(value) is cls:
        return value
    raise ValueError(f"{location} is {str(value)[:40]!r}, expected {getattr(cls, '__name__', cls)}")


def _decode_dataclass(cls: Any, value: Any, location: str) -> Any:
    hints = get_type_hints(cls)
    fields = dataclasses.fields(cls)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    found: set[str] = set(value) if isinstance(value, dict) else set()
    odd = sorted((needed - found) | (found - {field.name for field in fields}))
    if odd:
        raise ValueError(f"{location}: missing or unknown {', '.join(odd)}")
    return cls(**{name: _decode_value(hints[name], value[name], f"{location}.{name}") for name in value})
