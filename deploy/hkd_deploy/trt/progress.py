"""A build's progress as one bar, from the phases inside phases that TensorRT reports.

How much memory a build will want, so that a board of 4 or 8 GB is warned before the kernel kills the build.
"""

from threading import Event
from types import TracebackType
from typing import Any

import psutil
from tqdm import tqdm


class BuildProgress:
    """A bar of per cent, from 0 anew for each outermost phase. `cancel` makes the build stop at its next step."""

    def __init__(self, label: str) -> None:
        bar = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        self._bar = tqdm(total=100, desc=label, bar_format=bar, delay=1, leave=False)
        self._steps: dict[str, tuple[str | None, int, int]] = {}  # phase to parent, steps done, steps in all
        self.cancelled = Event()

    def cancel(self) -> None:
        """Ask the build to stop."""
        self.cancelled.set()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins inside `parent`."""
        if parent not in self._steps:
            self._bar.n = 0
        self._steps[phase] = (parent, 0, max(1, steps))
        self._bar.set_postfix_str(phase, refresh=False)
        self._refresh_bar()

    def step(self, phase: str) -> bool:
        """One step of a phase is done; whether to go on."""
        if phase in self._steps:
            parent, done, steps = self._steps[phase]
            self._steps[phase] = (parent, min(done + 1, steps), steps)
            self._refresh_bar()
        return not self.cancelled.is_set()

    def finish(self, phase: str) -> None:
        """A phase is over; its parent's step is counted by the parent."""
        self._steps.pop(phase, None)

    def __enter__(self) -> "BuildProgress":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def _refresh_bar(self) -> None:
        roots = [phase for phase, (parent, _, _) in self._steps.items() if parent not in self._steps]
        percent = 100 * max((self._compute_fraction(phase) for phase in roots), default=0.0)
        if percent > self._bar.n:  # phases that were not announced may come late: never go back
            self._bar.update(percent - self._bar.n)

    def _compute_fraction(self, phase: str) -> float:
        """0..1; a running phase inside counts as its part of the step that waits for it."""
        _, done, steps = self._steps[phase]
        inside = sum(self._compute_fraction(child) for child, (parent, _, _) in self._steps.items() if parent == phase)
        return min(1.0, (done + min(1.0, inside)) / steps)


def make_progress_monitor(trt: Any, progress: BuildProgress) -> Any:
    """TensorRT's IProgressMonitor that tells `progress`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:  # noqa: ARG002 - TensorRT's signature
            return progress.step(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


MIB = 2**20


# An estimate from how the builder works, not a measurement: CUDA's context and TensorRT's libraries; the weights as the
# parser's copy, the builder's, the engine's and the one being timed; and the workspace that one tactic may take.
BASE_MIB = 800


NUM_WEIGHT_COPIES = 4


SMALL_BOARD_MIB = 17 * 1024  # up to 16 GB, which CPU and GPU share on a Jetson


def estimate_build_mib(onnx_bytes: int, workspace_mib: int) -> int:
    """Estimated peak of a build, MiB: 800 + 4 x the file + the workspace."""
    return BASE_MIB + NUM_WEIGHT_COPIES * -(-onnx_bytes // MIB) + workspace_mib


def memory_warning(onnx_bytes: int, workspace_mib: int) -> str | None:
    """What to say before a build; None on a machine with plenty."""
    memory = psutil.virtual_memory()
    if memory.total > SMALL_BOARD_MIB * MIB:
        return None
    estimate, free = estimate_build_mib(onnx_bytes, workspace_mib), int(memory.available // MIB)
    if free >= estimate:
        return f"the build will want about {estimate} MiB (estimated); {free} MiB are available"
    return (
        f"warning: the build will want about {estimate} MiB (estimated), only {free} MiB are available; close other "
        f"programs, add swap, or take less with --workspace {max(64, workspace_mib // 4)}"
    )
