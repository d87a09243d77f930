"""Measurements before training: latency and AP50 of each student at each input size, speed of training steps.

Requires torch. All students have the weights of the shipped detector: the wide one computes the same function at first.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hkd_bench.quickstart.plan import (
    DEFAULT_SIZE,
    NARROW,
    STUDENT_SIZES,
    WIDE,
    OwnDataOptions,
    Speeds,
    StudentCandidate,
)
from hkd_bench.result import read_result
from hkd_deploy import Detector, open_detector
from hkd_deploy.export.exporter import export_onnx
from hkd_deploy.model_metadata import ExportOptions
from hkd_det.console import Progress, log_line
from hkd_det.errors import DataError
from hkd_det.image import read_image
from hkd_det.metrics.coco import evaluate_average_precision
from hkd_det.models.base import BaseDetector, Targets
from hkd_det.models.checkpoint import DetectorCheckpoint
from hkd_det.models.yolox_weights import load_yolox, widen_yolox
from hkd_det.ops.losses import sum_losses
from hkd_det.shipped import DEFAULT_MODEL, resolve_model
from hkd_det.structures import Detections, Sample
from hkd_det.train.config import TrainConfig
from hkd_det.train.context import resolve_device
from hkd_det.train.engine import uses_bf16

NUM_WARMUP, NUM_RUNS, NUM_ROUNDS = 3, 10, 2  # runs that measure the latency of a candidate
NUM_TIMED_IMAGES = 8
NUM_RATED_IMAGES = 100  # training images that rate the candidates before training
PROBE_BATCH, NUM_PROBE_STEPS = 8, 3
DEFAULT_EXPORT_S = 5.0  # if all files of the candidates exist


def make_initial_checkpoint(model: str, data: str) -> DetectorCheckpoint:
    """Return the shipped detector in an architecture.

    Args:
        model: Name of the architecture.
        data: Dataset, for the metadata of exported files.
    """
    source = load_yolox(resolve_model(DEFAULT_MODEL))
    detector = source if model == NARROW else widen_yolox(source, 2, noise=0.0)
    return DetectorCheckpoint.from_detector(detector, model, {"data": data}, 0, 1.0)


def measure_candidates(
    options: OwnDataOptions, samples: Sequence[Sample], directory: Path
) -> tuple[list[StudentCandidate], Speeds]:
    """Measure all students at all input sizes, and the speed of training steps.

    Args:
        options: Options of the run.
        samples: Training images.
        directory: Directory of the exported candidates.

    Returns:
        The candidates and the speeds.

    Raises:
        DataError: The file of `--device-bench` contains none of the candidates.
    """
    pairs = [(model, size) for model, sizes in STUDENT_SIZES.items() for size in sizes]
    device_ms = read_device_latencies(options.device_bench) if options.device_bench else None
    rated = select_evenly_spaced(samples, NUM_RATED_IMAGES)
    images = [read_image(sample.path) for sample in select_evenly_spaced(samples, NUM_TIMED_IMAGES)]
    export_times_s = []
    samples_ms: dict[tuple[str, int], list[float]] = {pair: [] for pair in pairs}
    ap50s: dict[int, float] = {}
    checkpoints = {model: make_initial_checkpoint(model, options.data) for model in STUDENT_SIZES}
    with Progress(NUM_ROUNDS * len(pairs), "measure the students", "measurement") as progress:
        for index in range(NUM_ROUNDS):  # a machine that becomes busy slows down all students alike
            for model, size in pairs:
                path = directory / f"{model}-{size}.onnx"
                if not path.exists():
                    start_s = time.monotonic()
                    export_onnx(checkpoints[model], path, ExportOptions((size, size)))
                    export_times_s.append(time.monotonic() - start_s)
                with open_detector(path, threads=options.threads) as detector:
                    samples_ms[model, size] += measure_latencies_ms(detector, images) if device_ms is None else []
                    if model == NARROW and index == 0:
                        ap50s[size] = evaluate_average_precision(rated, predict_exported(detector, rated))["AP50"]
                progress.update()
    latencies = {
        pair: float(np.median(samples_ms[pair])) if device_ms is None else device_ms.get(pair) for pair in pairs
    }
    export_s = float(np.mean(export_times_s)) if export_times_s else DEFAULT_EXPORT_S
    if device_ms is not None and not any(latencies.values()):
        raise DataError(
            f"--device-bench {options.device_bench}: contains none of the students. "
            f"Run hkd-bench {directory}/*.onnx --images DIR --json FILE on the device."
        )
    candidates = [StudentCandidate(*pair, latencies[pair], ap50s[pair[1]]) for pair in pairs]
    return candidates, measure_speeds(options, rated, directory / f"{NARROW}-{DEFAULT_SIZE}.onnx", export_s)


def read_device_latencies(path: Path) -> dict[tuple[str, int], float]:
    """Return the median latencies in a result of hkd-bench, in milliseconds by architecture and input size.

    Args:
        path: File of `hkd-bench --json`.

    Raises:
        DataError: The file is missing or invalid.
    """
    models = read_result(path).models
    return {(model.model, model.imgsz_hw[0]): model.latency.p50_ms for model in models if len(set(model.imgsz_hw)) == 1}


def select_evenly_spaced(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Select at most `count` samples, those with persons first.

    Args:
        samples: Samples to select from.
        count: Maximum number.

    Returns:
        The selected samples in their order.
    """
    with_persons = [sample for sample in samples if (~sample.ground_truth.ignore).any()] or list(samples)
    indices = np.linspace(0, len(with_persons) - 1, min(count, len(with_persons))).round().astype(int)
    return [with_persons[index] for index in np.unique(indices)]


def measure_latencies_ms(detector: Detector, images: Sequence[NDArray[np.uint8]]) -> list[float]:
    """Measure the latency from image to boxes.

    Args:
        detector: Opened model.
        images (uint8 array[H, W, 3]): RGB images.

    Returns:
        Milliseconds of each run after the warm-up.
    """
    times_ms = []
    for run in range(NUM_WARMUP + NUM_RUNS):
        start_s = time.perf_counter()
        detector(images[run % len(images)])
        times_ms.append(1e3 * (time.perf_counter() - start_s))
    return times_ms[NUM_WARMUP:]


def predict_exported(detector: Detector, samples: Sequence[Sample]) -> list[Detections]:
    """Run an opened model on the images of a dataset.

    Args:
        detector: Opened model.
        samples: Images to read.

    Returns:
        Detections of each image, in its pixels.
    """
    return [detector(read_image(sample.path)) for sample in samples]


def measure_speeds(options: OwnDataOptions, samples: Sequence[Sample], narrow_onnx: Path, export_s: float) -> Speeds:
    """Measure training steps and forward passes on random images, and the exported narrow student on real ones.

    Args:
        options: Options with the device of the training.
        samples: Images to read.
        narrow_onnx: The exported narrow student.
        export_s: Seconds of one export.

    Returns:
        Seconds per image.
    """
    with open_detector(narrow_onnx, threads=options.threads) as detector:
        start_s = time.monotonic()
        predict_exported(detector, samples)
        detect_s = (time.monotonic() - start_s) / len(samples)
    device = resolve_device(options.device)
    train_s, forward_s = {}, {}
    for model in (NARROW, WIDE):
        train_s[model], forward_s[model] = _measure_steps(model, device)
    log_line(
        f"training step: {1e3 * train_s[NARROW]:.0f} ms per image ({NARROW}), {1e3 * train_s[WIDE]:.0f} ms ({WIDE}) at "
        f"{DEFAULT_SIZE}x{DEFAULT_SIZE} on {device}"
    )
    return Speeds(train_s, forward_s, detect_s, export_s)


def _measure_steps(model: str, device: torch.device) -> tuple[float, float]:
    """Return the seconds per image of a training step and of a forward pass."""
    detector = make_initial_checkpoint(model, "").build().to(device).to(memory_format=torch.channels_last)
    shape = (PROBE_BATCH, 3, DEFAULT_SIZE, DEFAULT_SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    boxes = torch.tensor([80.0, 80.0, 160.0, 240.0], device=device).expand(PROBE_BATCH, 4, 4).contiguous()
    valid = torch.ones((PROBE_BATCH, 4), dtype=torch.bool, device=device)
    targets = Targets(boxes, valid, ~valid)
    train_s, forward_s = (_time_steps(detector, images, targets, is_training) for is_training in (True, False))
    return train_s / PROBE_BATCH, forward_s / PROBE_BATCH


def _time_steps(detector: BaseDetector, images: Tensor, targets: Targets, is_training: bool) -> float:
    """Return the median seconds of a step in the precision of the training; the first one is not counted."""
    device, times_s = images.device, []
    bf16 = uses_bf16(TrainConfig.precision, device)
    detector.train(is_training)
    for _ in range(1 + NUM_PROBE_STEPS):
        start_s = time.monotonic()
        with torch.set_grad_enabled(is_training), torch.autocast(device.type, torch.bfloat16, bf16):
            outputs = detector(images)
            losses = detector.loss(outputs, targets) if is_training else {}
        if is_training:
            torch.autograd.backward(sum_losses(losses))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(time.monotonic() - start_s)
    return float(np.median(times_s[1:]))
