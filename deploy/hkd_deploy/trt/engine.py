"""What was really built: an engine's layers and the precision each computes in.

From the inspector's JSON (TensorRT 10 names a tensor's type in "Format/Datatype", 11 in "Datatype"), or from the one
line a layer that the builder logs, which is all there is where no GPU can open the engine.

Build an engine on the device that will run it, look at what was really built, and only then write it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hkd_deploy.trt.builder import BuildOptions, BuildResult, TrtLog, build_plan, make_trt_logger
from hkd_deploy.trt.cuda import CudaDevice, import_tensorrt, open_cuda
from hkd_deploy.trt.engine_info import (
    FORMAT,
    EngineInfo,
    ProfileInfo,
    TensorInfo,
    current_platform,
    write_engine,
)
from hkd_deploy.trt.onnx_file import OnnxFile
from hkd_deploy.trt.profile import Profile
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write, bytes_sha256

# NVIDIA's words to ours, searched in this order; "Row major linear FP16 format" and "Half" are the same.
PRECISION_PATTERNS = {
    "bf16": r"\b(bf16|bfloat16)\b",
    "fp16": r"\b(fp16|half|float16)\b",
    "fp8": r"\bfp8\b",
    "int8": r"\bint8\b",
    "fp32": r"\b(fp32|float|float32)\b",
}


# Layers that multiply by weights: where the time goes, and what a precision is asked for.
COMPUTE_PATTERN = re.compile(r"conv|correlation|gemm|matmul|matrixmultiply|fullyconnected|fusion|dla", re.IGNORECASE)


# Layers that move or wait, and compute nothing.
NO_COMPUTE = ("signal", "wait", "NoOp", "Constant", "Shape", "Reformat")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine. precision: fp32, fp16, bf16, fp8, int8, or "other" (integers, or not said).

    shape: of its first output; -1 where free.
    """

    name: str
    layer_type: str
    precision: str
    shape: tuple[int, ...]
    is_compute: bool


def parse_inspector_json(text: str) -> list[EngineLayer]:
    """From `EngineInspector.get_engine_information` in JSON.

    Raises ValueError if the engine was not built with detailed profiling verbosity: then layers are mere names.
    """
    found = json.loads(text)["Layers"]
    if any(isinstance(layer, str) for layer in found):
        raise ValueError("the engine names its layers but does not describe them")
    return [_make_layer(layer) for layer in found if _has_compute(layer)]


def parse_build_log(message: str) -> list[EngineLayer]:
    """From the builder's verbose message that begins with "Layers:"."""
    found = [_parse_log_line(line) for line in message.splitlines() if line.startswith("Name: ")]
    return [_make_layer(layer) for layer in found if _has_compute(layer)]


def count_precisions(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """Layers in each precision, of those that multiply by weights; of all where none is known to."""
    layers = list(layers)
    heavy = [layer for layer in layers if layer.is_compute]
    return dict(Counter(layer.precision for layer in heavy or layers).most_common())


def format_layer_table(layers: Sequence[EngineLayer]) -> str:
    """A line a layer: precision, shape, kind, name."""
    rows = [(layer.precision, "x".join(map(str, layer.shape)), layer.layer_type, layer.name) for layer in layers]
    rows = [("precision", "shape", "kind", "layer"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)


def _has_compute(layer: Mapping[str, Any]) -> bool:
    return layer.get("LayerType") not in NO_COMPUTE and bool(layer.get("Outputs"))


def _make_layer(layer: Mapping[str, Any]) -> EngineLayer:
    kind = str(layer.get("LayerType", ""))
    tensors = [*layer.get("Inputs", ()), *layer["Outputs"]]
    known = (found for found in map(_parse_precision, tensors) if found)
    return EngineLayer(
        name=str(layer["Name"]),
        layer_type=kind,
        precision=next(known, "other"),  # of what comes in: an INT8 convolution may write FP16
        shape=tuple(layer["Outputs"][0].get("Dimensions", ())),
        is_compute=bool(COMPUTE_PATTERN.search(f"{kind} {layer.get('ParameterType', '')}")),
    )


def _parse_precision(tensor: Mapping[str, Any]) -> str | None:
    said = next((str(tensor[key]) for key in ("Datatype", "DataType", "Format/Datatype") if key in tensor), "")
    return next((ours for ours, theirs in PRECISION_PATTERNS.items() if re.search(theirs, said, re.IGNORECASE)), None)


def _parse_log_line(line: str) -> dict[str, Any]:
    """A logged layer in the inspector's form; it reads `Name: x, LayerType: y, Inputs: [ { Name: ... } ], ...`."""
    match = re.match(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)", line)
    if not match:
        return {}
    inputs = re.search(r"Inputs: \[(.*?)\], (?:Constants|Outputs): ", match["rest"])
    outputs = re.search(
        r"Outputs: \[(.*?)\], (?:ParameterType|TacticName|TacticValue|StreamId|Metadata)", match["rest"]
    )
    return {
        "Name": match["name"],
        "LayerType": match["kind"],
        "Inputs": _parse_tensors(inputs[1] if inputs else ""),
        "Outputs": _parse_tensors(outputs[1] if outputs else ""),
    }


def _parse_tensors(text: str) -> list[dict[str, Any]]:
    """Of `{ Name: a, Dimensions: [1,3], ..., Datatype: Half, Format: ... }, { ... }`."""
    found = re.findall(r"Dimensions: \[([-0-9,]*)\].*?(?:Format/Datatype|Datatype): ([^,}]+)", text)
    return [{"Dimensions": [int(n) for n in dims.split(",") if n], "Datatype": said} for dims, said in found]


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
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
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
