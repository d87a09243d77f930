"""Parse an ONNX file, estimate the memory of the build, build an engine with TensorRT 10.3 to 11, show progress.

Networks are always strongly typed: the engine computes in the precision of the ONNX file.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from types import TracebackType
from typing import Any

from hkd_deploy.trt.bindings import (
    TrtLog,
    is_jetson,
    make_trt_logger,
    parse_trt_version,
)
from hkd_deploy.trt.engine_info import Profile, ProfileShape, resolve_profile
from hkd_deploy.trt.onnx_file import OnnxFile
from hkd_det.console import Progress, log_stage
from hkd_det.errors import DataError, UnavailableError, UsageError

MIB = 2**20
DEFAULT_WORKSPACE_MIB = 1024
# Newest supported opset, by the first TensorRT version that supports it. The parser accepts newer opsets without a
# message and interprets them as the newest one that it supports.
MAX_OPSETS = {(10, 13): 24, (10, 0): 20}
MEMINFO = Path("/proc/meminfo")
# Parts of the memory estimate. They follow from the design of the builder and are not measured: the CUDA context and
# the TensorRT libraries; the copies of the weights in the parser, the builder, the engine and the engine under test.
BASE_MIB = 800
NUM_WEIGHT_COPIES = 4
FALLBACK_HINT = "Use the .onnx file with --backend onnxruntime instead, or another TensorRT version."
SMALL_MEMORY_MIB = 17 * 1024  # includes 16 GB boards, on which CPU and GPU use the same memory


@dataclass(frozen=True)
class BuildOptions:
    """Options of an engine build.

    Attributes:
        profile: Minimum, optimum and maximum input of a dynamic graph. None derives them from the metadata.
        workspace_mib: Limit of the scratch memory of one layer, MiB.
        dla: Core of the deep learning accelerator. Layers that it does not support run on the GPU.
        version_compatible: Whether the engine also runs on later TensorRT releases of the same major version.
        hardware_compatible: Whether the engine also runs on other GPUs, from Ampere on.
        timing_cache: File with the measured tactics. It is read if it exists, and written after the build.
    """

    profile: tuple[ProfileShape, ProfileShape, ProfileShape] | None = None
    workspace_mib: int = DEFAULT_WORKSPACE_MIB
    dla: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None


@dataclass(frozen=True)
class BuildResult:
    """A serialized engine and facts about its build.

    Attributes:
        plan: The serialized engine.
        profile: Optimization profile of a dynamic graph, or None for a static one.
        layer_counts: Number of parsed layers by TensorRT layer type, in descending order.
        build_s: Duration of the build, seconds.
        timing_cache: Serialized timing cache, or None if it was not requested.
    """

    plan: bytes
    profile: Profile | None
    layer_counts: dict[str, int]
    build_s: float
    timing_cache: bytes | None = None


class BuildProgress:
    """Progress of a build in percent, without a terminal one line per minute. Each outermost phase starts at 0.

    TensorRT reports phases, which consist of steps and can contain other phases.

    Args:
        label: Text in front of the bar.
    """

    def __init__(self, label: str) -> None:
        log_stage(label)
        self._progress = Progress(100, label, "%", delay_s=1)
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> (parent, finished steps, all steps)
        self.cancelled = Event()

    def cancel(self) -> None:
        """Request that the build stops after its current step."""
        self.cancelled.set()

    def start(self, phase: str, parent: str | None, num_steps: int) -> None:
        """Add a phase.

        Args:
            phase: Name of the phase.
            parent: Name of the enclosing phase, or None.
            num_steps: Number of steps of the phase.
        """
        if parent not in self._phases:
            self._progress.restart(0)
        self._phases[phase] = (parent, 0, max(1, num_steps))
        self._progress.set_status(phase, refresh=False)
        self._refresh_bar()

    def step(self, phase: str) -> bool:
        """Count one finished step.

        Args:
            phase: Name of the phase. An unknown phase is ignored.

        Returns:
            Whether the build should continue.
        """
        if phase in self._phases:
            parent, num_finished, num_steps = self._phases[phase]
            self._phases[phase] = (parent, min(num_finished + 1, num_steps), num_steps)
            self._refresh_bar()
        return not self.cancelled.is_set()

    def finish(self, phase: str) -> None:
        """Remove a phase. The parent phase counts the step that contained it.

        Args:
            phase: Name of the phase. An unknown phase is ignored.
        """
        self._phases.pop(phase, None)

    def __enter__(self) -> "BuildProgress":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(exc_type, error, trace)

    def _refresh_bar(self) -> None:
        roots = [phase for phase, (parent, _, _) in self._phases.items() if parent not in self._phases]
        percent = 100 * max((self._compute_fraction(phase) for phase in roots), default=0.0)
        # Unannounced phases can start late; the bar never moves back. An update of 0 still shows the passing of time.
        self._progress.update(max(0.0, percent - self._progress.done))

    def _compute_fraction(self, phase: str) -> float:
        """Return the finished part of a phase, 0 to 1. Child phases count as parts of the current step."""
        _, num_finished, num_steps = self._phases[phase]
        children = [name for name, (parent, _, _) in self._phases.items() if parent == phase]
        current_step = min(1.0, sum(self._compute_fraction(name) for name in children))
        return min(1.0, (num_finished + current_step) / num_steps)


def make_progress_monitor(trt: Any, progress: BuildProgress) -> Any:
    """Create a TensorRT progress monitor that updates a progress bar.

    Args:
        trt: The module `tensorrt`.
        progress: The bar.

    Returns:
        The `IProgressMonitor`.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module is untyped
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:  # noqa: ARG002 - signature of TensorRT
            return progress.step(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


def build_plan(
    trt: Any, onnx_file: OnnxFile, options: BuildOptions, log: TrtLog, on_thread_start: Callable[[], None] | None = None
) -> BuildResult:
    """Build an engine. A progress bar shows the state, and Ctrl-C cancels the build.

    Args:
        trt: The module `tensorrt`.
        onnx_file: The model.
        options: Build options.
        log: Receives the messages of TensorRT.
        on_thread_start: Called first in the thread that builds, for example to select its GPU.

    Returns:
        The serialized engine and facts about its build.

    Raises:
        DataError: If TensorRT cannot parse or build the file.
        UsageError: If an option does not fit the file.
        UnavailableError: If an option needs hardware that this machine does not have.
    """
    _check_opset(trt, onnx_file)
    logger = make_trt_logger(trt, log)
    builder = _create_builder(trt, logger, log)
    network = builder.create_network(_get_strongly_typed_flag(trt))
    parser = trt.OnnxParser(network, logger)  # must outlive the build: it owns the weights
    if not parser.parse(onnx_file.content):
        reason = _format_parser_error(parser)
        raise DataError(f"{onnx_file.path}: TensorRT {trt.__version__} cannot parse it: {reason}. {FALLBACK_HINT}")
    config = builder.create_builder_config()
    profile = _add_profile(builder, network, config, onnx_file, options)
    _configure(trt, builder, config, onnx_file, options)
    _load_timing_cache(config, options.timing_cache, log)
    layer_counts = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    start = perf_counter()
    with BuildProgress("building the engine") as progress:
        config.progress_monitor = make_progress_monitor(trt, progress)
        plan = _run_interruptible(lambda: builder.build_serialized_network(network, config), progress, on_thread_start)
    if plan is None:
        raise DataError(
            f"{onnx_file.path}: TensorRT {trt.__version__} cannot build it: {log.first_error}. {FALLBACK_HINT}"
        )
    timing_cache = bytes(config.get_timing_cache().serialize()) if options.timing_cache else None
    return BuildResult(bytes(plan), profile, dict(layer_counts.most_common()), perf_counter() - start, timing_cache)


def _check_opset(trt: Any, onnx_file: OnnxFile) -> None:
    max_opset = next(opset for version, opset in MAX_OPSETS.items() if parse_trt_version(trt) >= version)
    if onnx_file.opset > max_opset:
        raise DataError(
            f"{onnx_file.path}: opset {onnx_file.opset} is too new for TensorRT {trt.__version__}, which supports "
            f"opsets up to {max_opset}. Export the model again with hkd-export."
        )


def _create_builder(trt: Any, logger: Any, log: TrtLog) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError:  # raised by pybind11 if the native constructor returns a null pointer
        raise UnavailableError(
            f"TensorRT: version {trt.__version__} does not start: {log.first_error}. It requires an NVIDIA GPU and its "
            "driver. Without a GPU, use --dry-run after make tensorrt-cpu."
        ) from None


def _get_strongly_typed_flag(trt: Any) -> int:
    # A release that supports strongly typed networks only may drop the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _format_parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "no reason given"
    error = parser.get_error(0)
    message = f"node {error.node()} {error.node_name()} ({error.node_operator()}): {error.desc()}"
    return " ".join(message.split())


def _add_profile(builder: Any, network: Any, config: Any, onnx_file: OnnxFile, options: BuildOptions) -> Profile | None:
    images = network.get_input(0)
    profile = resolve_profile(tuple(images.shape), options.profile, onnx_file.metadata, onnx_file.path)
    if profile:
        if options.dla is not None and profile.min != profile.max:
            raise UsageError(f"--dla {options.dla}: the DLA runs one shape only. Export with a fixed --batch.")
        trt_profile = builder.create_optimization_profile()
        trt_profile.set_shape(images.name, profile.min, profile.opt, profile.max)
        config.add_optimization_profile(trt_profile)
    return profile


def _configure(trt: Any, builder: Any, config: Any, onnx_file: OnnxFile, options: BuildOptions) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # otherwise the inspector returns layer names only
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        if is_jetson():
            raise UsageError("--hardware-compatible: not supported on a Jetson. Omit the flag.")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.dla is not None:
        _configure_dla(trt, builder, config, onnx_file, options.dla)


def _configure_dla(trt: Any, builder: Any, config: Any, onnx_file: OnnxFile, core: int) -> None:
    if core >= builder.num_DLA_cores:
        raise UnavailableError(
            f"--dla {core}: TensorRT {trt.__version__} finds {builder.num_DLA_cores} DLA core(s) on this machine. "
            "Orin NX and AGX Orin have two; TensorRT supports them up to 10.7, and on AGX Orin again from 11.4.1."
        )
    if onnx_file.precision not in ("fp16", "int8"):
        raise UsageError(f"--dla {core}: expected an fp16 or int8 model, got {onnx_file.precision} ({onnx_file.path}).")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _run_interruptible(
    function: Callable[[], Any], progress: BuildProgress, on_thread_start: Callable[[], None] | None
) -> Any:
    """Run a native function in a thread, so that Ctrl-C can cancel it.

    Python handles signals between bytecode instructions of the main thread. The build is one long native call,
    therefore the main thread only waits for it.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            if on_thread_start:
                on_thread_start()
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised again by future.result()
            future.set_exception(error)

    thread = Thread(target=run)
    try:
        thread.start()
        return future.result()
    except KeyboardInterrupt:
        progress.cancel()
        if thread.is_alive():
            thread.join()  # the builder uses the network until it returns
        raise


def _load_timing_cache(config: Any, path: Path | None, log: TrtLog) -> None:
    if path is None:
        return
    num_errors = len(log.errors)  # TensorRT may accept an invalid file as an empty cache and only log an error
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False) or len(log.errors) > num_errors:
        raise UsageError(
            f"--timing-cache {path}: not a timing cache of this GPU and TensorRT version. Use another file name."
        )


def estimate_build_mib(onnx_bytes: int, workspace_mib: int) -> int:
    """Estimate the peak memory of a build: 800 MiB + 4 x the ONNX file + the workspace.

    Args:
        onnx_bytes: Size of the ONNX file.
        workspace_mib: Limit of the workspace, MiB.

    Returns:
        Peak memory, MiB.
    """
    return BASE_MIB + NUM_WEIGHT_COPIES * -(-onnx_bytes // MIB) + workspace_mib


def format_memory_note(onnx_bytes: int, workspace_mib: int) -> str | None:
    """Compare the estimated memory of a build with the available memory of a small board.

    The kernel of a small board kills a build that runs out of memory without a message.

    Args:
        onnx_bytes: Size of the ONNX file.
        workspace_mib: Limit of the workspace, MiB.

    Returns:
        A note or a warning. None on a machine with more than 16 GB, or if the memory size is unknown.
    """
    memory = _read_memory_mib()
    if memory is None or memory[0] > SMALL_MEMORY_MIB:
        return None
    estimate, available = estimate_build_mib(onnx_bytes, workspace_mib), memory[1]
    if available >= estimate:
        return f"The build needs about {estimate} MiB (estimated). {available} MiB are available."
    return (
        f"warning: the build needs about {estimate} MiB (estimated), but only {available} MiB are available. Close "
        f"other programs, add swap space, or use --workspace {max(64, workspace_mib // 4)}."
    )


def _read_memory_mib() -> tuple[int, int] | None:
    """Return total and available memory, or None on a system without /proc/meminfo."""
    if not MEMINFO.exists():
        return None
    lines = (line.split() for line in MEMINFO.read_text().splitlines())
    kib = {fields[0]: int(fields[1]) for fields in lines}
    return kib["MemTotal:"] // 1024, kib["MemAvailable:"] // 1024
