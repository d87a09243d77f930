"""Build an engine on the device that runs it, check the precision of its layers, and write it.

There are two sources of the layers: the JSON of the engine inspector, and the verbose log of the builder. Without a GPU
only the log is available, because an engine can be opened on a GPU only. TensorRT 10 stores the data type of a tensor
under "Format/Datatype", TensorRT 11 under "Datatype".
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hkd_deploy.model_metadata import TensorInfo, make_tensor_info
from hkd_deploy.process_memory import PeakMemory
from hkd_deploy.trt.bindings import CudaDevice, TrtLog, import_tensorrt, make_trt_logger, open_cuda
from hkd_deploy.trt.builder import BuildOptions, BuildResult, build_plan
from hkd_deploy.trt.engine_info import FORMAT, EngineInfo, Profile, get_current_platform, write_engine
from hkd_deploy.trt.onnx_file import OnnxFile
from hkd_det.console import format_table
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write, bytes_sha256

MIB = 2**20

# Data types as TensorRT writes them, in search order. "Row major linear FP16 format" and "Half" are the same type.
PRECISION_PATTERNS = {
    "bf16": r"\b(bf16|bfloat16)\b",
    "fp16": r"\b(fp16|half|float16)\b",
    "fp8": r"\bfp8\b",
    "int8": r"\bint8\b",
    "fp32": r"\b(fp32|float|float32)\b",
}
# Layers with weights, which take most of the time and which a precision is chosen for.
COMPUTE_PATTERN = re.compile(r"conv|correlation|gemm|matmul|matrixmultiply|fullyconnected|fusion|dla", re.IGNORECASE)
# Layers that move data or synchronize, and compute nothing.
NO_COMPUTE = ("signal", "wait", "NoOp", "Constant", "Shape", "Reformat")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: Name in the engine. It contains the names of the fused ONNX nodes.
        layer_type: Type of the layer in TensorRT.
        precision: fp32, fp16, bf16, fp8 or int8. "other" for integer types and unknown ones.
        shape: Shape of the first output. Free dimensions are -1.
        is_compute: Whether the layer multiplies by weights.
    """

    name: str
    layer_type: str
    precision: str
    shape: tuple[int, ...]
    is_compute: bool


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
    with PeakMemory(cuda.read_used_mib) as memory:
        build_result = build_plan(trt, onnx_file, options, log, on_thread_start=cuda.set_current)
    inspection = inspect_engine(trt, build_result, log, onnx_file.path)
    check_precision(onnx_file, inspection.layers)
    engine_info = _make_engine_info(trt, cuda, onnx_file, options, build_result, inspection, memory)
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
    memory: PeakMemory,
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
        build_memory_mib=round(memory.resident_mib, 1),
        build_gpu_memory_mib=None if memory.gpu_mib is None else round(memory.gpu_mib, 1),
    )


def parse_inspector_json(text: str) -> list[EngineLayer]:
    """Parse the layers from the JSON of the engine inspector.

    Args:
        text: Result of `EngineInspector.get_engine_information`.

    Returns:
        All layers that compute.

    Raises:
        ValueError: If the engine was built without detailed profiling verbosity. Its layers are names only.
    """
    layers = json.loads(text)["Layers"]
    if any(isinstance(layer, str) for layer in layers):
        raise ValueError("the engine contains the names of its layers only")
    return [_make_layer(layer) for layer in layers if _has_compute(layer)]


def parse_build_log(message: str) -> list[EngineLayer]:
    """Parse the layers from the log of the builder.

    Args:
        message: The verbose message that starts with "Layers:".

    Returns:
        All layers that compute.
    """
    layers = [_parse_log_line(line) for line in message.splitlines() if line.startswith("Name: ")]
    return [_make_layer(layer) for layer in layers if _has_compute(layer)]


def count_precisions(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """Count compute layers by precision.

    Args:
        layers: Layers of an engine. If none of them is a compute layer, all are counted.

    Returns:
        Number of layers by precision, in descending order.
    """
    layers = list(layers)
    compute_layers = [layer for layer in layers if layer.is_compute]
    return dict(Counter(layer.precision for layer in compute_layers or layers).most_common())


def format_precision_counts(counts: Mapping[str, int]) -> str:
    """Format the result of `count_precisions`, for example "40 int8, 7 fp16".

    Args:
        counts: Number of layers by precision.

    Returns:
        One line, "none" if there are no layers.
    """
    return ", ".join(f"{count} {precision}" for precision, count in counts.items()) or "none"


def format_layer_table(layers: Sequence[EngineLayer]) -> str:
    """Format layers as a table with one line per layer.

    Args:
        layers: Layers of an engine.

    Returns:
        Header and lines with precision, output shape, type and name.
    """
    rows = [(layer.precision, "x".join(map(str, layer.shape)), layer.layer_type, layer.name) for layer in layers]
    return format_table(rows, ("precision", "shape", "type", "layer"), left_columns=4)


def _has_compute(layer: Mapping[str, Any]) -> bool:
    return layer.get("LayerType") not in NO_COMPUTE and bool(layer.get("Outputs"))


def _make_layer(layer: Mapping[str, Any]) -> EngineLayer:
    layer_type = str(layer.get("LayerType", ""))
    tensors = [*layer.get("Inputs", ()), *layer["Outputs"]]
    precisions = (precision for precision in map(_parse_precision, tensors) if precision)
    return EngineLayer(
        name=str(layer["Name"]),
        layer_type=layer_type,
        precision=next(precisions, "other"),  # the type of the inputs: an INT8 convolution can write FP16
        shape=tuple(layer["Outputs"][0].get("Dimensions", ())),
        is_compute=bool(COMPUTE_PATTERN.search(f"{layer_type} {layer.get('ParameterType', '')}")),
    )


def _parse_precision(tensor: Mapping[str, Any]) -> str | None:
    dtype = next((str(tensor[key]) for key in ("Datatype", "DataType", "Format/Datatype") if key in tensor), "")
    return next(
        (name for name, pattern in PRECISION_PATTERNS.items() if re.search(pattern, dtype, re.IGNORECASE)), None
    )


def _parse_log_line(line: str) -> dict[str, Any]:
    """Convert a line `Name: x, LayerType: y, Inputs: [ { Name: ... } ], ...` to the form of the inspector."""
    match = re.match(r"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), (?P<rest>.*)", line)
    if not match:
        return {}
    inputs = re.search(r"Inputs: \[(.*?)\], (?:Constants|Outputs): ", match["rest"])
    outputs = re.search(
        r"Outputs: \[(.*?)\], (?:ParameterType|TacticName|TacticValue|StreamId|Metadata)", match["rest"]
    )
    return {
        "Name": match["name"],
        "LayerType": match["type"],
        "Inputs": _parse_log_tensors(inputs[1] if inputs else ""),
        "Outputs": _parse_log_tensors(outputs[1] if outputs else ""),
    }


def _parse_log_tensors(text: str) -> list[dict[str, Any]]:
    """Parse `{ Name: a, Dimensions: [1,3], ..., Datatype: Half, Format: ... }, { ... }`."""
    tensors = re.findall(r"Dimensions: \[([-0-9,]*)\].*?(?:Format/Datatype|Datatype): ([^,}]+)", text)
    return [{"Dimensions": [int(n) for n in dims.split(",") if n], "Datatype": dtype} for dims, dtype in tensors]
