"""The file beside an engine, and where an engine may run."""

import json
from pathlib import Path
from typing import Any

import pytest

from hkd_deploy.trt import engine_info as sidecar_module
from hkd_deploy.trt.cuda import GpuInfo
from hkd_deploy.trt.engine_info import (
    EngineInfo,
    ProfileInfo,
    TensorInfo,
    bytes_sha256,
    check_compatibility,
    current_platform,
    get_engine_info_path,
    read_engine_info,
    read_plan,
    write_engine,
)
from hkd_det.errors import DataError, UnavailableError

ORIN = GpuInfo("Orin", "8.7")


def facts(**changes: Any) -> EngineInfo:
    known: dict[str, Any] = {
        "format": 1, "tensorrt": "10.3.0", "gpu": "Orin", "sm": "8.7", "platform": current_platform(), "compatible": [],
        "dla": 0, "precision_asked": "int8", "precision_found": {"int8": 40, "fp16": 7},
        "inputs": [TensorInfo("images", "UINT8", [-1, 512, 640, 3])],
        "outputs": [TensorInfo("boxes", "FLOAT", [-1, 300, 4])],
        "profile": ProfileInfo([1, 512, 640, 3], [4, 512, 640, 3], [8, 512, 640, 3]), "workspace_mib": 1024,
        "context_mib": 31.6, "build_s": 97.0, "date": "2026-01-02T03:04:05+00:00", "source": "student.onnx",
        "source_sha256": "0f" * 32, "engine_sha256": bytes_sha256(b"plan"), "metadata": {"imgsz": "[512, 640]"},
    }  # fmt: skip
    return EngineInfo(**(known | changes))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    write_engine(tmp_path / "student.engine", b"plan", facts())
    return tmp_path / "student.engine"


def test_the_engine_is_the_plain_plan_and_all_else_comes_back(engine: Path) -> None:
    assert engine.read_bytes() == b"plan" and get_engine_info_path(engine).name == "student.engine.json"
    assert read_engine_info(engine) == facts() and read_plan(engine, facts()) == b"plan"
    assert json.loads(get_engine_info_path(engine).read_text())["profile"]["largest"] == [8, 512, 640, 3]
    assert sorted(path.name for path in engine.parent.iterdir()) == ["student.engine", "student.engine.json"]


def test_nothing_is_half_written(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in engine.parent.iterdir()}

    def full(path: Path, content: bytes) -> int:  # noqa: ARG001 - pathlib's signature
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        return 0

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_engine(engine, b"other", facts())
    assert {path: path.read_bytes() for path in engine.parent.iterdir()} == before


def test_killed_between_the_two_files(engine: Path) -> None:
    new = facts(engine_sha256=bytes_sha256(b"new plan"))
    write_engine(engine.with_name("new.engine"), b"new plan", new)
    get_engine_info_path(engine.with_name("new.engine")).replace(get_engine_info_path(engine))
    with pytest.raises(DataError, match=r"truncated or changed since .*; build it here: hkd-export student\.onnx"):
        read_plan(engine, read_engine_info(engine))


def test_an_engine_without_its_sidecar(engine: Path) -> None:
    get_engine_info_path(engine).unlink()
    with pytest.raises(DataError, match=r"student\.engine\.json is missing beside it; copy both, or build it"):
        read_engine_info(engine)


def test_no_engine(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such engine"):
        read_engine_info(tmp_path / "no.engine")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "1"}', "\xff"])
def test_a_damaged_sidecar(engine: Path, text: str) -> None:
    get_engine_info_path(engine).write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=r"student\.engine\.json: damaged \(.*build the engine again") as caught:
        read_engine_info(engine)
    assert "\n" not in str(caught.value)


def test_a_byte_wrong_in_a_text(engine: Path) -> None:
    text = get_engine_info_path(engine).read_bytes()
    get_engine_info_path(engine).write_bytes(text.replace(b"linux", b"l\xffnux").replace(b'"gpu": "', b'"gpu": "\xff'))
    with pytest.raises(DataError, match=r"student\.engine\.json: damaged \(.*build the engine again"):
        read_engine_info(engine)


def test_a_sidecar_of_the_future(engine: Path) -> None:
    write_engine(engine, b"plan", facts(format=2))
    with pytest.raises(DataError, match="written by a newer hkd-det; update"):
        read_engine_info(engine)


HOME = Path("student.engine")


@pytest.mark.parametrize(
    ("here", "compatible", "runs"),
    [
        ("10.3.0", [], True),
        ("10.3.0.30", [], False),
        ("10.7.0", [], False),
        ("10.7.0", ["version"], True),
        ("10.13.0", ["version"], True),
        ("10.4.0b6", ["version"], True),
        ("10.2.0", ["version"], False),
        ("11.0.0", ["version"], False),
        ("10.7.0", ["hardware"], False),
    ],
)
def test_versions(here: str, compatible: list[str], runs: bool) -> None:
    if runs:
        check_compatibility(HOME, facts(compatible=compatible), here, ORIN)
        return
    with pytest.raises(
        UnavailableError, match=rf"built for TensorRT 10\.3\.0, this machine has TensorRT {here}; build"
    ):
        check_compatibility(HOME, facts(compatible=compatible), here, ORIN)


@pytest.mark.parametrize(
    ("here", "compatible", "runs"),
    [
        (GpuInfo("NVIDIA L4", "8.9"), [], False),
        (GpuInfo("Orin Nano", "8.7"), [], False),
        (GpuInfo("NVIDIA L4", "8.9"), ["hardware"], True),
        (GpuInfo("NVIDIA Thor", "11.0"), ["hardware"], True),
        (GpuInfo("Tesla T4", "7.5"), ["hardware"], False),
        (GpuInfo("NVIDIA L4", "8.9"), ["version"], False),
    ],
)
def test_gpus(here: GpuInfo, compatible: list[str], runs: bool) -> None:
    if runs:
        check_compatibility(HOME, facts(compatible=compatible), "10.3.0", here)
        return
    with pytest.raises(
        UnavailableError, match=r"built for Orin \(SM 8\.7\), this machine has .*; build it here: hkd-export"
    ):
        check_compatibility(HOME, facts(compatible=compatible), "10.3.0", here)


def test_another_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar_module, "this_platform", lambda: "linux-riscv")
    with pytest.raises(UnavailableError, match="this machine has linux-riscv; build it here"):
        check_compatibility(HOME, facts(), "10.3.0", ORIN)
