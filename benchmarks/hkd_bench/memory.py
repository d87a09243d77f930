"""Resident memory of this process, in MiB (2^20 bytes)."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def read_resident_mib() -> float:
    """Resident now."""
    return float(psutil.Process().memory_info().rss) / 2**20


def reset_peak() -> None:
    """Start the peak afresh at what is resident now, where the kernel allows it (Linux); else it goes on."""
    with suppress(OSError):
        CLEAR_REFS.write_text("5", encoding="ascii")


def read_peak_mib() -> float:
    """Most ever resident, or most since `reset_peak`."""
    if STATUS.exists():
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / 2**20 if sys.platform == "darwin" else largest / 1024
