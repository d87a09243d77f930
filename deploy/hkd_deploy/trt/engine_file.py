"""Build an engine on the device that will run it, look at what was really built, and only then write it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hkd_deploy.trt.bindings import import_tensorrt
from hkd_deploy.trt.builder import BuildOptions, BuildResult, TrtLog, build_plan, make_trt_logger
from hkd_deploy.trt.cuda import CudaDevice, open_cuda
from hkd_deploy.trt.layers import EngineLayer, count_precisions, parse_inspector_json
from hkd_deploy.trt.profile import Profile
from hkd_deploy.trt.sidecar import (
    FORMAT,
    EngineInfo,
    ProfileInfo,
    TensorInfo,
    bytes_sha256,
    current_platform,
    write_engine,
)
from hkd_deploy.trt.source import OnnxFile
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write

MIB = 2**20


@dataclass(frozen=True)
class EngineInspection:
    """What an opened engine says of itself. context_mib: device memory while it runs, weights not counted."""

    layers: list[EngineLayer]
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    context_mib: float


def build_engine(
    source: OnnxFile, engine: Path, options: BuildOptions, device: str
) -> tuple[EngineInfo, list[EngineLayer]]:
    """Build `engine` and its sidecar from an ONNX file, on `device`: cuda or cuda:N.

    Nothing is written unless the engine has layers in the file's precision; then the engine first, which took minutes,
    and the timing cache behind it. Raises UsageError, DataError or UnavailableError.
    """
    trt = import_tensorrt()
    cuda = open_cuda(device)
    log = TrtLog()
    built = build_plan(trt, source, options, log, on_thread_start=cuda.set_current)
    seen = inspect_engine(trt, built, log, source.path)
    check_precision(source, seen.layers)
    sidecar = _make_engine_info(trt, cuda, source, options, built, seen)
    write_engine(engine, built.plan, sidecar)
    if options.timing_cache and built.timing_cache is not None:
        _write_timing_cache(options.timing_cache, built.timing_cache, engine)
    return sidecar, seen.layers


def _write_timing_cache(path: Path, content: bytes, engine: Path) -> None:
    try:
        with atomic_write(path) as aside:
            aside.write_bytes(content)
    except OSError as error:
        raise UsageError(
            f"--timing-cache {path}: cannot be written ({error.strerror or error}); the engine is there: {engine}"
        ) from None


def check_precision(source: OnnxFile, layers: Sequence[EngineLayer]) -> None:
    """Raises DataError if no layer runs in the precision that the file was made for, or an FP32 file's runs in less.

    Parts of an FP16, BF16 or INT8 file stay in FP32, so there the rest may be anything.
    """
    found = count_precisions(layers)
    less = [precision for precision in found if precision not in ("fp32", "other")]
    if source.precision not in found or (source.precision == "fp32" and less):
        raise DataError(
            f"{source.path}: asked for {source.precision}, but TensorRT has built layers of {format_counts(found)}; "
            f"nothing was written; export the file again with --precision {source.precision}"
        )


def format_counts(counts: dict[str, int]) -> str:
    """A histogram in a few words: `40 int8, 7 fp16`."""
    return ", ".join(f"{count} {precision}" for precision, count in counts.items()) or "none"


def inspect_engine(trt: Any, build_result: BuildResult, log: TrtLog, path: Path) -> EngineInspection:
    """Open a fresh engine and ask it. Raises DataError if it does not open or describe itself."""
    runtime = trt.Runtime(make_trt_logger(trt, log))
    runtime.engine_host_code_allowed = True  # ours, of this minute; a version-compatible one holds code
    engine = runtime.deserialize_cuda_engine(build_result.plan)
    if engine is None:
        raise DataError(f"{path}: the engine was built but does not open: {log.first_error}")
    inspector = engine.create_engine_inspector()
    if build_result.profile:  # without shapes, formats and types are "N/A due to dynamic shapes"
        inspector.execution_context = _create_shaped_context(engine, build_result.profile)
    try:
        layers = parse_inspector_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: the engine's precision can't be read back: {error}") from None
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    tensors = {
        name: TensorInfo(name, engine.get_tensor_dtype(name).name, [*engine.get_tensor_shape(name)]) for name in names
    }
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    return EngineInspection(
        layers,
        [tensors[name] for name in inputs],
        [tensors[name] for name in names if name not in inputs],
        round(engine.device_memory_size_v2 / MIB, 1),
    )


def _create_shaped_context(engine: Any, profile: Profile) -> Any:
    context = engine.create_execution_context()
    context.set_input_shape(engine.get_tensor_name(0), profile.opt)
    return context


def _make_engine_info(
    trt: Any,
    cuda: CudaDevice,
    source: OnnxFile,
    options: BuildOptions,
    build_result: BuildResult,
    inspection: EngineInspection,
) -> EngineInfo:
    gpu = cuda.get_info()
    shapes = build_result.profile
    return EngineInfo(
        format=FORMAT,
        tensorrt=trt.__version__,
        gpu=gpu.name,
        sm=gpu.sm,
        platform=current_platform(),
        compatible=list(options.compatible),
        dla=options.dla,
        precision_requested=source.precision,
        precision_actual=count_precisions(inspection.layers),
        inputs=inspection.inputs,
        outputs=inspection.outputs,
        profile=ProfileInfo([*shapes.min], [*shapes.opt], [*shapes.max]) if shapes else None,
        workspace_mib=options.workspace_mib,
        context_mib=inspection.context_mib,
        build_s=round(build_result.build_s, 1),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=source.path.name,
        source_sha256=source.sha256,
        engine_sha256=bytes_sha256(build_result.plan),
        metadata=source.metadata,
    )
