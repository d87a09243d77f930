"""The tensorrt package: import, version, installation hint, log and progress of a build. It is imported on use."""

import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

from hkd_det.console import Progress, log_stage
from hkd_det.errors import UnavailableError, import_package

MIN_VERSION = (10, 0)  # the first with strongly typed networks and a progress monitor; JetPack 6 has 10.3
JETSON_RELEASE_FILE = Path("/etc/nv_tegra_release")


def import_tensorrt() -> Any:
    """Import the tensorrt package.

    Returns:
        The module.

    Raises:
        UnavailableError: If the package is missing, does not load or is too old. The message contains the
            installation command for this machine.
    """
    trt = import_package("tensorrt", "TensorRT", get_install_hint())
    if parse_trt_version(trt) < MIN_VERSION:
        raise UnavailableError(
            f"TensorRT: expected version {MIN_VERSION[0]}.{MIN_VERSION[1]} or later, got {trt.__version__}. "
            "Run the .onnx file with --backend onnxruntime instead."
        )
    return trt


def parse_trt_version(trt: Any) -> tuple[int, int]:
    """Parse the version of the tensorrt package.

    Args:
        trt: The module `tensorrt`.

    Returns:
        Major and minor version.
    """
    major, minor, *_ = trt.__version__.split(".")
    return int(major), int(minor)


def is_jetson() -> bool:
    """Return whether this machine is an NVIDIA Jetson with Jetson Linux."""
    return JETSON_RELEASE_FILE.exists()


def get_install_hint() -> str:
    """Return how to install TensorRT on this machine."""
    return _format_install_hint(platform.system(), platform.machine(), is_jetson())


def _format_install_hint(system: str, machine: str, jetson: bool) -> str:
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if jetson:
        return (
            "On a Jetson it is part of JetPack: sudo apt install python3-libnvinfer. Use the Python of the system, in "
            "a virtual environment made with --system-site-packages "
            f"(this is {python}; JetPack 7 has 3.12, JetPack 6 has 3.10)."
        )
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        return "Run pip install tensorrt (requires the NVIDIA driver). For --dry-run without a GPU: make tensorrt-cpu."
    return (
        f"Engines are built and run on Linux with an NVIDIA GPU, not on {system} {machine}. Use the .onnx file instead."
    )


@dataclass
class TrtLog:
    """Messages of TensorRT that are needed later.

    Attributes:
        errors: All error messages, in order.
        layers: The verbose message that lists the layers of the built engine. Empty if there was none.
    """

    errors: list[str] = field(default_factory=list)
    layers: str = ""

    @property
    def first_error(self) -> str:
        """The first error as one line."""
        return " ".join(self.errors[0].split()) if self.errors else "no reason given"


def make_trt_logger(trt: Any, log: TrtLog) -> Any:
    """Create a TensorRT logger that writes to a `TrtLog` and prints nothing.

    Args:
        trt: The module `tensorrt`.
        log: Receives the messages.

    Returns:
        The `ILogger`.
    """

    class Recorder(trt.ILogger):  # type: ignore[misc]  # the module is untyped
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                log.errors.append(msg)
            elif msg.startswith("Layers:"):
                log.layers = msg

    return Recorder()


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
