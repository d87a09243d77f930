"""How well a file sees and how fast it runs on this device, against another: real pictures, end to end.

The verdict: was it worth it?
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_deploy.pipeline import Detector, open_detector
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, HkdError
from hkd_det.image import read_image
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.matching import MissRateResult
from hkd_det.structures import Detections, Sample

NUM_ROUNDS, NUM_RUNS = 4, 10  # on each runtime in every round


NUM_WARMUP = 3  # runs of a round; the other runtime's threads have come to rest then


NUM_TIMED_IMAGES = NUM_WARMUP + NUM_RUNS


@dataclass(frozen=True)
class Accuracy:
    """miss_rate: MR^-2, Reasonable, 0..1. recall: of the people to be found, at the operating threshold, 0..1."""

    miss_rate: float
    recall: float


@dataclass(frozen=True)
class LatencyComparison:
    """Median milliseconds from frame to detections of the FP32 file and of the other, on one runtime."""

    backend: str
    fp32_ms: float
    ms: float


def load_eval_samples(data: str) -> list[Sample]:
    """A data set's val split. Raises as `open_data` does, with what to do about it; DataError if it shows nobody."""
    try:
        samples = load_dataset(data, "val")
    except HkdError as error:
        raise type(error)(f"no pictures to judge by: {error} (--data DATA names others)") from error
    if not evaluate_detections(samples, [], [REASONABLE])[REASONABLE.name].num_gt:
        raise DataError(f"{data}: nobody of 50 px or more in its split val to judge by; --data DATA names others")
    return samples


def evaluate_accuracy(path: Path, device: str, samples: Sequence[Sample], conf: float, desc: str) -> Accuracy:
    """Run a file over all samples, on `judging_backend`. conf: the operating threshold. what: for the progress bar."""
    found = predict_samples(path, device, eval_backend(device), samples, desc)
    judged = evaluate_detections(samples, found, [REASONABLE])[REASONABLE.name]
    return Accuracy(judged.value, compute_recall(judged, conf))


def predict_samples(path: Path, device: str, backend: str, samples: Sequence[Sample], desc: str) -> list[Detections]:
    """Detections of every sample, in order, in pixels of its picture. what: for the progress bar."""
    with open_detector(path, device, backend=backend) as detector:
        return [detector(read_image(sample.path)) for sample in tqdm(samples, desc, unit="picture", leave=False)]


def compute_recall(result: MissRateResult, conf: float) -> float:
    """The share of people that detections with a score of at least `conf` find."""
    count = int((result.scores >= conf).sum())
    return 1 - float(result.miss_rate[count - 1]) if count else 0.0


def compare_latency(fp32: Path, path: Path, device: str, samples: Sequence[Sample]) -> list[LatencyComparison]:
    """Both files in turn, picture by picture, on every runtime that is installed and takes the device.

    The runtimes take turns, too: what else the machine does then slows all of them alike.
    """
    places = np.linspace(0, len(samples) - 1, min(NUM_TIMED_IMAGES, len(samples))).round().astype(int)
    pictures = [read_image(samples[place].path) for place in places]
    names = list_onnx_backends(device)
    times_ms: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with ExitStack() as opened:
        pairs = {
            name: [opened.enter_context(open_detector(one, device, backend=name)) for one in (fp32, path)]
            for name in names
        }
        for name in tqdm(names * NUM_ROUNDS, "timing", unit="round", leave=False):
            first, second = pairs[name]
            runs = [(_measure_ms(first, picture), _measure_ms(second, picture)) for picture in _iterate_round(pictures)]
            times_ms[name] += runs[NUM_WARMUP:]
    return [LatencyComparison(name, *(float(median) for median in np.median(times_ms[name], axis=0))) for name in names]


def _iterate_round(images: Sequence[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """As many as a round needs."""
    return islice(cycle(images), NUM_WARMUP + NUM_RUNS)


def _measure_ms(detector: Detector, image: NDArray[np.uint8]) -> float:
    start = perf_counter()
    detector(image)
    return 1e3 * (perf_counter() - start)


def eval_backend(device: str) -> str:
    """The runtime that miss rates are measured on: OpenVINO where it is, which is the one that reckons in INT8."""
    return list_onnx_backends(device)[-1]


def list_onnx_backends(device: str) -> list[str]:
    """The installed runtimes that an ONNX file runs on as it is, without an engine being built first."""
    with_openvino = device == "cpu" and importlib.util.find_spec("openvino") is not None
    return ["onnxruntime", *(["openvino"] if with_openvino else [])]


MIN_SPEEDUP = 1.1  # below it nobody will notice


MAX_RECALL_DROP = 1.0  # percentage points


@dataclass(frozen=True)
class PrecisionReport:
    """What a smaller file costs and brings on the device it was made on.

    before, after: of the FP32 file and of this one, on the runtime `judged_on`. races: one a runtime.
    conf: the threshold of recall. max_mr_rise: percentage points.
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
        """The FP32 file's time on its fastest runtime over this file's on its own fastest."""
        return min(race.fp32_ms for race in self.latencies) / self.fastest.ms

    @property
    def fastest(self) -> LatencyComparison:
        """The runtime to run this file on."""
        return min(self.latencies, key=lambda race: race.ms)

    @property
    def mr_increase(self) -> float:
        """Percentage points."""
        return 100 * (self.after.miss_rate - self.before.miss_rate)

    @property
    def recall_increase(self) -> float:
        """Percentage points."""
        return 100 * (self.after.recall - self.before.recall)

    @property
    def reasons(self) -> list[str]:
        """Why it is not worth it; none if it is."""
        found = []
        if self.mr_increase > self.max_mr_increase:
            found.append(f"the miss rate rises by more than {self.max_mr_increase:g} points")
        if self.recall_increase < -MAX_RECALL_DROP:
            found.append(f"recall falls by more than {MAX_RECALL_DROP:g} points")
        if self.speedup * MIN_SPEEDUP < 1:
            found.append("it is slower")
        elif self.speedup < MIN_SPEEDUP:
            found.append("it is hardly faster")
        return found

    def log_line(self) -> str:
        """One line for the user."""
        ratios = ", ".join(f"{race.backend} {race.fp32_ms / race.ms:.2f}x" for race in self.latencies)
        end = f"not worth it: {' and '.join(self.reasons)}" if self.reasons else "worth it"
        return (
            f"{self.precision} against fp32 on this device: {self.speedup:.2f}x as fast end to end ({ratios}); "
            f"on {self.eval_backend} miss rate {self.mr_increase:+.2f} points "
            f"({100 * self.after.miss_rate:.2f} %), recall at {self.conf:g} {self.recall_increase:+.2f} points "
            f"({100 * self.after.recall:.2f} %): {end}"
        )

    def to_metadata(self) -> dict[str, Any]:
        """For the file's metadata."""
        return {
            **asdict(self),
            "speed": self.speedup,
            "fastest": self.fastest.backend,
            "miss_rate_rise": self.mr_increase,
            "recall_rise": self.recall_increase,
            "worth_it": not self.reasons,
            "reasons": self.reasons,
        }


def not_measured(precision: str, reason: str) -> tuple[str, dict[str, Any]]:
    """The line and the facts where this device cannot run the file."""
    return f"{precision}: not measured, neither worth it nor not: {reason}", {
        "precision": precision,
        "unmeasured": reason,
    }
