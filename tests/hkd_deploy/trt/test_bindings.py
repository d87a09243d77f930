"""Tests of the import of the tensorrt package and the installation hints."""

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from hkd_deploy.trt import bindings
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
