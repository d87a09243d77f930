"""Progress bar of an engine build, and the estimate of the memory that it needs."""

from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

from hkd_det.errors import import_package

MIB = 2**20
MEMINFO = Path("/proc/meminfo")
# Parts of the memory estimate. They follow from the design of the builder and are not measured: the CUDA context and
# the TensorRT libraries; the copies of the weights in the parser, the builder, the engine and the engine under test.
BASE_MIB = 800
NUM_WEIGHT_COPIES = 4
SMALL_MEMORY_MIB = 17 * 1024  # includes 16 GB boards, on which CPU and GPU share the memory


class BuildProgress:
    """Progress bar in percent. It starts again at 0 for every outermost phase.

    TensorRT reports phases, which consist of steps and can contain other phases.

    Args:
        label: Text in front of the bar.
    """

    def __init__(self, label: str) -> None:
        tqdm = import_package("tqdm", "tqdm", "pip install 'hkd-det[tensorrt]'").tqdm
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        self._bar = tqdm(total=100, desc=label, bar_format=bar_format, delay=1, leave=False)
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
            self._bar.n = 0
        self._phases[phase] = (parent, 0, max(1, num_steps))
        self._bar.set_postfix_str(phase, refresh=False)
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
        self._bar.close()

    def _refresh_bar(self) -> None:
        roots = [phase for phase, (parent, _, _) in self._phases.items() if parent not in self._phases]
        percent = 100 * max((self._compute_fraction(phase) for phase in roots), default=0.0)
        if percent > self._bar.n:  # unannounced phases can start late; the bar never moves back
            self._bar.update(percent - self._bar.n)

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
