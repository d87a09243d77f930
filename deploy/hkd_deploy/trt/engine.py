"""Build an engine on the device that runs it, check the precision of its layers, and write it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hkd_deploy.model_metadata import TensorInfo, make_tensor_info
from hkd_deploy.trt.bindings import TrtLog, import_tensorrt, make_trt_logger
from hkd_deploy.trt.builder import BuildOptions, BuildResult, build_plan
from hkd_deploy.trt.cuda import CudaDevice, open_cuda
from hkd_deploy.trt.engine_info import (
    FORMAT,
    EngineInfo,
    get_current_platform,
    write_engine,
)
from hkd_deploy.trt.engine_layers import (
    EngineLayer,
    count_precisions,
    format_precision_counts,
    parse_inspector_json,
)
from hkd_deploy.trt.onnx_file import OnnxFile
from hkd_deploy.trt.profile import Profile
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write, bytes_sha256

MIB = 2**20


@dataclass(frozen=True)
class EngineInspection:
    """Properties of an engine that can be read after it is opened.

    Attributes:
        layers: Layers that compute.
        inputs: Input tensors.
        outputs: Output tensors.
        context_mib: Device memory during execution without the weights, MiB.
    """

    layers: list[EngineLayer]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    context_mib: float


def build_engine(
    onnx_file: OnnxFile, engine_path: Path, options: BuildOptions, device: str
) -> tuple[EngineInfo, list[EngineLayer]]:
    """Build and write an engine with its JSON file.

    Nothing is written unless the engine has layers in the precision of the ONNX file. The timing cache is written
    after the engine, so that a failure does not cost the engine.

    Args:
        onnx_file: The model.
        engine_path: The engine to write.
        options: Build options.
        device: GPU to build on, "cuda" or "cuda:N".

    Returns:
        engine_info: Content of the JSON file.
        layers: Layers of the engine that compute.

    Raises:
        UsageError: If an option does not fit the file, or the timing cache cannot be written.
        DataError: If TensorRT cannot build the file, or builds it in another precision.
        UnavailableError: If TensorRT, CUDA or the requested hardware is missing.
    """
    trt = import_tensorrt()
    cuda = open_cuda(device)
    log = TrtLog()
    build_result = build_plan(trt, onnx_file, options, log, on_thread_start=cuda.set_current)
    inspection = inspect_engine(trt, build_result, log, onnx_file.path)
    check_precision(onnx_file, inspection.layers)
    engine_info = _make_engine_info(trt, cuda, onnx_file, options, build_result, inspection)
    write_engine(engine_path, build_result.plan, engine_info)
    if options.timing_cache and build_result.timing_cache is not None:
        _write_timing_cache(options.timing_cache, build_result.timing_cache, engine_path)
    return engine_info, inspection.layers


def _write_timing_cache(path: Path, content: bytes, engine_path: Path) -> None:
    try:
        with atomic_write(path) as temp_path:
            temp_path.write_bytes(content)
    except OSError as error:
        raise UsageError(
            f"--timing-cache {path}: cannot be written ({error.strerror or error}). "
            f"The engine is complete: {engine_path}."
        ) from None


def check_precision(onnx_file: OnnxFile, layers: Sequence[EngineLayer]) -> None:
    """Check that an engine computes in the precision of its ONNX file.

    Parts of an FP16, BF16 or INT8 file remain in FP32. Therefore one layer in the requested precision is sufficient.
    An FP32 file must not have layers of lower precision.

    Args:
        onnx_file: The model.
        layers: Layers of its engine.

    Raises:
        DataError: If the precision differs.
    """
    counts = count_precisions(layers)
    lower = [precision for precision in counts if precision not in ("fp32", "other")]
    if onnx_file.precision not in counts or (onnx_file.precision == "fp32" and lower):
        raise DataError(
            f"{onnx_file.path}: requested {onnx_file.precision}, but TensorRT built {format_precision_counts(counts)} "
            f"layers. Nothing was written. Export the file again with --precision {onnx_file.precision}."
        )


def inspect_engine(trt: Any, build_result: BuildResult, log: TrtLog, path: Path) -> EngineInspection:
    """Open an engine and read its layers and tensors.

    Args:
        trt: The module `tensorrt`.
        build_result: The engine.
        log: Receives the messages of TensorRT.
        path: The ONNX file, for messages.

    Returns:
        Properties of the engine.

    Raises:
        DataError: If the engine cannot be opened, or its layers cannot be read.
    """
    runtime = trt.Runtime(make_trt_logger(trt, log))
    # A version-compatible engine contains native code. This one was built by this process.
    runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(build_result.plan)
    if engine is None:
        raise DataError(f"{path}: the engine was built but cannot be opened: {log.first_error}. Close other programs.")
    inspector = engine.create_engine_inspector()
    if build_result.profile:  # without shapes, the inspector reports "N/A due to dynamic shapes" as data types
        inspector.execution_context = _create_shaped_context(engine, build_result.profile)
    try:
        layers = parse_inspector_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{path}: cannot read the precision of the engine: {error}. Install another TensorRT version."
        ) from None
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    tensors = {
        name: make_tensor_info(name, engine.get_tensor_dtype(name).name, engine.get_tensor_shape(name))
        for name in names
    }
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    return EngineInspection(
        layers,
        tuple(tensors[name] for name in inputs),
        tuple(tensors[name] for name in names if name not in inputs),
        round(engine.device_memory_size_v2 / MIB, 1),
    )


def _create_shaped_context(engine: Any, profile: Profile) -> Any:
    context = engine.create_execution_context()
    context.set_input_shape(engine.get_tensor_name(0), profile.opt)
    return context


def _make_engine_info(
    trt: Any,
    cuda: CudaDevice,
    onnx_file: OnnxFile,
    options: BuildOptions,
    build_result: BuildResult,
    inspection: EngineInspection,
) -> EngineInfo:
    gpu = cuda.get_info()
    return EngineInfo(
        format=FORMAT,
        tensorrt=trt.__version__,
        gpu=gpu.name,
        sm=gpu.sm,
        platform=get_current_platform(),
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        dla=options.dla,
        precision_requested=onnx_file.precision,
        precision_actual=count_precisions(inspection.layers),
        inputs=inspection.inputs,
        outputs=inspection.outputs,
        profile=build_result.profile,
        workspace_mib=options.workspace_mib,
        context_mib=inspection.context_mib,
        build_s=round(build_result.build_s, 1),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=onnx_file.path.name,
        source_sha256=onnx_file.sha256,
        engine_sha256=bytes_sha256(build_result.plan),
        metadata=onnx_file.metadata,
    )
