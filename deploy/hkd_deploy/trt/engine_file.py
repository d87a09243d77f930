"""Build an engine on the device that will run it, look at what was really built, and only then write it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hkd_deploy.trt.bindings import import_tensorrt
from hkd_deploy.trt.builder import BuildOptions, Built, Log, build, recording_logger
from hkd_deploy.trt.cuda import Cuda, open_cuda
from hkd_deploy.trt.layers import Layer, histogram, layers_of_inspector
from hkd_deploy.trt.profile import Profile
from hkd_deploy.trt.sidecar import FORMAT, ProfileFacts, Sidecar, TensorFacts, sha256_of, this_platform, write_engine
from hkd_deploy.trt.source import OnnxSource
from hkd_det.errors import DataError, UsageError
from hkd_det.files import replacing

MIB = 2**20


@dataclass(frozen=True)
class Inspected:
    """What an opened engine says of itself. context_mib: device memory while it runs, weights not counted."""

    layers: list[Layer]
    inputs: list[TensorFacts]
    outputs: list[TensorFacts]
    context_mib: float


def build_engine(source: OnnxSource, engine: Path, options: BuildOptions, device: str) -> tuple[Sidecar, list[Layer]]:
    """Build `engine` and its sidecar from an ONNX file, on `device`: cuda or cuda:N.

    Nothing is written unless the engine has layers in the file's precision; then the engine first, which took minutes,
    and the timing cache behind it. Raises UsageError, DataError or UnavailableError.
    """
    trt = import_tensorrt()
    cuda = open_cuda(device)
    log = Log()
    built = build(trt, source, options, log, on_thread=cuda.use)
    seen = inspect(trt, built, log, source.path)
    check_precision(source, seen.layers)
    sidecar = _sidecar(trt, cuda, source, options, built, seen)
    write_engine(engine, built.plan, sidecar)
    if options.timing_cache and built.timing_cache is not None:
        _write_timing_cache(options.timing_cache, built.timing_cache, engine)
    return sidecar, seen.layers


def _write_timing_cache(path: Path, content: bytes, engine: Path) -> None:
    try:
        with replacing(path) as aside:
            aside.write_bytes(content)
    except OSError as error:
        raise UsageError(
            f"--timing-cache {path}: cannot be written ({error.strerror or error}); the engine is there: {engine}"
        ) from None


def check_precision(source: OnnxSource, layers: Sequence[Layer]) -> None:
    """Raises DataError if no layer runs in the precision that the file was made for, or an FP32 file's runs in less.

    Parts of an FP16, BF16 or INT8 file stay in FP32, so there the rest may be anything.
    """
    found = histogram(layers)
    less = [precision for precision in found if precision not in ("fp32", "other")]
    if source.precision not in found or (source.precision == "fp32" and less):
        raise DataError(
            f"{source.path}: asked for {source.precision}, but TensorRT has built layers of {words(found)}; "
            f"nothing was written; export the file again with --precision {source.precision}"
        )


def words(found: dict[str, int]) -> str:
    """A histogram in a few words: `40 int8, 7 fp16`."""
    return ", ".join(f"{count} {precision}" for precision, count in found.items()) or "none"


def inspect(trt: Any, built: Built, log: Log, path: Path) -> Inspected:
    """Open a fresh engine and ask it. Raises DataError if it does not open or describe itself."""
    runtime = trt.Runtime(recording_logger(trt, log))
    runtime.engine_host_code_allowed = True  # ours, of this minute; a version-compatible one holds code
    engine = runtime.deserialize_cuda_engine(built.plan)
    if engine is None:
        raise DataError(f"{path}: the engine was built but does not open: {log.reason}")
    inspector = engine.create_engine_inspector()
    if built.profile:  # without shapes, formats and types are "N/A due to dynamic shapes"
        inspector.execution_context = _shaped_context(engine, built.profile)
    try:
        layers = layers_of_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: the engine's precision can't be read back: {error}") from None
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    tensors = {
        name: TensorFacts(name, engine.get_tensor_dtype(name).name, [*engine.get_tensor_shape(name)]) for name in names
    }
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    return Inspected(
        layers,
        [tensors[name] for name in inputs],
        [tensors[name] for name in names if name not in inputs],
        round(engine.device_memory_size_v2 / MIB, 1),
    )


def _shaped_context(engine: Any, profile: Profile) -> Any:
    context = engine.create_execution_context()
    context.set_input_shape(engine.get_tensor_name(0), profile.usual)
    return context


def _sidecar(trt: Any, cuda: Cuda, source: OnnxSource, options: BuildOptions, built: Built, seen: Inspected) -> Sidecar:
    gpu = cuda.gpu()
    shapes = built.profile
    return Sidecar(
        format=FORMAT,
        tensorrt=trt.__version__,
        gpu=gpu.name,
        sm=gpu.sm,
        platform=this_platform(),
        compatible=list(options.compatible),
        dla=options.dla,
        precision_asked=source.precision,
        precision_found=histogram(seen.layers),
        inputs=seen.inputs,
        outputs=seen.outputs,
        profile=ProfileFacts([*shapes.smallest], [*shapes.usual], [*shapes.largest]) if shapes else None,
        workspace_mib=options.workspace_mib,
        context_mib=seen.context_mib,
        build_s=round(built.build_s, 1),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=source.path.name,
        source_sha256=source.sha256,
        engine_sha256=sha256_of(built.plan),
        metadata=source.metadata,
    )
