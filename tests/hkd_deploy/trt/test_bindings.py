"""Tests of the import of the tensorrt package, the installation hints and the progress bar of a build."""

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hkd_deploy.trt import bindings
from hkd_deploy.trt.bindings import BuildProgress
from hkd_det.errors import UnavailableError


def test_missing_tensorrt_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match="TensorRT: not installed"):
        bindings.import_tensorrt()


def test_old_tensorrt_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    old: Any = SimpleNamespace(__version__="8.6.2.3")
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(UnavailableError, match=r"TensorRT: expected version 10\.0 or later, got 8\.6\.2\.3"):
        bindings.import_tensorrt()


def test_broken_tensorrt_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_broken(name: str) -> Any:
        raise ImportError(f"lib{name}.so.10: cannot open shared object file\nmore")

    monkeypatch.setattr(importlib, "import_module", import_broken)
    with pytest.raises(UnavailableError, match=r"libtensorrt\.so\.10: cannot open shared object file") as caught:
        bindings.import_tensorrt()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("system", "machine", "jetson", "expected"),
    [
        ("Linux", "aarch64", True, "sudo apt install python3-libnvinfer"),
        ("Linux", "x86_64", False, "pip install tensorrt"),
        ("Linux", "aarch64", False, "pip install tensorrt"),
        ("Darwin", "arm64", False, "not on Darwin arm64"),
        ("Windows", "AMD64", False, "not on Windows AMD64"),
    ],
)
def test_install_hint_by_platform(system: str, machine: str, jetson: bool, expected: str) -> None:
    assert expected in bindings._format_install_hint(system, machine, jetson)


@pytest.fixture
def progress() -> BuildProgress:
    return BuildProgress("building")


def percent(progress: BuildProgress) -> float:
    return float(progress._progress.done)


def test_nested_phases_are_parts_of_a_step(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 4)
        assert percent(progress) == 0
        assert progress.step("all")
        assert percent(progress) == 25
        progress.start("part", "all", 2)
        assert progress.step("part")
        assert percent(progress) == pytest.approx(25 + 25 / 2)
        progress.start("deeper", "part", 5)
        assert progress.step("deeper")
        assert percent(progress) == pytest.approx(25 + 25 / 2 + 25 / 10)
        for phase in ("deeper", "part"):
            progress.finish(phase)
        assert progress.step("all")
        assert percent(progress) == 50
        progress.finish("all")


def test_outermost_phase_starts_at_zero(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 2)
        progress.step("all")
        progress.finish("all")
        progress.start("next", None, 10)
        assert percent(progress) == 0
        progress.step("next")
        assert percent(progress) == 10


def test_bar_never_decreases_or_exceeds_100(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 1)
        progress.step("all")
        progress.step("all")  # one step too many
        progress.start("late", "all", 10)
        assert percent(progress) == 100
        progress.step("unannounced")
        progress.finish("unannounced")
        assert percent(progress) == 100


def test_step_after_cancel_returns_false(progress: BuildProgress) -> None:
    with progress:
        progress.start("all", None, 0)
        progress.cancel()
        assert not progress.step("all")
