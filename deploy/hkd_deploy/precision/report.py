"""Accuracy and latency of a converted model, compared with its FP32 source on the current device."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import Detector
from hkd_deploy.pipeline import open_detector
from hkd_deploy.precision.model import (
    get_eval_backend,
    list_onnx_backends,
    make_progress_bar,
    predict_samples,
    select_evenly,
)
from hkd_det.errors import DataError
from hkd_det.image import read_image
from hkd_det.metrics.bootstrap import (
    MIN_IMAGES,
    MIN_PERSONS,
    compare_miss_rates,
    compute_recall_difference_interval,
    has_reliable_interval,
)
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.coco import evaluate_average_precision
from hkd_det.metrics.matching import MissRateResult
from hkd_det.structures import Sample

NUM_ROUNDS, NUM_RUNS = 4, 10  # timed rounds per runtime, timed runs per round
NUM_WARMUP = 3  # runs before each round, until the threads of the previous runtime are idle
NUM_TIMED_IMAGES = NUM_WARMUP + NUM_RUNS
NUM_RESAMPLES = 1000  # of the timed runs
DEFAULT_CONF = 0.3  # score threshold of the recall for a model without a suggested one
MIN_SPEEDUP = 1.1  # lower limit for a recommendation
MAX_RECALL_DROP = 1.0  # upper limit for a recommendation, percentage points


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Accuracy of a model on a val split.

    Attributes:
        result: Curve of the setup Reasonable.
        recall: Ratio of persons detected at the confidence threshold, 0 to 1.
        ap: COCO AP over IoU 0.50 to 0.95, 0 to 1.
        ap50: COCO AP at IoU 0.5, 0 to 1.
    """

    result: MissRateResult
    recall: float
    ap: float
    ap50: float

    @property
    def miss_rate(self) -> float:
        """MR^-2 of the setup Reasonable, 0 to 1."""
        return self.result.value

    def to_metadata(self) -> dict[str, float]:
        """Return the values for the metadata of a file."""
        return {"miss_rate": self.miss_rate, "recall": self.recall, "ap": self.ap, "ap50": self.ap50}


@dataclass(frozen=True)
class LimitCheck:
    """A difference with its 95 % interval, compared with a limit.

    Attributes:
        value: Measured value.
        low: Lower end of the interval.
        high: Upper end.
        limit: Largest accepted value; the smallest one if `is_minimum`.
        is_minimum: Whether `limit` is the smallest accepted value.
        failure: Reason against the file if the interval is beyond the limit.
        subject: Name of the value for the case that the interval contains the limit.
    """

    value: float
    low: float
    high: float
    limit: float
    is_minimum: bool
    failure: str
    subject: str

    @property
    def is_failed(self) -> bool:
        """Whether the whole interval is beyond the limit."""
        return self.high < self.limit if self.is_minimum else self.low > self.limit

    @property
    def is_met(self) -> bool:
        """Whether the whole interval is within the limit."""
        return self.low >= self.limit if self.is_minimum else self.high <= self.limit

    def format_undecided(self) -> str:
        """Return why the data do not decide."""
        return f"the interval of the {self.subject} contains the limit of {self.limit:g}"


@dataclass(frozen=True)
class LatencyComparison:
    """Median latency from image to detections on one runtime.

    Attributes:
        backend: Runtime name.
        fp32_ms: Latency of the FP32 file in milliseconds.
        ms: Latency of the converted file in milliseconds.
    """

    backend: str
    fp32_ms: float
    ms: float


@dataclass(frozen=True, eq=False)
class PrecisionReport:
    """Accuracy and latency of a converted file and its FP32 source.

    Attributes:
        precision: fp16 or int8.
        before: Accuracy of the FP32 file on `eval_backend`.
        after: Accuracy of the converted file on `eval_backend`.
        eval_backend: Runtime on which the accuracy was measured.
        latencies: One entry per runtime.
        speedup_interval: Ends of the 95 % interval of `speedup`, over the timed runs.
        conf: Confidence threshold of the recall.
        max_mr_increase: Limit of the miss rate increase, in percentage points.
    """

    precision: str
    before: Accuracy
    after: Accuracy
    eval_backend: str
    latencies: tuple[LatencyComparison, ...]
    speedup_interval: tuple[float, float]
    conf: float
    max_mr_increase: float

    @property
    def speedup(self) -> float:
        """FP32 latency on its fastest runtime divided by the converted file's latency on its own fastest runtime."""
        return min(latency.fp32_ms for latency in self.latencies) / self.fastest.ms

    @property
    def fastest(self) -> LatencyComparison:
        """Entry of the runtime on which the converted file is fastest."""
        return min(self.latencies, key=lambda latency: latency.ms)

    @property
    def mr_increase(self) -> float:
        """Miss rate increase over FP32, in percentage points."""
        return 100 * (self.after.miss_rate - self.before.miss_rate)

    @cached_property
    def mr_interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval of `mr_increase`."""
        return compute_mr_interval(self.after.result, self.before.result)

    @property
    def recall_increase(self) -> float:
        """Recall increase over FP32, in percentage points."""
        return 100 * (self.after.recall - self.before.recall)

    @cached_property
    def recall_interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval of `recall_increase`."""
        low, high = compute_recall_difference_interval(self.after.result, self.before.result, self.conf)
        return 100 * low, 100 * high

    @property
    def checks(self) -> tuple[LimitCheck, ...]:
        """The conditions of a recommendation."""
        limit, drop = self.max_mr_increase, -MAX_RECALL_DROP
        slow = "it is slower than fp32" if self.speedup_interval[1] < 1 else f"the speedup is below {MIN_SPEEDUP:g}"
        mr_failure = f"the miss rate increases by more than {limit:g} points"
        recall_failure = f"the recall drops by more than {MAX_RECALL_DROP:g} points"
        return (
            LimitCheck(self.mr_increase, *self.mr_interval, limit, False, mr_failure, "miss rate"),
            LimitCheck(self.recall_increase, *self.recall_interval, drop, True, recall_failure, "recall"),
            LimitCheck(self.speedup, *self.speedup_interval, MIN_SPEEDUP, True, slow, "speedup"),
        )

    @property
    def obstacles(self) -> list[str]:
        """Reasons why the data decide neither for nor against the converted file."""
        if not self.before.recall:
            return [f"the fp32 file detects no person at a score of {self.conf:g}, so nothing is compared"]
        if not has_reliable_interval(self.before.result):
            return [f"fewer than {MIN_IMAGES} images or {MIN_PERSONS} persons"]
        if any(check.is_failed for check in self.checks):
            return []
        return [check.format_undecided() for check in self.checks if not check.is_met]

    @property
    def reasons(self) -> list[str]:
        """Reasons against the converted file, or why there is no recommendation; empty if it is recommended."""
        return self.obstacles or [check.failure for check in self.checks if check.is_failed]

    @property
    def conclusion(self) -> str:
        """Conclusion: recommended, not recommended, or no recommendation."""
        return "no recommendation" if self.obstacles else "not recommended" if self.reasons else "recommended"

    def format_log_line(self) -> str:
        """Return the report as one line."""
        speedups = ", ".join(f"{latency.backend} {latency.fp32_ms / latency.ms:.2f}x" for latency in self.latencies)
        result, reasons = self.before.result, f": {' and '.join(self.reasons)}" if self.reasons else ""
        return (
            f"{self.precision} compared with fp32 on this device, with 95 % intervals: end-to-end speedup "
            f"{self.speedup:.2f}x ({_format_ends(self.speedup_interval, '.2f')}; {speedups}); "
            f"on {self.eval_backend}, {result.num_images} images, {result.num_gt} persons: "
            f"miss rate {self.mr_increase:+.2f} points ({_format_ends(self.mr_interval, '+.2f')}), now "
            f"{100 * self.after.miss_rate:.2f} %; recall at {self.conf:g} {self.recall_increase:+.2f} points "
            f"({_format_ends(self.recall_interval, '+.2f')}), now {100 * self.after.recall:.2f} %; "
            f"AP50 {100 * self.before.ap50:.1f} -> {100 * self.after.ap50:.1f} %, "
            f"AP {100 * self.before.ap:.1f} -> {100 * self.after.ap:.1f} %; "
            f"{self.conclusion}{reasons}"
        )

    def to_metadata(self) -> dict[str, Any]:
        """Return the report for the metadata of the converted file."""
        return {
            "precision": self.precision,
            "before": self.before.to_metadata(),
            "after": self.after.to_metadata(),
            "eval_backend": self.eval_backend,
            "num_images": self.before.result.num_images,
            "num_gt": self.before.result.num_gt,
            "latencies": [asdict(latency) for latency in self.latencies],
            "conf": self.conf,
            "max_mr_increase": self.max_mr_increase,
            "speedup": self.speedup,
            "speedup_interval": self.speedup_interval,
            "fastest": self.fastest.backend,
            "mr_increase": self.mr_increase,
            "mr_interval": self.mr_interval,
            "recall_increase": self.recall_increase,
            "recall_interval": self.recall_interval,
            "conclusion": self.conclusion,
            "recommended": self.conclusion == "recommended",
            "reasons": self.reasons,
        }


def compute_mr_interval(result: MissRateResult, reference: MissRateResult) -> tuple[float, float]:
    """Return the ends of the 95 % interval of the miss rate increase, in percentage points.

    Args:
        result: Miss rate of the converted file.
        reference: Miss rate of the FP32 file on the same images.

    Raises:
        DataError: If there is no person.
    """
    difference = compare_miss_rates(result, reference)
    if difference is None:
        raise DataError("--data: the images contain no person of at least 50 px. Set another dataset.")
    return 100 * difference.ci_low, 100 * difference.ci_high


def _format_ends(interval: tuple[float, float], spec: str) -> str:
    return f"{interval[0]:{spec}} to {interval[1]:{spec}}"


def format_not_measured(precision: str, reason: str) -> tuple[str, dict[str, Any]]:
    """Return the log line and the metadata of a file that this device cannot run.

    Args:
        precision: Precision of the file.
        reason: Why it cannot run.
    """
    return f"{precision} not measured: {reason}", {"precision": precision, "not_measured": reason}


def evaluate_accuracy(
    path: Path, device: str, samples: Sequence[Sample], conf: float, desc: str, model_config: Path | None = None
) -> Accuracy:
    """Measure the accuracy of a model file on the runtime of `get_eval_backend`.

    Args:
        path: Model file.
        device: cpu, cuda or cuda:N.
        samples: Images with ground truth.
        conf: Confidence threshold of the recall.
        desc: Label of the progress bar.
        model_config: YAML file or name of the configuration of a file of another tool.

    Returns:
        Miss rate, recall and average precision.
    """
    detections = predict_samples(path, device, get_eval_backend(device), samples, desc, model_config)
    result = evaluate_detections(samples, detections, [REASONABLE])[REASONABLE.name]
    precision = evaluate_average_precision(samples, detections)
    return Accuracy(result, compute_recall(result, conf), precision["AP"], precision["AP50"])


def compute_recall(result: MissRateResult, conf: float) -> float:
    """Return the ratio of persons that detections above a score threshold match, 0 to 1.

    Args:
        result: Miss rate curve of a setup.
        conf: Lowest score of a detection.
    """
    count = int((result.scores >= conf).sum())
    return 1 - float(result.miss_rate[count - 1]) if count else 0.0


def compare_latency(
    fp32: Path, path: Path, device: str, samples: Sequence[Sample], model_config: Path | None = None
) -> tuple[tuple[LatencyComparison, ...], tuple[float, float]]:
    """Measure the median latency of two files on every installed runtime that supports the device.

    Files and runtimes alternate, so that other load on the machine affects all of them equally.

    Args:
        fp32: The FP32 file.
        path: The converted file.
        device: cpu, cuda or cuda:N.
        samples: Images to select from.
        model_config: YAML file or name of the configuration of files of another tool.

    Returns:
        latencies: One comparison per runtime.
        speedup_interval: Ends of the 95 % interval of `PrecisionReport.speedup`.
    """
    images = [read_image(sample.path) for sample in select_evenly(samples, NUM_TIMED_IMAGES)]
    backends = list_onnx_backends(device)
    times_ms: dict[str, list[tuple[float, float]]] = {backend: [] for backend in backends}
    with ExitStack() as stack:
        pairs = {
            backend: [
                stack.enter_context(open_detector(file, device, backend=backend, model_config=model_config))
                for file in (fp32, path)
            ]
            for backend in backends
        }
        for backend in make_progress_bar(backends * NUM_ROUNDS, "timing", "round"):
            fp32_detector, detector = pairs[backend]
            round_images = islice(cycle(images), NUM_WARMUP + NUM_RUNS)
            round_ms = [(_measure_ms(fp32_detector, image), _measure_ms(detector, image)) for image in round_images]
            times_ms[backend] += round_ms[NUM_WARMUP:]
    medians = {backend: np.median(times_ms[backend], axis=0) for backend in backends}
    latencies = [LatencyComparison(backend, float(pair[0]), float(pair[1])) for backend, pair in medians.items()]
    return tuple(latencies), compute_speedup_interval([np.array(times_ms[backend]) for backend in backends])


def compute_speedup_interval(times_ms: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of the speedup over the timed runs.

    Args:
        times_ms (array[N, 2]): FP32 and converted latency of each pair of runs, for each runtime.

    Returns:
        Ends of the interval.
    """
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, len(times), (NUM_RESAMPLES, len(times))) for times in times_ms]
    medians = np.stack([np.median(times[index], axis=1) for times, index in zip(times_ms, rows, strict=True)])
    fastest = medians.min(axis=0)  # [NUM_RESAMPLES, 2]: FP32 and converted, each on its fastest runtime
    low, high = np.percentile(fastest[:, 0] / fastest[:, 1], [2.5, 97.5])
    return float(low), float(high)


def _measure_ms(detector: Detector, image_rgb: NDArray[np.uint8]) -> float:
    start = perf_counter()
    detector(image_rgb)
    return 1e3 * (perf_counter() - start)
