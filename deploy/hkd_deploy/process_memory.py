"""Resident memory of this process and memory in use on its GPU, with their peak during an operation."""

import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from hkd_det.errors import UnavailableError

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
GPU_INTERVAL_S = 0.1  # of the samples; a query can delay the timing of layers during a build


def reset_peak() -> None:
    """Reset the peak to the present resident memory; no effect where the kernel does not support it."""
    with suppress(OSError):
        CLEAR_REFS.write_text("5", encoding="ascii")


def read_peak_mib() -> float:
    """Return the peak resident memory since `reset_peak` or, without kernel support, since the start, in MiB."""
    if STATUS.exists():
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max_rss / 2**20 if sys.platform == "darwin" else max_rss / 1024


class PeakMemory:
    """Peak memory during an operation, as a context manager.

    Args:
        read_gpu_mib: Function that returns the memory in use on the GPU in MiB, of all processes; called in a thread.

    Attributes:
        resident_mib: Peak resident memory of this process in MiB, with Python and all libraries.
        gpu_mib: Highest increase of the memory in use on the GPU in MiB; None if it cannot be read.
    """

    def __init__(self, read_gpu_mib: Callable[[], float]) -> None:
        self.resident_mib = 0.0
        self.gpu_mib: float | None = None
        self._read_gpu_mib = read_gpu_mib
        self._samples: list[float] = []
        self._stop = Event()
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PeakMemory":
        reset_peak()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self.resident_mib = read_peak_mib()
        if self._samples:
            self.gpu_mib = max(self._samples) - self._samples[0]

    def _run(self) -> None:
        while not self._stop.wait(GPU_INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        with suppress(UnavailableError):
            self._samples.append(self._read_gpu_mib())
