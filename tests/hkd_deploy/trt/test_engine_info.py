"""Tests of ENGINE.engine.json, and of the check whether an engine runs on a machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from hkd_deploy.model_metadata import TensorInfo
from hkd_deploy.trt import engine_info as engine_info_module
from hkd_deploy.trt.bindings import GpuInfo
from hkd_deploy.trt.engine_info import (
    EngineInfo,
    Profile,
    check_compatibility,
    get_current_platform,
    get_engine_info_path,
    read_engine_info,
    read_plan,
    write_engine,
)
from hkd_det.errors import DataError, UnavailableError
from hkd_det.files import bytes_sha256

ORIN = GpuInfo("Orin", "8.7")
ENGINE_PATH = Path("student.engine")


def make_info(**changes: Any) -> EngineInfo:
    values: dict[str, Any] = {
        "format": 1, "tensorrt": "10.3.0", "gpu": "Orin", "sm": "8.7", "platform": get_current_platform(),
        "version_compatible": False, "hardware_compatible": False, "dla": 0,
        "precision_requested": "int8", "precision_actual": {"int8": 40, "fp16": 7},
        "inputs": (TensorInfo("images", "uint8", (None, 512, 640, 3)),),
        "outputs": (TensorInfo("boxes", "float32", (None, 300, 4)),),
        "profile": Profile((1, 512, 640, 3), (4, 512, 640, 3), (8, 512, 640, 3)), "workspace_mib": 1024,
        "context_mib": 31.6, "build_s": 97.0, "date": "2026-01-02T03:04:05+00:00", "source": "student.onnx",
        "source_sha256": "0f" * 32, "engine_sha256": bytes_sha256(b"plan"), "metadata": {"imgsz": "[512, 640]"},
    }  # fmt: skip
    return EngineInfo(**(values | changes))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    write_engine(tmp_path / "student.engine", b"plan", make_info())
    return tmp_path / "student.engine"


def test_write_engine_then_read_gives_the_same(engine: Path) -> None:
    assert engine.read_bytes() == b"plan" and get_engine_info_path(engine).name == "student.engine.json"
    assert read_engine_info(engine) == make_info() and read_plan(engine, make_info()) == b"plan"
    assert json.loads(get_engine_info_path(engine).read_text())["profile"]["max"] == [8, 512, 640, 3]
    assert sorted(path.name for path in engine.parent.iterdir()) == ["student.engine", "student.engine.json"]


def test_static_engine_without_dla_is_read_back(tmp_path: Path) -> None:
    info = make_info(profile=None, dla=None)
    write_engine(tmp_path / "student.engine", b"plan", info)
    assert read_engine_info(tmp_path / "student.engine") == info


def test_write_engine_on_a_full_disk_keeps_old_files(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in engine.parent.iterdir()}

    def write_bytes(path: Path, content: bytes) -> int:  # noqa: ARG001 - signature of pathlib
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        return 0

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="No space left"):
        write_engine(engine, b"other", make_info())
    assert {path: path.read_bytes() for path in engine.parent.iterdir()} == before


def test_read_plan_after_interrupted_write_raises(engine: Path) -> None:
    new_info = make_info(engine_sha256=bytes_sha256(b"new plan"))
    write_engine(engine.with_name("new.engine"), b"new plan", new_info)
    get_engine_info_path(engine.with_name("new.engine")).replace(get_engine_info_path(engine))
    message = r"truncated or changed since .* Build it on this machine: hkd-export student\.onnx"
    with pytest.raises(DataError, match=message):
        read_plan(engine, read_engine_info(engine))


def test_engine_without_json_raises(engine: Path) -> None:
    get_engine_info_path(engine).unlink()
    with pytest.raises(DataError, match=r"student\.engine\.json is missing. Copy both files, or run"):
        read_engine_info(engine)


def test_missing_engine_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such engine"):
        read_engine_info(tmp_path / "absent.engine")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "1"}', '{"another": 1}', "\xff"])
def test_damaged_json_raises(engine: Path, text: str) -> None:
    get_engine_info_path(engine).write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=r"student\.engine\.json: damaged \(.* Build the engine again") as caught:
        read_engine_info(engine)
    assert "\n" not in str(caught.value)


def test_json_with_invalid_utf8_raises(engine: Path) -> None:
    text = get_engine_info_path(engine).read_bytes()
    get_engine_info_path(engine).write_bytes(text.replace(b"linux", b"l\xffnux").replace(b'"gpu": "', b'"gpu": "\xff'))
    with pytest.raises(DataError, match=r"student\.engine\.json: damaged \(.* Build the engine again"):
        read_engine_info(engine)


def test_newer_format_raises(engine: Path) -> None:
    write_engine(engine, b"plan", make_info(format=2))
    with pytest.raises(DataError, match="written by a newer version of hkd-det"):
        read_engine_info(engine)


@pytest.mark.parametrize(
    ("installed", "option", "compatible"),
    [
        ("10.3.0", None, True),
        ("10.3.0.30", None, False),
        ("10.7.0", None, False),
        ("10.7.0", "version_compatible", True),
        ("10.13.0", "version_compatible", True),
        ("10.4.0b6", "version_compatible", True),
        ("10.2.0", "version_compatible", False),
        ("11.0.0", "version_compatible", False),
        ("10.7.0", "hardware_compatible", False),
    ],
)
def test_compatibility_with_tensorrt_versions(installed: str, option: str | None, compatible: bool) -> None:
    info = make_info(**({option: True} if option else {}))
    if compatible:
        check_compatibility(ENGINE_PATH, info, installed, ORIN)
        return
    message = rf"built for TensorRT 10\.3\.0, this machine has TensorRT {installed}\. Build"
    with pytest.raises(UnavailableError, match=message):
        check_compatibility(ENGINE_PATH, info, installed, ORIN)


@pytest.mark.parametrize(
    ("gpu", "option", "compatible"),
    [
        (GpuInfo("NVIDIA L4", "8.9"), None, False),
        (GpuInfo("Orin Nano", "8.7"), None, False),
        (GpuInfo("NVIDIA L4", "8.9"), "hardware_compatible", True),
        (GpuInfo("NVIDIA Thor", "11.0"), "hardware_compatible", True),
        (GpuInfo("Tesla T4", "7.5"), "hardware_compatible", False),
        (GpuInfo("NVIDIA L4", "8.9"), "version_compatible", False),
    ],
)
def test_compatibility_with_gpus(gpu: GpuInfo, option: str | None, compatible: bool) -> None:
    info = make_info(**({option: True} if option else {}))
    if compatible:
        check_compatibility(ENGINE_PATH, info, "10.3.0", gpu)
        return
    message = r"built for Orin \(SM 8\.7\), this machine has .*\. Build it on this machine: hkd-export"
    with pytest.raises(UnavailableError, match=message):
        check_compatibility(ENGINE_PATH, info, "10.3.0", gpu)


def test_another_platform_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_info_module, "get_current_platform", lambda: "linux-riscv")
    with pytest.raises(UnavailableError, match=r"this machine has linux-riscv\. Build it on this machine"):
        check_compatibility(ENGINE_PATH, make_info(), "10.3.0", ORIN)
