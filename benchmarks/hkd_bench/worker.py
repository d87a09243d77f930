"""`python -m hkd_bench.worker JOB.json OUT.json`: measure one model in a process of its own.

Its memory is then this model's alone, and nothing another model left behind (threads, caches, a fragmented heap)
touches its times. Stdout carries the number of runs done, a line at a time, for the parent's progress bar; none
is written between two timed runs. No torch.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_bench import memory
from hkd_deploy import Detector, open_detector
from hkd_det.datasets.sample import read_picture
from hkd_det.detections import Detections
from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError
from hkd_det.files import write_text

ERRORS: dict[str, type[HkdError]] = {kind.__name__: kind for kind in (UsageError, DataError, UnavailableError)}

# What a backend imports, where that is not ONNX Runtime.
LIBRARIES = {"openvino": "openvino", "openvino-bf16": "openvino", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class Job:
    """What one worker does.

    timed_pictures: decoded beforehand, then run in turn. warm_up, warm_up_s: untimed runs, at least so many and for at
    least so long. runs: timed from frame to detections. staged_runs: further runs that time each stage.
    evaluated_pictures: whose detections are written to `detections_npz`.
    """

    model: str
    device: str
    backend: str
    threads: int | None
    timed_pictures: tuple[str, ...]
    warm_up: int
    warm_up_s: float
    runs: int
    staged_runs: int
    evaluated_pictures: tuple[str, ...]
    detections_npz: str


@dataclass(frozen=True)
class Measured:
    """What one worker found. stages_ms: a row a staged run: preprocess, inference, postprocess."""

    model: str
    parameters: int
    flops: int
    imgsz_hw: tuple[int, int]
    load_ms: float
    e2e_ms: tuple[float, ...]
    stages_ms: tuple[tuple[float, float, float], ...]
    baseline_mib: float
    peak_memory_mib: float


def main(argv: Sequence[str]) -> int:
    """Measure; an HkdError goes to OUT.json, for the parent to raise."""
    job_path, out_path = map(Path, argv)
    job = job_from(json.loads(job_path.read_text(encoding="utf-8")))
    found: dict[str, Any]
    try:
        found = {"measured": asdict(measure(job))}
    except HkdError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    write_text(out_path, json.dumps(found))
    return 0


def job_from(values: dict[str, Any]) -> Job:
    """A job from its JSON form."""
    return Job(
        **{
            **values,
            "timed_pictures": tuple(values["timed_pictures"]),
            "evaluated_pictures": tuple(values["evaluated_pictures"]),
        }
    )


def measure(job: Job) -> Measured:
    """Times and memory first, then the detections of the evaluated pictures, outside both."""
    if job.threads is not None:
        cv2.setNumThreads(job.threads)
    pictures = [read_picture(Path(path)) for path in job.timed_pictures]
    # The library's own weight and loading are not the model's. Where it is missing, opening the model says so.
    with suppress(ImportError):
        importlib.import_module(LIBRARIES.get(job.backend, "onnxruntime"))
    memory.reset_peak()
    baseline_mib = memory.resident_mib()
    start = perf_counter()
    with open_detector(job.model, job.device, job.threads, job.backend) as detector:
        load_ms = 1e3 * (perf_counter() - start)
        _warm_up(detector, pictures, job)
        e2e_ms = _end_to_end(detector, pictures, job.runs)
        stages_ms = _staged(detector, pictures, job.staged_runs)
        peak_memory_mib = memory.peak_mib()
        if job.evaluated_pictures:
            found = [_detect(detector, path) for path in job.evaluated_pictures]
            write_detections(Path(job.detections_npz), found)
        manifest = detector.manifest
    return Measured(
        model=manifest.model,
        parameters=manifest.parameters,
        flops=manifest.flops,
        imgsz_hw=manifest.imgsz_hw,
        load_ms=load_ms,
        e2e_ms=tuple(e2e_ms),
        stages_ms=tuple(stages_ms),
        baseline_mib=baseline_mib,
        peak_memory_mib=peak_memory_mib,
    )


def _warm_up(detector: Detector, pictures: Sequence[NDArray[np.uint8]], job: Job) -> None:
    """By count and by time: ten runs of a small model are over before a processor has raised its clock."""
    turn, start = 0, perf_counter()
    while turn < job.warm_up or perf_counter() - start < job.warm_up_s:
        detector(pictures[turn % len(pictures)])
        turn += 1
    _report(job.warm_up)


def _end_to_end(detector: Detector, pictures: Sequence[NDArray[np.uint8]], runs: int) -> list[float]:
    samples = []
    for turn in range(runs):
        picture = pictures[turn % len(pictures)]
        start = perf_counter()
        detector(picture)
        samples.append(1e3 * (perf_counter() - start))
    _report(runs)
    return samples


def _staged(detector: Detector, pictures: Sequence[NDArray[np.uint8]], runs: int) -> list[tuple[float, float, float]]:
    samples = []
    for turn in range(runs):
        _, times = detector.timed(pictures[turn % len(pictures)])
        samples.append((times.preprocess_ms, times.inference_ms, times.postprocess_ms))
    _report(runs)
    return samples


def _detect(detector: Detector, path: str) -> Detections:
    found = detector(read_picture(Path(path)))
    _report(1)
    return found


def write_detections(path: Path, detections: Sequence[Detections]) -> None:
    """All pictures' detections in one .npz."""
    np.savez(
        path,
        count=np.array([len(one) for one in detections]),
        boxes_xyxy=np.concatenate([one.boxes_xyxy for one in detections]),
        scores=np.concatenate([one.scores for one in detections]),
    )


def read_detections(path: Path) -> list[Detections]:
    """What `write_detections` wrote, in the same order."""
    with np.load(path) as stored:
        ends = np.cumsum(stored["count"])[:-1]
        boxes, scores = np.split(stored["boxes_xyxy"], ends), np.split(stored["scores"], ends)
    return [Detections(*pair) for pair in zip(boxes, scores, strict=True)]


def _report(runs: int) -> None:
    print(runs, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
