"""Steps of `gpu_check.py`, each in a process of its own: `gpu_check_steps.py STEP --device D --work DIR --out JSON`.

A step returns measured values or raises an error. `STEPS` is the table of all steps. The inference steps use the
shipped detector hkd-cpu on synthetic images; ONNX Runtime on the CPU is the reference of their outputs.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.host import HostFieldError, NvmlGpu
from hkd_deploy.backends import open_backend
from hkd_deploy.export.cli import main as run_export
from hkd_deploy.export.parity import compare_outputs, make_onnx_reference, run_reference
from hkd_deploy.precision.model import predict_samples
from hkd_deploy.trt.builder import BuildOptions
from hkd_deploy.trt.cli import check_build
from hkd_deploy.trt.engine_info import read_engine_info
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.synthetic.writer import write_synthetic_dataset
from hkd_det.errors import DataError, HkdError, UnavailableError, first_error_line
from hkd_det.files import write_text
from hkd_det.shipped import resolve_model
from hkd_det.structures import Sample, box_iou

MODEL = Path("hkd-cpu")
DATA_YAML = "format: citypersons\npath: data\ntrain: train\nval: val\n"
NUM_TRAIN, NUM_VAL, IMAGE_HW = 8, 8, (256, 384)
FP32_ENGINE, INT8_MODEL, INT8_ENGINE = "fp32.engine", "int8.onnx", "int8.engine"
TRAINED_STEPS, TIMED_STEPS = 3, 10
RUNS, NUM_BATCHES = 200, 200
MIN_SCORE, MIN_DETECTED = 0.3, 0.5  # of reduced precision; half the score is enough for the other model
Values = dict[str, Any]


@dataclass(frozen=True)
class StepContext:
    """Arguments of a step.

    Attributes:
        device: cpu, or cuda or cuda:N.
        work_dir: Directory that the steps share: images, engines.
    """

    device: str
    work_dir: Path

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device != "cpu"

    @property
    def data(self) -> str:
        """Data YAML of the synthetic images."""
        return str(self.work_dir / "data.yaml")


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        title: What is checked.
        run: Function that returns the measured values.
        limit_s: Time limit in seconds.
        requires_gpu: Whether the step is skipped without a GPU.
        packages: Packages without which the step is skipped.
    """

    title: str
    run: Callable[[StepContext], Values]
    limit_s: int
    requires_gpu: bool = False
    packages: tuple[str, ...] = ()


def read_environment(context: StepContext) -> Values:
    """Read versions and the GPU; a GPU that torch or NVML cannot use is an error."""
    import torch  # noqa: PLC0415 - other steps run without torch

    names = ("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-python", "nvidia-ml-py")
    values: Values = {}
    for name in names:
        try:
            values[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            values[name] = "not installed"
    values["CUDA of torch"] = torch.version.cuda or "none, CPU build"
    if context.is_gpu:
        if not torch.cuda.is_available():
            raise UnavailableError("torch: sees no GPU. Install a CUDA build of torch that fits the driver.")
        properties = torch.cuda.get_device_properties(torch.device(context.device))
        values |= {"GPU": properties.name, "compute capability": f"{properties.major}.{properties.minor}"}
        values["memory_mib"] = round(properties.total_memory / 2**20)
        try:
            gpu = NvmlGpu(context.device)
            values |= {"NVML power_w": gpu.read_power_w(), "NVML clock_mhz": gpu.read_clock_mhz()}
            values["NVML energy_j"] = gpu.read_energy_j()
        except HostFieldError as error:
            raise UnavailableError(f"NVML: {error}. Install hkd-det[nvml] and the driver.") from None
    return values


def write_images(context: StepContext) -> Values:
    """Render the images that the inference steps use."""
    write_synthetic_dataset(context.work_dir / "data", NUM_TRAIN, NUM_VAL, size_hw=IMAGE_HW)
    write_text(Path(context.data), DATA_YAML)
    persons = [int((~sample.ground_truth.ignore).sum()) for sample in load_dataset(context.data, "val")]
    if len(persons) != NUM_VAL or not sum(persons):
        raise DataError(f"{context.data}: expected {NUM_VAL} images with persons, got {persons}. Delete the directory.")
    return {"images": NUM_TRAIN + NUM_VAL, "persons in val": sum(persons)}


def measure_training(context: StepContext, name: str) -> Values:
    """Measure the training step of the teacher, of the student, or of the student with the teacher (HKD).

    The roofline is the rate of a large matrix product in the precision of the training on the same device. A training
    step counts as three forward passes of the trained model, and one of a frozen teacher.

    Args:
        context: Device.
        name: teacher, student or distilled.
    """
    import torch  # noqa: PLC0415 - other steps run without torch
    from distillation_cost import Case, make_batch, make_step, make_timer, prepare_model  # noqa: PLC0415 - imports torch

    from hkd_det.distill.distiller import Distiller, build_methods  # noqa: PLC0415 - imports torch
    from hkd_det.distill.hkd import HKDConfig  # noqa: PLC0415 - imports torch
    from hkd_det.models.zoo import build_model, count_params_and_flops  # noqa: PLC0415 - imports torch

    device = torch.device(context.device)
    case = Case("student-r18", (512, 640), 32) if context.is_gpu else Case("mini-student", (96, 128), 2)
    torch.manual_seed(0)
    images, targets = make_batch(case, device)
    models = {model: build_model(getattr(case, model)) for model in ("student", "teacher")}
    flops = {model: count_params_and_flops(one, case.imgsz_hw).flops for model, one in models.items()}
    student, teacher = (prepare_model(models[model], device) for model in ("student", "teacher"))
    if name == "distilled":
        methods = {"hkd": HKDConfig(region_min_score=0.0, max_regions=3)}
        distiller = Distiller(student, teacher, build_methods(methods, student, teacher)).to(device)
        flops_per_image = 3 * flops["student"] + flops["teacher"]
    else:
        distiller = Distiller(teacher if name == "teacher" else student)
        flops_per_image = 3 * flops[name]
    trained = [weight for weight in distiller.parameters() if weight.requires_grad]
    before = trained[0].detach().clone()
    step, timer = make_step(distiller, images, targets), make_timer(device)
    for _ in range(TRAINED_STEPS):  # allocates memory and selects kernels
        step()
    seconds = median(timer(step) for _ in range(TIMED_STEPS if context.is_gpu else 2))
    if not all(bool(weight.isfinite().all()) for weight in trained) or bool((trained[0] == before).all()):
        raise DataError("training: weights are not finite, or did not change. Check bf16 on this device.")
    peak = measure_matmul_flops(device)
    values: Values = {"model": case.name, "step_ms": 1e3 * seconds, "images/s": case.batch / seconds}
    values["share of roofline"] = flops_per_image * case.batch / seconds / peak
    values["roofline_tflops"] = peak / 1e12
    if context.is_gpu:
        values["memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return values


def measure_matmul_flops(device: Any) -> float:
    """Return the operations per second of a matrix product in bfloat16 (float32 on the CPU); the best of ten.

    Args:
        device: torch device.
    """
    import torch  # noqa: PLC0415 - other steps run without torch
    from distillation_cost import make_timer  # noqa: PLC0415 - imports torch

    is_gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if is_gpu else (768, torch.float32)
    first, second = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    timer = make_timer(device)
    best_s = min(timer(lambda: torch.matmul(first, second)) for _ in range(10))
    return 2 * float(side) ** 3 / best_s


def measure_backend(context: StepContext, path: Path, device: str, backend: str, is_exact: bool = True) -> Values:
    """Compare a backend with the CPU reference, and measure latency, memory and energy as `hkd-bench`.

    FP32 outputs must be equal within the tolerances of hkd-export. A model of reduced precision must detect at least
    `MIN_DETECTED` of the persons that the reference detects.

    Args:
        context: Device and images.
        path: Model file.
        device: Device that runs it.
        backend: Name of the backend.
        is_exact: Whether the model is FP32.

    Raises:
        DataError: The outputs differ, or nothing was compared.
    """
    samples = load_dataset(context.data, "val")
    reference = make_onnx_reference(resolve_model(MODEL))
    outputs = run_reference(reference.run, reference.options, [sample.path for sample in samples], "reference")
    with open_backend(path, device, backend=backend) as opened:
        batch = opened.runtime.batch or 1
        parity = compare_outputs(outputs, opened.runtime.run, batch, is_exact, backend)
    if not parity.num_compared or (is_exact and not parity.within_tolerance):
        raise DataError(
            f"{path.name} on {backend}: {parity.num_compared} detections compared, boxes differ by up to "
            f"{parity.box_error_px:.3g} px, scores by {parity.score_error:.3g}. Run hkd-export --verify on this device."
        )
    detected = 1.0 if is_exact else measure_detected(path, device, backend, samples)
    if detected < MIN_DETECTED:
        raise DataError(
            f"{path.name} on {backend}: detects {100 * detected:.0f} % of the persons that FP32 detects, expected at "
            f"least {100 * MIN_DETECTED:.0f} %. Run hkd-export --verify on this device."
        )
    options = BenchOptions(
        device, (backend,), runs=RUNS if context.is_gpu else 20, rounds=1, data=context.data, split="val",
        has_ground_truth=False, energy=True, energy_s=3.0, idle_s=2.0,
    )  # fmt: skip
    result = bench([path], samples, options)
    model = result.models[0]
    energy = model.energy
    return {
        "box difference_px": parity.box_error_px,
        "score difference": parity.score_error,
        "compared detections": parity.num_compared,
        "share of detections of FP32": detected,
        "p50_ms": model.latency.p50_ms,
        "p99_ms": model.latency.p99_ms,
        "load_ms": model.load_ms[0],
        "peak memory_mib": model.peak_memory_mib,
        "GPU memory_mib": model.gpu_memory_reason if model.gpu_memory_mib is None else model.gpu_memory_mib,
        "energy per frame_mj": energy.reason if energy.joules_per_frame is None else 1e3 * energy.joules_per_frame,
        "marks": "; ".join(model.conditions.marks) or "none",
    }


def measure_detected(path: Path, device: str, backend: str, samples: Sequence[Sample]) -> float:
    """Return the part of the reference's detections that a model detects too (IoU of at least 0.5), 0 to 1.

    Args:
        path: Model file.
        device: Device that runs it.
        backend: Name of the backend.
        samples: Images.
    """
    expected = predict_samples(resolve_model(MODEL), "cpu", "onnxruntime", samples, "reference")
    actual = predict_samples(path, device, backend, samples, backend)
    num_expected = num_found = 0
    for one, other in zip(expected, actual, strict=True):
        boxes = one.filter(MIN_SCORE).boxes_xyxy
        overlaps = box_iou(boxes, other.filter(MIN_SCORE / 2).boxes_xyxy)
        num_expected += len(boxes)
        num_found += int((overlaps.max(axis=1, initial=0.0) >= 0.5).sum())
    return num_found / max(1, num_expected)


def export(*arguments: str | Path) -> None:
    """Run hkd-export.

    Raises:
        UnavailableError: The command failed; its message is on stderr.
    """
    if code := run_export([str(argument) for argument in arguments]):
        raise UnavailableError(f"hkd-export: exit code {code}. See the log of this step.")


def dry_run_engine(context: StepContext) -> Values:
    """Parse the FP32 and the INT8 model with TensorRT and build engines without a GPU."""
    values: Values = {}
    for name, path in (("FP32", resolve_model(MODEL)), ("INT8", context.work_dir / INT8_MODEL)):
        result = check_build(path, BuildOptions())
        values |= {"TensorRT": result.tensorrt, f"{name} build_s": result.build_s}
        values[f"{name} layers"] = sum(result.layer_counts.values())
    return values


def build_fp32_engine(context: StepContext) -> Values:
    """Build the FP32 engine and read it back."""
    path = context.work_dir / FP32_ENGINE
    export(resolve_model(MODEL), "--trt", "--no-verify", "--output", path, "--device", context.device)
    return read_engine_back(path, context.device)


def read_engine_back(path: Path, device: str) -> Values:
    """Return the facts of an engine that opens on the device.

    Args:
        path: The engine.
        device: cuda or cuda:N.
    """
    info = read_engine_info(path)
    with open_backend(path, device, backend="tensorrt") as opened:
        input_hw = opened.runtime.input_hw
    return {
        "TensorRT": info.tensorrt,
        "GPU": info.gpu,
        "input": str(input_hw),
        "requested precision": info.precision_requested,
        "compute layers": ", ".join(f"{count} {name}" for name, count in info.precision_actual.items()),
        "build_s": info.build_s,
        "context_mib": info.context_mib,
        "file_mib": path.stat().st_size / 2**20,
    }


def convert_int8(context: StepContext) -> Values:
    """Convert the model to INT8, calibrated on the synthetic images, and compare it with FP32 on the CPU."""
    path = context.work_dir / INT8_MODEL
    # The limit of 100 points accepts the first conversion: the search of layers to exclude takes minutes.
    flags = ("--precision", "int8", "--data", context.data, "--max-mr-increase", "100", "--no-verify")
    export(resolve_model(MODEL), *flags, "--output", path)
    return measure_backend(context, path, "cpu", "onnxruntime", is_exact=False)


def build_int8_engine(context: StepContext) -> Values:
    """Build the INT8 engine, read it back, and compare it with FP32 on the CPU."""
    path = context.work_dir / INT8_ENGINE
    export(context.work_dir / INT8_MODEL, "--trt", "--no-verify", "--output", path, "--device", context.device)
    facts = read_engine_back(path, context.device)
    if "int8" not in facts["compute layers"].lower():
        raise DataError(f"{path.name}: no INT8 layer was built ({facts['compute layers']}). Check the GPU.")
    return facts | measure_backend(context, path, context.device, "tensorrt", is_exact=False)


def check_cuda_graph(context: StepContext) -> Values:
    """Compare outputs and latency with and without a CUDA graph."""
    from hkd_deploy.backends.tensorrt import open_tensorrt  # noqa: PLC0415 - imports TensorRT

    results, values = [], {}
    batch = _make_batches(1)[0]
    for name, use_cuda_graph in (("with graph", True), ("without graph", False)):
        with open_tensorrt(context.work_dir / FP32_ENGINE, context.device, use_cuda_graph) as backend:
            results.append(backend.run(batch))
            values[f"{name} p50_ms"] = 1e3 * median(_time_calls(lambda run=backend.run: run(batch), RUNS))
    _check_equal(results[0], results[1], "the outputs with a CUDA graph")
    return values


def check_async_queue(context: StepContext) -> Values:
    """Compare outputs and throughput of two batches in flight with one at a time."""
    from hkd_deploy.backends.tensorrt import open_tensorrt  # noqa: PLC0415 - imports TensorRT

    batches = _make_batches(8)
    with open_tensorrt(context.work_dir / FP32_ENGINE, context.device) as backend, backend.open_async_queue(2) as queue:
        expected = [backend.run(batch) for batch in batches]
        outputs = []
        start = time.perf_counter()
        for index in range(NUM_BATCHES):
            if len(queue) == 2:
                outputs.append(queue.collect())
            queue.submit(batches[index % len(batches)])
        while len(queue):
            outputs.append(queue.collect())
        queued_s = time.perf_counter() - start
        start = time.perf_counter()
        for index in range(NUM_BATCHES):
            backend.run(batches[index % len(batches)])
        single_s = time.perf_counter() - start
    for index, output in enumerate(outputs):
        _check_equal(output, expected[index % len(batches)], f"batch {index} of the queue")
    return {"images/s in the queue": NUM_BATCHES / queued_s, "images/s one by one": NUM_BATCHES / single_s}


def _make_batches(count: int) -> list[Any]:
    rng = np.random.default_rng(0)
    height, width = 320, 320  # of hkd-cpu
    return [rng.integers(0, 256, (1, height, width, 3), np.uint8) for _ in range(count)]


def _time_calls(call: Callable[[], Any], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _check_equal(actual: Sequence[Any], expected: Sequence[Any], name: str) -> None:
    for one, other in zip(actual, expected, strict=True):
        if not np.allclose(one, other, atol=1e-3):
            difference = np.abs(np.asarray(one, np.float64) - other).max()
            raise DataError(f"{name}: differ by {difference:.3g} from a plain run. Report this GPU and TensorRT.")


def _run_gpu_backend(backend: str) -> Callable[[StepContext], Values]:
    return lambda context: measure_backend(context, resolve_model(MODEL), context.device, backend)


TENSORRT = ("tensorrt", "cuda")
STEPS: dict[str, Step] = {
    "environment": Step("versions, GPU and NVML", read_environment, 60),
    "images": Step("synthetic images for the other steps", write_images, 90),
    "train-teacher": Step("training step of the teacher", lambda one: measure_training(one, "teacher"), 90),
    "train-student": Step("training step of the student", lambda one: measure_training(one, "student"), 90),
    "train-distilled": Step("training step distilled with HKD", lambda one: measure_training(one, "distilled"), 90),
    "onnxruntime-cpu": Step(
        "ONNX Runtime on the CPU, the reference",
        lambda one: measure_backend(one, resolve_model(MODEL), "cpu", "onnxruntime"),
        60,
    ),
    "openvino-cpu": Step(
        "OpenVINO on the CPU against the reference",
        lambda one: measure_backend(one, resolve_model(MODEL), "cpu", "openvino"),
        60,
        packages=("openvino",),
    ),
    "int8-model": Step("INT8 model on the CPU against the reference", convert_int8, 240),
    "engine-dry-run": Step("TensorRT parses the models and builds engines, without a GPU", dry_run_engine, 120),
    "onnxruntime-cuda": Step("CUDA provider against the reference", _run_gpu_backend("onnxruntime"), 90, True),
    "ort-tensorrt": Step("TensorRT provider against the reference", _run_gpu_backend("ort-tensorrt"), 150, True),
    "engine-build": Step("FP32 engine: build and read back", build_fp32_engine, 150, True, TENSORRT),
    "tensorrt": Step(
        "FP32 engine against the reference",
        lambda one: measure_backend(one, one.work_dir / FP32_ENGINE, one.device, "tensorrt"),
        90, True, TENSORRT,
    ),
    "int8-engine": Step("INT8 engine: build, read back, against the reference", build_int8_engine, 150, True, TENSORRT),
    "cuda-graph": Step("CUDA graph against plain launches", check_cuda_graph, 60, True, TENSORRT),
    "async-queue": Step("two batches in flight against one", check_async_queue, 60, True, TENSORRT),
}  # fmt: skip


def find_skip_reason(step: Step, device: str) -> str:
    """Return why a step cannot run on this machine, or an empty string.

    Args:
        step: The step.
        device: cpu, or cuda or cuda:N.
    """
    if step.requires_gpu and device == "cpu":
        return "requires an NVIDIA GPU"
    missing = [name for name in step.packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step and write its values or its error; return 0 in both cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the processes that the step has started
    try:
        content: Values = {"values": STEPS[flags.step].run(StepContext(flags.device, flags.work))}
    except HkdError as error:
        content = {"error": str(error)}
        if isinstance(error, UnavailableError) and flags.step == "engine-dry-run":
            content = {"skipped": first_error_line(error)}
    write_text(flags.out, json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
