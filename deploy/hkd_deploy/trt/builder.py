"""From an ONNX file to the bytes of an engine: parse, configure, build. The same for TensorRT 10.3 to 11.

The network is always strongly typed: its precision is the file's, and nothing else is asked of the builder.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

from hkd_deploy.trt.cuda import is_jetson, parse_trt_version
from hkd_deploy.trt.onnx_file import OnnxFile
from hkd_deploy.trt.profile import Profile, ProfileShape, resolve_profile
from hkd_deploy.trt.progress import BuildProgress, make_progress_monitor
from hkd_det.errors import DataError, UnavailableError, UsageError

MIB = 2**20
# The newest opset that a parser knows, from that TensorRT on; it takes newer ones without a word, and guesses.
MAX_OPSETS = {(10, 13): 24, (10, 0): 20}


@dataclass(frozen=True)
class BuildOptions:
    """What may be asked of a build.

    profile: smallest, usual, largest input of a dynamic graph; None for what suits the file.
    workspace_mib: what one layer may take for itself while it runs.
    dla: core of the deep learning accelerator; what it can't do runs on the GPU.
    compatible: "version" (later TensorRT of the same major), "hardware" (any GPU from Ampere on).
    timing_cache: measured tactics, read if there and written afterwards.
    """

    profile: tuple[ProfileShape, ProfileShape, ProfileShape] | None = None
    workspace_mib: int = 1024
    dla: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None


@dataclass
class TrtLog:
    """What TensorRT said that matters. layers: the message that lists what was built, if it was logged."""

    errors: list[str] = field(default_factory=list)
    layers: str = ""

    @property
    def first_error(self) -> str:
        """The first error, on one line."""
        return " ".join(self.errors[0].split()) if self.errors else "it gave no reason"


@dataclass(frozen=True)
class BuildResult:
    """An engine, ready to be written.

    operators: how many layers of each kind the parser made. timing_cache: what was measured, if it was asked for.
    """

    plan: bytes
    profile: Profile | None
    layer_counts: dict[str, int]
    build_s: float
    timing_cache: bytes | None = None


def make_trt_logger(trt: Any, log: TrtLog) -> Any:
    """TensorRT's ILogger that keeps errors and the list of layers, and prints nothing."""

    class Recorder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                log.errors.append(msg)
            elif msg.startswith("Layers:"):
                log.layers = msg

    return Recorder()


def build_plan(
    trt: Any, source: OnnxFile, options: BuildOptions, log: TrtLog, on_thread_start: Callable[[], None] = lambda: None
) -> BuildResult:
    """Build an engine; a bar shows how far it is, Ctrl-C stops it.

    on_thread: called first on the thread that builds, to choose its GPU.
    Raises DataError for a file TensorRT cannot parse or build, UsageError for options that do not
    fit the file, UnavailableError for what this machine does not have.
    """
    _check_opset(trt, source)
    logger = make_trt_logger(trt, log)
    builder = _create_builder(trt, logger, log)
    network = builder.create_network(_get_strongly_typed_flag(trt))
    parser = trt.OnnxParser(network, logger)  # kept: it owns the weights until the engine is built
    if not parser.parse(source.content):
        raise DataError(f"{source.path}: TensorRT {trt.__version__} cannot parse it: {_format_parser_error(parser)}")
    config = builder.create_builder_config()
    profile = _add_profile(builder, network, config, source, options)
    _configure(trt, builder, config, source, options)
    _load_timing_cache(config, options.timing_cache, log)
    operators = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    start = perf_counter()
    with BuildProgress("building the engine") as progress:
        config.progress_monitor = make_progress_monitor(trt, progress)
        plan = _run_interruptible(lambda: builder.build_serialized_network(network, config), progress, on_thread_start)
    if plan is None:
        raise DataError(f"{source.path}: TensorRT {trt.__version__} cannot build it: {log.first_error}")
    cache = bytes(config.get_timing_cache().serialize()) if options.timing_cache else None
    return BuildResult(bytes(plan), profile, dict(operators.most_common()), perf_counter() - start, cache)


def _check_opset(trt: Any, source: OnnxFile) -> None:
    newest = next(opset for since, opset in MAX_OPSETS.items() if parse_trt_version(trt) >= since)
    if source.opset > newest:
        raise DataError(
            f"{source.path}: opset {source.opset} is too new for TensorRT {trt.__version__}, which knows up to "
            f"{newest}; export it again with hkd-export"
        )


def _create_builder(trt: Any, logger: Any, log: TrtLog) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError:  # pybind11's words for a constructor that returned nothing
        raise UnavailableError(
            f"TensorRT {trt.__version__} does not start: {log.first_error}; it needs an NVIDIA GPU and driver "
            "(without one, --dry-run works after make tensorrt-cpu)"
        ) from None


def _get_strongly_typed_flag(trt: Any) -> int:
    """The flag where there is one; some day networks are only ever so."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _format_parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "it gave no reason"
    error = parser.get_error(0)
    words = f"node {error.node()} {error.node_name()} ({error.node_operator()}): {error.desc()}"
    return " ".join(words.split())


def _add_profile(builder: Any, network: Any, config: Any, source: OnnxFile, options: BuildOptions) -> Profile | None:
    images = network.get_input(0)
    profile = resolve_profile(tuple(images.shape), options.profile, source.metadata, source.path)
    if profile:
        if options.dla is not None and profile.min != profile.max:
            raise UsageError(f"--dla {options.dla}: the accelerator runs one shape only; export with a fixed --batch")
        shapes = builder.create_optimization_profile()
        shapes.set_shape(images.name, profile.min, profile.opt, profile.max)
        config.add_optimization_profile(shapes)
    return profile


def _configure(trt: Any, builder: Any, config: Any, source: OnnxFile, options: BuildOptions) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector knows names only
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        if is_jetson():
            raise UsageError("--hardware-compatible: not on a Jetson, whose engines run on their own module only")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.dla is not None:
        _use_dla(trt, builder, config, source, options.dla)


def _use_dla(trt: Any, builder: Any, config: Any, source: OnnxFile, core: int) -> None:
    if core >= builder.num_DLA_cores:
        raise UnavailableError(
            f"--dla {core}: TensorRT {trt.__version__} finds {builder.num_DLA_cores} accelerator(s) here; "
            "Orin NX and AGX Orin have two, and TensorRT drives them up to 10.7, and from 11.4.1 on AGX Orin"
        )
    if source.precision not in ("fp16", "int8"):
        raise UsageError(f"--dla {core}: runs fp16 and int8, {source.path} is {source.precision}")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _run_interruptible(
    function: Callable[[], Any], progress: BuildProgress, on_thread_start: Callable[[], None]
) -> Any:
    """`work` on a thread of its own: Python hears Ctrl-C only between its own steps, and the build is one long one."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            on_thread_start()
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            outcome.set_exception(error)

    thread = Thread(target=run)
    try:
        thread.start()
        return outcome.result()
    except KeyboardInterrupt:
        progress.cancel()
        if thread.is_alive():
            thread.join()  # until the builder has let go of what it works on
        raise


def _load_timing_cache(config: Any, path: Path | None, log: TrtLog) -> None:
    if path is None:
        return
    said = len(log.errors)  # what is no cache at all may be taken as an empty one, with an error in the log
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False) or len(log.errors) > said:
        raise UsageError(f"--timing-cache {path}: of another GPU or TensorRT, or no timing cache; name another file")
