"""What is said of memory before a build."""

from types import SimpleNamespace

import psutil
import pytest

from hkd_deploy.trt.progress import estimate_build_mib, memory_warning

MIB = 2**20


def board(monkeypatch: pytest.MonkeyPatch, total_gib: float, available_mib: int) -> None:
    memory = SimpleNamespace(total=int(total_gib * 2**30), available=available_mib * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_the_estimate() -> None:
    assert estimate_build_mib(10 * MIB, 1024) == 800 + 4 * 10 + 1024
    assert estimate_build_mib(1, 0) == 800 + 4


def test_a_small_board_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    board(monkeypatch, 7.4, 5000)
    assert memory_warning(10 * MIB, 1024) == "the build will want about 1864 MiB (estimated); 5000 MiB are available"


def test_a_small_board_with_too_little_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    board(monkeypatch, 7.4, 1863)
    line = memory_warning(10 * MIB, 1024)
    assert line is not None and line.startswith("warning: ") and "only 1863 MiB" in line and "--workspace 256" in line


def test_a_big_machine_is_not_bothered(monkeypatch: pytest.MonkeyPatch) -> None:
    board(monkeypatch, 64, 100)
    assert memory_warning(10 * MIB, 1024) is None
