"""Tests of the peak memory of an operation: an allocation of known size, and a GPU that is simulated."""

import time

import numpy as np
import pytest

from hkd_deploy import process_memory
from hkd_deploy.process_memory import PeakMemory
from hkd_det.errors import UnavailableError


def test_peak_contains_memory_that_is_free_at_the_end() -> None:
    with PeakMemory(lambda: 0.0) as small:
        pass
    with PeakMemory(lambda: 0.0) as large:
        workspace = np.ones(150 * 2**20, np.uint8)
        del workspace
    assert large.resident_mib - small.resident_mib > 140 and large.gpu_mib == 0


def test_gpu_peak_is_the_highest_increase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "GPU_INTERVAL_S", 0.001)
    used = [500.0]
    with PeakMemory(lambda: used[0]) as memory:
        used[0] = 2300.0
        time.sleep(0.3)
        used[0] = 700.0
    assert memory.gpu_mib == 1800


def test_gpu_that_cannot_be_read_gives_none() -> None:
    def fail() -> float:
        raise UnavailableError("cuda: none. Install a driver.")

    with PeakMemory(fail) as memory:
        pass
    assert memory.gpu_mib is None and memory.resident_mib > 0
