"""How well a file sees and how fast it runs on this device, against another: real pictures, end to end."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_deploy.pipeline import Detector, open_detector
from hkd_det.datasets.catalogue import open_data
from hkd_det.datasets.sample import Sample, read_picture
from hkd_det.detections import Detections
from hkd_det.errors import DataError, HkdError
from hkd_det.metrics.citypersons import REASONABLE, evaluate
from hkd_det.metrics.curve import MissRate
from hkd_det.metrics.tables import DetectionTable, TruthTable

ROUNDS, RUNS = 4, 10  # on each runtime in every round
WARM_UP = 3  # runs of a round; the other runtime's threads have come to rest then
TIMED_PICTURES = WARM_UP + RUNS


@dataclass(frozen=True)
class Judgement:
    """miss_rate: MR^-2, Reasonable, 0..1. recall: of the people to be found, at the operating threshold, 0..1."""

    miss_rate: float
    recall: float


@dataclass(frozen=True)
class Race:
    """Median milliseconds from frame to detections of the FP32 file and of the other, on one runtime."""

    backend: str
    fp32_ms: float
    ms: float


def judged_samples(data: str) -> list[Sample]:
    """A data set's val split. Raises as `open_data` does, with what to do about it; DataError if it shows nobody."""
    try:
        samples = open_data(data, "val")
    except HkdError as error:
        raise type(error)(f"no pictures to judge by: {error} (--data DATA names others)") from error
    truth = TruthTable.of([sample.truth for sample in samples])
    if not evaluate(truth, DetectionTable.of([]), [REASONABLE])[REASONABLE.name].people:
        raise DataError(f"{data}: nobody of 50 px or more in its split val to judge by; --data DATA names others")
    return samples


def judge(path: Path, device: str, samples: Sequence[Sample], conf: float, what: str) -> Judgement:
    """Run a file over all samples, on `judging_backend`. conf: the operating threshold. what: for the progress bar."""
    found = detect_all(path, device, judging_backend(device), samples, what)
    truth = TruthTable.of([sample.truth for sample in samples])
    judged = evaluate(truth, DetectionTable.of(found), [REASONABLE])[REASONABLE.name]
    return Judgement(judged.value, recall_at(judged, conf))


def detect_all(path: Path, device: str, backend: str, samples: Sequence[Sample], what: str) -> list[Detections]:
    """Detections of every sample, in order, in pixels of its picture. what: for the progress bar."""
    with open_detector(path, device, backend=backend) as detector:
        return [detector(read_picture(sample.path)) for sample in tqdm(samples, what, unit="picture", leave=False)]


def recall_at(judged: MissRate, conf: float) -> float:
    """The share of people that detections with a score of at least `conf` find."""
    count = int((judged.scores >= conf).sum())
    return 1 - float(judged.miss_rate[count - 1]) if count else 0.0


def race(fp32: Path, path: Path, device: str, samples: Sequence[Sample]) -> list[Race]:
    """Both files in turn, picture by picture, on every runtime that is installed and takes the device.

    The runtimes take turns, too: what else the machine does then slows all of them alike.
    """
    places = np.linspace(0, len(samples) - 1, min(TIMED_PICTURES, len(samples))).round().astype(int)
    pictures = [read_picture(samples[place].path) for place in places]
    names = backends(device)
    times_ms: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with ExitStack() as opened:
        pairs = {
            name: [opened.enter_context(open_detector(one, device, backend=name)) for one in (fp32, path)]
            for name in names
        }
        for name in tqdm(names * ROUNDS, "timing", unit="round", leave=False):
            first, second = pairs[name]
            runs = [(_timed_ms(first, picture), _timed_ms(second, picture)) for picture in _round_of(pictures)]
            times_ms[name] += runs[WARM_UP:]
    return [Race(name, *(float(median) for median in np.median(times_ms[name], axis=0))) for name in names]


def _round_of(pictures: Sequence[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """As many as a round needs."""
    return islice(cycle(pictures), WARM_UP + RUNS)


def _timed_ms(detector: Detector, picture: NDArray[np.uint8]) -> float:
    start = perf_counter()
    detector(picture)
    return 1e3 * (perf_counter() - start)


def judging_backend(device: str) -> str:
    """The runtime that miss rates are measured on: OpenVINO where it is, which is the one that reckons in INT8."""
    return backends(device)[-1]


def backends(device: str) -> list[str]:
    """The installed runtimes that an ONNX file runs on as it is, without an engine being built first."""
    with_openvino = device == "cpu" and importlib.util.find_spec("openvino") is not None
    return ["onnxruntime", *(["openvino"] if with_openvino else [])]
