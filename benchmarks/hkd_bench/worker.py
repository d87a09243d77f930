"""Resident memory of this process, in MiB (2^20 bytes).

`python -m hkd_bench.worker JOB.json OUT.json`: measure one model in a process of its own.

Its memory is then this model's alone, and nothing another model left behind (threads, caches, a fragmented heap)
touches its times. Stdout carries the number of runs done, a line at a time, for the parent's progress bar; none
is written between two timed runs. No torch.
"""

import importlib
import json
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray

from hkd_deploy import Detector, open_detector
from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError
from hkd_det.files import write_text
from hkd_det.image import read_image
from hkd_det.structures import Detections

STATUS = Path("/proc/self/status")


CLEAR_REFS = Path("/proc/self/clear_refs")


def read_resident_mib() -> float:
    """Resident now."""
    return float(psutil.Process().memory_info().rss) / 2**20


def reset_peak() -> None:
    """Start the peak afresh at what is resident now, where the kernel allows it (Linux); else it goes on."""
    with suppress(OSError):
        CLEAR_REFS.write_text("5", encoding="ascii")


def read_peak_mib() -> float:
    """Most ever resident, or most since `reset_peak`."""
    if STATUS.exists():
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**20 if sys.platform == "darwin" else largest / 1024


ERROR_CLASSES: dict[str, type[HkdError]] = {kind.__name__: kind for kind in (UsageError, DataError, UnavailableError)}


# What a backend imports, where that is not ONNX Runtime.
BACKEND_MODULES = {"openvino": "openvino", "openvino-bf16": "openvino", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class WorkerJob:
    """What one worker does.

    timed_pictures: decoded beforehand, then run in turn. warm_up, warm_up_s: untimed runs, at least so many and for at
    least so long. runs: timed from frame to detections. staged_runs: further runs that time each stage.
    evaluated_pictures: whose detections are written to `detections_npz`.
    """

    model: str
    device: str
    backend: str
    threads: int | None
    timed_images: tuple[str, ...]
    warmup: int
    warmup_s: float
    runs: int
    stage_runs: int
    eval_images: tuple[str, ...]
    detections_npz: str


@dataclass(frozen=True)
class WorkerResult:
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
    job = parse_job(json.loads(job_path.read_text(encoding="utf-8")))
    found: dict[str, Any]
    try:
        found = {"measured": asdict(measure_model(job))}
    except HkdError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    write_text(out_path, json.dumps(found))
    return 0


def parse_job(values: dict[str, Any]) -> WorkerJob:
    """A job from its JSON form."""
    return WorkerJob(
        **{
            **values,
            "timed_pictures": tuple(values["timed_pictures"]),
            "evaluated_pictures": tuple(values["evaluated_pictures"]),
        }
    )


def measure_model(job: WorkerJob) -> WorkerResult:
    """Times and memory first, then the detections of the evaluated pictures, outside both."""
    if job.threads is not None:
        cv2.setNumThreads(job.threads)
    pictures = [read_image(Path(path)) for path in job.timed_images]
    # The library's own weight and loading are not the model's. Where it is missing, opening the model says so.
    with suppress(ImportError):
        importlib.import_module(BACKEND_MODULES.get(job.backend, "onnxruntime"))
    reset_peak()
    baseline_mib = read_resident_mib()
    start = perf_counter()
    with open_detector(job.model, job.device, job.threads, job.backend) as detector:
        load_ms = 1e3 * (perf_counter() - start)
        _run_warmup(detector, pictures, job)
        e2e_ms = _time_end_to_end(detector, pictures, job.runs)
        stages_ms = _time_stages(detector, pictures, job.stage_runs)
        peak_memory_mib = read_peak_mib()
        if job.eval_images:
            found = [_predict_image(detector, path) for path in job.eval_images]
            write_detections_npz(Path(job.detections_npz), found)
        manifest = detector.metadata
    return WorkerResult(
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


def _run_warmup(detector: Detector, images: Sequence[NDArray[np.uint8]], job: WorkerJob) -> None:
    """By count and by time: ten runs of a small model are over before a processor has raised its clock."""
    turn, start = 0, perf_counter()
    while turn < job.warmup or perf_counter() - start < job.warmup_s:
        detector(images[turn % len(images)])
        turn += 1
    _report_progress(job.warmup)


def _time_end_to_end(detector: Detector, images: Sequence[NDArray[np.uint8]], runs: int) -> list[float]:
    samples = []
    for turn in range(runs):
        picture = images[turn % len(images)]
        start = perf_counter()
        detector(picture)
        samples.append(1e3 * (perf_counter() - start))
    _report_progress(runs)
    return samples


def _time_stages(
    detector: Detector, images: Sequence[NDArray[np.uint8]], runs: int
) -> list[tuple[float, float, float]]:
    samples = []
    for turn in range(runs):
        _, times = detector.predict_timed(images[turn % len(images)])
        samples.append((times.preprocess_ms, times.inference_ms, times.postprocess_ms))
    _report_progress(runs)
    return samples


def _predict_image(detector: Detector, path: str) -> Detections:
    found = detector(read_image(Path(path)))
    _report_progress(1)
    return found


def write_detections_npz(path: Path, detections: Sequence[Detections]) -> None:
    """All pictures' detections in one .npz."""
    np.savez(
        path,
        count=np.array([len(one) for one in detections]),
        boxes_xyxy=np.concatenate([one.boxes_xyxy for one in detections]),
        scores=np.concatenate([one.scores for one in detections]),
    )


def read_detections_npz(path: Path) -> list[Detections]:
    """What `write_detections` wrote, in the same order."""
    with np.load(path) as stored:
        ends = np.cumsum(stored["count"])[:-1]
        boxes, scores = np.split(stored["boxes_xyxy"], ends), np.split(stored["scores"], ends)
    return [Detections(*pair) for pair in zip(boxes, scores, strict=True)]


def _report_progress(runs: int) -> None:
    print(runs, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
