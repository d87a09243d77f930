"""Accuracy and latency of a converted model, compared with its FP32 source on the current device."""

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import Detector
from hkd_deploy.pipeline import open_detector
from hkd_deploy.precision.model import make_progress_bar
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, HkdError, first_error_line
from hkd_det.image import read_image
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.matching import MissRateResult
from hkd_det.structures import Detections, Sample

NUM_ROUNDS, NUM_RUNS = 4, 10  # timed rounds per runtime, timed runs per round
NUM_WARMUP = 3  # runs before each round, until the threads of the previous runtime are idle
NUM_TIMED_IMAGES = NUM_WARMUP + NUM_RUNS
MIN_SPEEDUP = 1.1  # lower limit for a recommendation
MAX_RECALL_DROP = 1.0  # upper limit for a recommendation, percentage points

T = TypeVar("T")


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a model on a val split.

    Attributes:
        miss_rate: MR^-2 of the setup Reasonable, 0 to 1.
        recall: Ratio of persons detected at the confidence threshold, 0 to 1.
    """

    miss_rate: float
    recall: float


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


@dataclass(frozen=True)
class PrecisionReport:
    """Accuracy and latency of a converted file and its FP32 source.

    Attributes:
        precision: fp16 or int8.
        before: Accuracy of the FP32 file on `eval_backend`.
        after: Accuracy of the converted file on `eval_backend`.
        eval_backend: Runtime on which the accuracy was measured.
        latencies: One entry per runtime.
        conf: Confidence threshold of the recall.
        max_mr_increase: Limit of the miss rate increase, in percentage points.
    """

    precision: str
    before: Accuracy
    after: Accuracy
    eval_backend: str
    latencies: tuple[LatencyComparison, ...]
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

    @property
    def recall_increase(self) -> float:
        """Recall increase over FP32, in percentage points."""
        return 100 * (self.after.recall - self.before.recall)

    @property
    def has_detections(self) -> bool:
        """Whether the FP32 file detects at least one person. Otherwise a comparison has no meaning."""
        return self.before.recall > 0

    @property
    def reasons(self) -> list[str]:
        """Reasons against the converted file; empty if it is recommended."""
        if not self.has_detections:
            return [f"the fp32 file detects no person at a score of {self.conf:g}, so nothing is compared"]
        reasons = []
        if self.mr_increase > self.max_mr_increase:
            reasons.append(f"the miss rate increases by more than {self.max_mr_increase:g} points")
        if self.recall_increase < -MAX_RECALL_DROP:
            reasons.append(f"the recall drops by more than {MAX_RECALL_DROP:g} points")
        if self.speedup * MIN_SPEEDUP < 1:
            reasons.append("it is slower than fp32")
        elif self.speedup < MIN_SPEEDUP:
            reasons.append(f"the speedup is below {MIN_SPEEDUP:g}")
        return reasons

    def format_log_line(self) -> str:
        """Return the report as one line."""
        speedups = ", ".join(f"{latency.backend} {latency.fp32_ms / latency.ms:.2f}x" for latency in self.latencies)
        conclusion = f"not recommended: {' and '.join(self.reasons)}" if self.reasons else "recommended"
        return (
            f"{self.precision} compared with fp32 on this device: end-to-end speedup {self.speedup:.2f}x ({speedups}); "
            f"on {self.eval_backend} miss rate {self.mr_increase:+.2f} points "
            f"({100 * self.after.miss_rate:.2f} %), recall at {self.conf:g} {self.recall_increase:+.2f} points "
            f"({100 * self.after.recall:.2f} %); {conclusion}"
        )

    def to_metadata(self) -> dict[str, Any]:
        """Return the report for the metadata of the converted file."""
        return {
            **asdict(self),
            "speedup": self.speedup,
            "fastest": self.fastest.backend,
            "mr_increase": self.mr_increase,
            "recall_increase": self.recall_increase,
            "recommended": not self.reasons,
            "reasons": self.reasons,
        }


def format_not_measured(precision: str, reason: str) -> tuple[str, dict[str, Any]]:
    """Return the log line and the metadata of a file that this device cannot run.

    Args:
        precision: Precision of the file.
        reason: Why it cannot run.
    """
    return f"{precision} not measured: {reason}", {"precision": precision, "not_measured": reason}


def load_eval_samples(data: str) -> list[Sample]:
    """Load the val split of a dataset.

    Args:
        data: Dataset name or data YAML.

    Returns:
        All samples of the split.

    Raises:
        DataError: If the split has no person of the setup Reasonable.
        HkdError: If the dataset cannot be read.
    """
    try:
        samples = load_dataset(data, "val")
    except HkdError as error:
        raise type(error)(f"evaluation images: {first_error_line(error)}. Set --data to another dataset.") from error
    if not evaluate_detections(samples, [], [REASONABLE])[REASONABLE.name].num_gt:
        raise DataError(f"{data}: the val split has no person of at least 50 px. Set --data to another dataset.")
    return samples


def select_evenly(items: Sequence[T], count: int) -> list[T]:
    """Return items at even distances, including the first and the last.

    Args:
        items: Items to select from.
        count: Number of items. All items are returned if there are fewer.
    """
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in indices]


def predict_samples(path: Path, device: str, backend: str, samples: Sequence[Sample], desc: str) -> list[Detections]:
    """Run a model file on samples.

    Args:
        path: Model file or OpenVINO directory.
        device: cpu, cuda or cuda:N.
        backend: Runtime name.
        samples: Images to read.
        desc: Label of the progress bar.

    Returns:
        Detections of each sample, in image pixels.
    """
    with open_detector(path, device, backend=backend) as detector:
        return [detector(read_image(sample.path)) for sample in make_progress_bar(samples, desc, "image")]


def evaluate_accuracy(path: Path, device: str, samples: Sequence[Sample], conf: float, desc: str) -> Accuracy:
    """Measure the accuracy of a model file on the runtime of `get_eval_backend`.

    Args:
        path: Model file.
        device: cpu, cuda or cuda:N.
        samples: Images with ground truth.
        conf: Confidence threshold of the recall.
        desc: Label of the progress bar.

    Returns:
        Miss rate and recall.
    """
    detections = predict_samples(path, device, get_eval_backend(device), samples, desc)
    result = evaluate_detections(samples, detections, [REASONABLE])[REASONABLE.name]
    return Accuracy(result.value, compute_recall(result, conf))


def compute_recall(result: MissRateResult, conf: float) -> float:
    """Return the ratio of persons that detections above a score threshold match, 0 to 1.

    Args:
        result: Miss rate curve of a setup.
        conf: Lowest score of a detection.
    """
    count = int((result.scores >= conf).sum())
    return 1 - float(result.miss_rate[count - 1]) if count else 0.0


def compare_latency(fp32: Path, path: Path, device: str, samples: Sequence[Sample]) -> list[LatencyComparison]:
    """Measure the median latency of two files on every installed runtime that supports the device.

    Files and runtimes alternate, so that other load on the machine affects all of them equally.

    Args:
        fp32: The FP32 file.
        path: The converted file.
        device: cpu, cuda or cuda:N.
        samples: Images to select from.

    Returns:
        One comparison per runtime.
    """
    images = [read_image(sample.path) for sample in select_evenly(samples, NUM_TIMED_IMAGES)]
    backends = list_onnx_backends(device)
    times_ms: dict[str, list[tuple[float, float]]] = {backend: [] for backend in backends}
    with ExitStack() as stack:
        pairs = {
            backend: [stack.enter_context(open_detector(file, device, backend=backend)) for file in (fp32, path)]
            for backend in backends
        }
        for backend in make_progress_bar(backends * NUM_ROUNDS, "timing", "round"):
            fp32_detector, detector = pairs[backend]
            round_images = islice(cycle(images), NUM_WARMUP + NUM_RUNS)
            round_ms = [(_measure_ms(fp32_detector, image), _measure_ms(detector, image)) for image in round_images]
            times_ms[backend] += round_ms[NUM_WARMUP:]
    medians = {backend: np.median(times_ms[backend], axis=0) for backend in backends}
    return [LatencyComparison(backend, float(pair[0]), float(pair[1])) for backend, pair in medians.items()]


def get_eval_backend(device: str) -> str:
    """Return the runtime for accuracy measurements: OpenVINO if installed, because it executes INT8, or ONNX Runtime.

    Args:
        device: cpu, cuda or cuda:N.
    """
    return list_onnx_backends(device)[-1]


def list_onnx_backends(device: str) -> list[str]:
    """Return the installed runtimes that run an ONNX file on a device without building an engine.

    Args:
        device: cpu, cuda or cuda:N.
    """
    has_openvino = device == "cpu" and importlib.util.find_spec("openvino") is not None
    return ["onnxruntime", *(["openvino"] if has_openvino else [])]


def _measure_ms(detector: Detector, image_rgb: NDArray[np.uint8]) -> float:
    start = perf_counter()
    detector(image_rgb)
    return 1e3 * (perf_counter() - start)
