"""Measurement of one model in a process of its own: `python -m hkd_bench.worker JOB.json OUT.json`.

A separate process measures the memory of this model only, and threads, caches or heap fragments of other models do not
affect its latency. Stdout contains the number of finished runs, one number per line, for the progress bar of the
parent; nothing is written between two timed runs. The module imports neither torch nor matplotlib.
"""

import importlib
import json
import os
import signal
import sys
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event
from time import perf_counter, time
from typing import Any

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray

from hkd_bench.cameras import MAX_BATCH, search_batches, search_cameras
from hkd_bench.scenarios import PACED, ScenarioSettings, measure_paced
from hkd_deploy import Detector, open_detector
from hkd_deploy.process_memory import read_peak_mib, reset_peak
from hkd_det.config import dataclass_from_dict
from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError
from hkd_det.files import write_text
from hkd_det.image import read_image
from hkd_det.structures import Detections

BLOCK_S = 1.0  # several updates of every power sensor; NVML counters change every 0.1 s
# Start and end (Unix time in seconds) and number of frames.
Block = tuple[float, float, int]
PROGRESS_S = 10  # between two lines of progress of a sustained run, which counts seconds
ERROR_CLASSES: dict[str, type[HkdError]] = {cls.__name__: cls for cls in (UsageError, DataError, UnavailableError)}
# Package that a backend imports, if it is not onnxruntime.
BACKEND_MODULES = {"openvino": "openvino", "openvino-bf16": "openvino", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class WorkerJob:
    """Work of one worker process.

    Attributes:
        model: Path of the model.
        device: Device as for `open_detector`.
        backend: Backend as for `open_detector`.
        threads: CPU threads; None for the default of the runtime.
        timed_images: Images that are decoded in advance and timed in turn.
        warmup: Minimum number of untimed runs.
        warmup_s: Minimum duration of the untimed runs in seconds.
        runs: Timed runs from frame to detections.
        stage_runs: Further runs that time each stage.
        model_config: YAML file of the model configuration, for a model of another tool; None for its default.
        eval_images: Images whose detections are written to `detections_npz`.
        detections_npz: Output path of the detections.
        energy_s: Duration of further runs without pauses whose energy is measured, in seconds; 0 for none.
        imgsz_hw: Input size in pixels of a model with a dynamic size; None for that of its export.
        cameras_fps: Frames per second of each camera if the number of cameras is searched; None otherwise.
        scenario: Name of a scenario that is measured; empty for none.
        scenario_settings: Settings of the scenario.
        log_dir: Directory of LoadGen's logs.
        sustained_s: Duration of a run without pauses, whose latencies are written to `sustained_npz`, in seconds; 0 for
            none. SIGINT ends it.
        sustained_npz: Output path of the latencies over time.
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
    model_config: str | None
    eval_images: tuple[str, ...]
    detections_npz: str
    energy_s: float = 0.0
    imgsz_hw: tuple[int, int] | None = None
    cameras_fps: float | None = None
    scenario: str = ""
    scenario_settings: ScenarioSettings = field(default_factory=ScenarioSettings)
    log_dir: str = ""
    sustained_s: float = 0.0
    sustained_npz: str = ""


@dataclass(frozen=True)
class WorkerResult:
    """Measurements of one worker process.

    Attributes:
        model: Name of the architecture.
        license: License of the weights.
        parameters: Number of parameters.
        flops: FLOPs per image; None if unknown.
        imgsz_hw: Input size in pixels.
        conf: Score threshold that the model suggests, 0 to 1; None if it suggests none.
        load_ms: Time to open the model in milliseconds.
        e2e_ms: Latency of each timed run in milliseconds.
        stages_ms: Latency of preprocess, inference and postprocess of each stage run.
        baseline_mib: Resident memory before the model was opened, in MiB.
        build_memory_mib: Peak resident memory while the model was opened and its engine or session was built, in MiB.
        gpu_build_memory_mib: GPU memory of this process after that, in MiB; None if it was not measured.
        peak_memory_mib: Peak resident memory from the opening of the model to the end of the timed runs, in MiB.
        timed_window: Start and end of the timed runs and stage runs, Unix time in seconds.
        blocks: Blocks of the runs whose energy is measured.
        gpu_memory_mib: GPU memory of this process after timing, in MiB; None if it was not measured.
        gpu_memory_reason: Reason why `gpu_memory_mib` is None; empty otherwise.
        cameras: Number of cameras with the fields of `CameraResult`; None if it was not searched.
        scenario: Fields of `ScenarioResult`; None if no scenario was measured.
        is_interrupted: Whether SIGINT ended the sustained run.
    """

    model: str
    license: str
    parameters: int
    flops: int | None
    imgsz_hw: tuple[int, int]
    conf: float | None
    load_ms: float
    e2e_ms: tuple[float, ...]
    stages_ms: tuple[tuple[float, float, float], ...]
    baseline_mib: float
    build_memory_mib: float
    gpu_build_memory_mib: float | None
    peak_memory_mib: float
    timed_window: tuple[float, float]
    blocks: tuple[Block, ...]
    gpu_memory_mib: float | None
    gpu_memory_reason: str
    cameras: dict[str, Any] | None = None
    scenario: dict[str, Any] | None = None
    is_interrupted: bool = False


def main(argv: Sequence[str]) -> int:
    """Run the job in the file argv[0] and write the result to argv[1].

    An `HkdError` is written to the result, and the parent raises it.

    Args:
        argv: The job (JSON) and the file to write (JSON).

    Returns:
        Exit code 0, also after an `HkdError`.
    """
    job_path, out_path = map(Path, argv)
    job = parse_job(json.loads(job_path.read_text(encoding="utf-8")))
    content: dict[str, Any]
    try:
        content = {"result": asdict(measure_model(job))}
    except HkdError as error:
        content = {"error": type(error).__name__, "message": str(error)}
    write_text(out_path, json.dumps(content))
    return 0


def parse_job(values: dict[str, Any]) -> WorkerJob:
    """Build a job from its JSON form, in which tuples are lists.

    Args:
        values: Content of the JSON file.

    Returns:
        The job.
    """
    return dataclass_from_dict(WorkerJob, values)


def measure_model(job: WorkerJob) -> WorkerResult:
    """Measure latency and memory, then run the model on the evaluation images.

    Args:
        job: Work to do. The detections are written to `job.detections_npz`.

    Returns:
        The measurements.

    Raises:
        HkdError: The model or an image cannot be opened.
    """
    stop = Event()
    if job.sustained_s:
        signal.signal(signal.SIGINT, lambda *_: stop.set())
    if job.threads is not None:
        cv2.setNumThreads(job.threads)
    images = [read_image(Path(path)) for path in job.timed_images]
    # Import the runtime before the baseline: its own memory and loading time do not belong to the model. If it is
    # missing, opening the model raises the error.
    with suppress(ImportError):
        importlib.import_module(BACKEND_MODULES.get(job.backend, "onnxruntime"))
    reset_peak()
    baseline_mib = read_resident_mib()
    start = perf_counter()
    model_config = Path(job.model_config) if job.model_config else None
    with open_detector(
        job.model, job.device, job.threads, job.backend, model_config=model_config, imgsz_hw=job.imgsz_hw
    ) as detector:
        load_ms = 1e3 * (perf_counter() - start)
        build_memory_mib = read_peak_mib()
        gpu_build_memory_mib, _ = _read_gpu_memory(job.device)
        _run_warmup(detector, images, job)
        timing_start = time()
        e2e_ms = _time_end_to_end(detector, images, job.runs)
        stages_ms = _time_stages(detector, images, job.stage_runs)
        timing_end = time()
        peak_memory_mib = read_peak_mib()
        gpu_memory_mib, gpu_memory_reason = _read_gpu_memory(job.device)
        blocks = _run_blocks(detector, images, job.energy_s)
        cameras = _search_cameras(detector, images, job.cameras_fps) if job.cameras_fps else None
        scenario = _run_scenario(detector, images, job) if job.scenario else None
        if job.sustained_s:
            _run_sustained(detector, images, job, stop)
        if job.eval_images:
            detections = [_predict_image(detector, path) for path in job.eval_images]
            write_detections_npz(Path(job.detections_npz), detections)
        metadata = detector.metadata
    return WorkerResult(
        model=metadata.model,
        license=metadata.license,
        parameters=metadata.parameters,
        flops=metadata.flops,
        imgsz_hw=metadata.imgsz_hw,
        conf=metadata.conf,
        load_ms=load_ms,
        e2e_ms=tuple(e2e_ms),
        stages_ms=tuple(stages_ms),
        baseline_mib=baseline_mib,
        build_memory_mib=build_memory_mib,
        gpu_build_memory_mib=gpu_build_memory_mib,
        peak_memory_mib=peak_memory_mib,
        timed_window=(timing_start, timing_end),
        blocks=tuple(blocks),
        gpu_memory_mib=gpu_memory_mib,
        gpu_memory_reason=gpu_memory_reason,
        cameras=cameras,
        scenario=scenario,
        is_interrupted=stop.is_set(),
    )


def read_resident_mib() -> float:
    """Return the resident memory of this process in MiB (2^20 bytes)."""
    return float(psutil.Process().memory_info().rss) / 2**20


def write_detections_npz(path: Path, detections: Sequence[Detections]) -> None:
    """Write the detections of all images to one .npz file.

    Args:
        path: Output file (.npz).
        detections: Detections of each image.
    """
    np.savez(
        path,
        num_detections=np.array([len(image) for image in detections]),
        boxes_xyxy=np.concatenate([image.boxes_xyxy for image in detections]),
        scores=np.concatenate([image.scores for image in detections]),
    )


def read_detections_npz(path: Path) -> list[Detections]:
    """Read the file of `write_detections_npz`; one entry per image, in the same order.

    Args:
        path: The file.

    Returns:
        Detections of each image.
    """
    with np.load(path) as arrays:
        ends = np.cumsum(arrays["num_detections"])[:-1]
        boxes, scores = np.split(arrays["boxes_xyxy"], ends), np.split(arrays["scores"], ends)
    return [Detections(*pair) for pair in zip(boxes, scores, strict=True)]


def _run_warmup(detector: Detector, images: Sequence[NDArray[np.uint8]], job: WorkerJob) -> None:
    """Warm up by count and by time: ten runs of a small model end before the processor raises its clock."""
    run, start = 0, perf_counter()
    while run < job.warmup or perf_counter() - start < job.warmup_s:
        detector(images[run % len(images)])
        run += 1
    _report_progress(job.warmup)


def _time_end_to_end(detector: Detector, images: Sequence[NDArray[np.uint8]], runs: int) -> list[float]:
    samples_ms = []
    for run in range(runs):
        image = images[run % len(images)]
        start = perf_counter()
        detector(image)
        samples_ms.append(1e3 * (perf_counter() - start))
    _report_progress(runs)
    return samples_ms


def _time_stages(
    detector: Detector, images: Sequence[NDArray[np.uint8]], runs: int
) -> list[tuple[float, float, float]]:
    samples_ms = []
    for run in range(runs):
        _, times = detector.predict_timed(images[run % len(images)])
        samples_ms.append((times.preprocess_ms, times.inference_ms, times.postprocess_ms))
    _report_progress(runs)
    return samples_ms


def _run_blocks(detector: Detector, images: Sequence[NDArray[np.uint8]], seconds: float) -> list[Block]:
    """Run without pauses in blocks of at least `BLOCK_S` and one frame."""
    blocks: list[Block] = []
    end = time() + seconds
    run = 0
    while time() < end:
        start, first_run = time(), run
        while run == first_run or time() - start < BLOCK_S:
            detector(images[run % len(images)])
            run += 1
        blocks.append((start, time(), run - first_run))
    return blocks


def _run_sustained(detector: Detector, images: Sequence[NDArray[np.uint8]], job: WorkerJob, stop: Event) -> None:
    """Run without pauses and write the start (Unix time) and the latency of each frame."""
    starts, latencies_ms = array("d"), array("d")
    unix_offset_s = time() - perf_counter()
    start = end = perf_counter()
    report_s = end + PROGRESS_S
    while end - start < job.sustained_s and not stop.is_set():
        frame_start = perf_counter()
        detector(images[len(starts) % len(images)])
        end = perf_counter()
        starts.append(frame_start + unix_offset_s)
        latencies_ms.append(1e3 * (end - frame_start))
        if end >= report_s:
            _report_progress(PROGRESS_S)
            report_s += PROGRESS_S
    np.savez(job.sustained_npz, starts=np.array(starts), latencies_ms=np.array(latencies_ms))


def _search_cameras(detector: Detector, images: Sequence[NDArray[np.uint8]], fps: float) -> dict[str, Any]:
    detect, batch = _make_detect(detector, images), detector.metadata.batch
    result = search_cameras(detect, fps, batch or 1)
    largest_batch, batches = search_batches(detect, fps, batch, min(detector.max_batch or MAX_BATCH, MAX_BATCH))
    return asdict(replace(result, largest_batch=largest_batch, batches=batches))


def _run_scenario(detector: Detector, images: Sequence[NDArray[np.uint8]], job: WorkerJob) -> dict[str, Any]:
    detect, settings = _make_detect(detector, images), job.scenario_settings
    if job.scenario == PACED:
        return asdict(measure_paced(detect, settings))
    from hkd_bench.loadgen import run_loadgen  # noqa: PLC0415  # optional package

    batch = detector.metadata.batch or settings.batch
    if detector.max_batch is not None and batch > detector.max_batch:
        raise UsageError(
            f"--scenario-batch {batch}: {job.model} accepts at most {detector.max_batch}. Set a smaller one."
        )
    return asdict(run_loadgen(job.scenario, detect, len(images), batch, settings, Path(job.log_dir)))


def _make_detect(
    detector: Detector, images: Sequence[NDArray[np.uint8]]
) -> Callable[[Sequence[int]], Sequence[Detections]]:
    """Return a function that detects in the frames with the given numbers; the images repeat."""
    return lambda frames: detector.predict_batches([images[frame % len(images)] for frame in frames])


def _read_gpu_memory(device: str) -> tuple[float | None, str]:
    """Return the GPU memory of this process in MiB, or None and the reason."""
    if not device.startswith("cuda"):
        return None, f"device {device}"
    from hkd_bench.host import HostFieldError, NvmlGpu  # noqa: PLC0415  # after the peak memory was read

    try:
        return NvmlGpu(device).read_process_memory_mib(os.getpid()), ""
    except HostFieldError as error:
        return None, str(error)


def _predict_image(detector: Detector, path: str) -> Detections:
    detections = detector(read_image(Path(path)))
    _report_progress(1)
    return detections


def _report_progress(runs: int) -> None:
    print(runs, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
