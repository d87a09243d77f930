"""Tests of the OpenVINO backend: precision, OpenVINO directories and errors for damaged files."""

import importlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml

from hkd_deploy import open_detector
from hkd_deploy.backends.openvino import DIRECTORY_FILES, export_openvino, open_openvino, write_openvino_directory
from hkd_deploy.export.cli import main as export
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.onnxrt.openvino import create_core, list_model_files

ov = importlib.import_module("openvino")


CTRL_C = """
import signal, sys, threading
from pathlib import Path
from hkd_deploy.backends.openvino import open_openvino

class OpenModel:
    def __init__(self):
        self.context = open_openvino(Path(sys.argv[1]))
        self.context.__enter__()

    def close(self):
        self.context.__exit__(None, None, None)
        del self.context

def close_in_order():
    first, second = OpenModel(), OpenModel()
    first.close()
    second.close()

def close_in_thread():
    closing = threading.Thread(target=OpenModel().close)
    closing.start()
    closing.join()

signal.signal(signal.SIGINT, signal.default_int_handler)
globals()[sys.argv[2]]()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def open_once(path: Path, **kwargs: object) -> None:
    with open_openvino(path, **kwargs):  # type: ignore[arg-type]
        pass


@pytest.fixture
def folder(tiny_onnx: Callable[..., Path]) -> Path:
    return export_openvino(tiny_onnx())


def test_open_default_precision_requests_float32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: dict[str, str] = {}
    compile_model = ov.Core.compile_model

    def spy(core: object, model: object, device: str, config: dict[str, str]) -> object:
        requested.update(config)
        return compile_model(core, model, device, config)

    monkeypatch.setattr(ov.Core, "compile_model", spy)
    open_once(folder, threads=1)
    assert requested == {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": "1",
    }


def test_open_bf16_is_read_back(folder: Path) -> None:
    if "BF16" not in create_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UnavailableError, match="this processor does not support bfloat16"):
            open_once(folder, precision="bf16")
        return
    with open_openvino(folder, precision="bf16") as runtime:
        precision = runtime._compiled.get_property("INFERENCE_PRECISION_HINT")  # type: ignore[union-attr]
    assert precision.get_type_name() == "bf16"


def test_open_other_precision_than_requested_raises(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_model = ov.Core.compile_model
    monkeypatch.setattr(
        ov.Core,
        "compile_model",
        lambda core, model, device, config: compile_model(
            core, model, device, {**config, "INFERENCE_PRECISION_HINT": "f32"}
        ),
    )
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: ["BF16"])
    with pytest.raises(UnavailableError, match="expected inference precision bf16, got f32"):
        open_once(folder, precision="bf16")


@pytest.mark.slow
@pytest.mark.parametrize("function", ["close_in_order", "close_in_thread"])
def test_create_core_keeps_signal_handling(folder: Path, function: str) -> None:
    """Two Cores destroyed in order, or one in another thread, can leave an unmapped signal stack."""
    command = [sys.executable, "-c", CTRL_C, str(folder), function]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_call_throughput_keeps_order_of_frames(folder: Path) -> None:
    frames = []
    for x in range(0, 100, 10):
        frames.append(np.zeros((96, 160, 3), np.uint8))
        frames[-1][20:60, x : x + 40] = 255
    with open_detector(folder, threads=2, performance_hint="throughput") as detector:
        results = detector(frames)
        assert detector._num_requests >= 1
    assert [detections.boxes_xyxy[0, 0] for detections in results] == list(range(0, 100, 10))


def test_export_openvino_writes_standard_metadata(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(DIRECTORY_FILES)
    content = yaml.safe_load((folder / "metadata.yaml").read_text())
    assert (content["task"], content["stride"], content["imgsz"], content["names"]) == (
        "detect",
        32,
        [96, 160],
        {0: "person"},
    )
    assert content["batch"] == "dynamic" and content["hkd.model"] == "tiny" and isinstance(content["date"], str)
    with open_openvino(folder / "model.xml") as runtime, open_openvino(folder) as other:
        assert runtime.metadata == other.metadata
        assert runtime.metadata["imgsz"] == "[96, 160]" and runtime.metadata["names"] == "{0: 'person'}"


def test_export_openvino_keeps_metadata(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx(batch=3)
    with open_openvino(path) as from_onnx, open_openvino(export_openvino(path)) as from_folder:
        assert from_folder.metadata == from_onnx.metadata
        assert from_onnx.metadata == {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_export_openvino_replaces_own_directory_only(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    folder = export_openvino(tiny_onnx(imgsz_hw=(96, 160)))
    assert export_openvino(tiny_onnx(imgsz_hw=(64, 96))) == folder
    with open_openvino(folder) as runtime:
        assert runtime.input_hw == (64, 96)
    (folder / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=r"contains notes\.txt, .* another directory"):
        export_openvino(tmp_path / "tiny.onnx")
    assert (folder / "notes.txt").read_text() == "text"


def test_write_openvino_directory_damaged_file_writes_nothing(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_onnx()
    folder = export_openvino(path)
    before = (folder / "model.xml").read_bytes()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"tiny\.onnx: OpenVINO .* cannot load the file"):
        write_openvino_directory(path, folder)
    assert (folder / "model.xml").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tiny.onnx", "tiny_openvino"]


def test_write_openvino_directory_full_disk_raises(
    tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the one that save_model raised on a file system of 1.5 MB."""

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    path = tiny_onnx()
    monkeypatch.setattr("openvino.save_model", full)
    with pytest.raises(DataError, match=r"/ov: OpenVINO cannot write it: basic_ios.*\. Check the free disk space\.$"):
        write_openvino_directory(path, path.with_name("ov"))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_export_openvino_interrupted_leaves_no_files(
    tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, stop: signal.Signals
) -> None:
    def stopped(_: object, path: Path, **__: object) -> None:
        path.write_text("half a model")
        signal.raise_signal(stop)

    def fail(*_: object) -> None:
        raise AssertionError("SIGTERM was not handled")

    path = tiny_onnx()
    monkeypatch.setattr("openvino.save_model", stopped)
    before = signal.signal(signal.SIGTERM, fail)
    try:
        assert export([str(path), "--openvino"]) == 130
        assert signal.getsignal(signal.SIGTERM) is fail
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(path.parent.iterdir()) == [path]


def test_export_command_writes_openvino_directory(
    tiny_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_onnx()
    assert export([str(path), "--openvino"]) == 0
    assert "tiny_openvino: OpenVINO model of" in capsys.readouterr().out
    assert export([str(path), "--openvino", "--output", str(path.parent / "another")]) == 0
    open_once(path.parent / "another")
    capsys.readouterr()
    path.write_bytes(b"no model")
    assert export([str(path), "--openvino"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_open_empty_file_raises(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(DataError, match=r"empty\.onnx: not an hkd-det model"):  # OpenVINO reads it as an empty graph
        open_once(tmp_path / "empty.onnx")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("keep", [1, 100, -1])
def test_open_truncated_onnx_file_raises(
    tiny_onnx: Callable[..., Path], keep: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny_onnx()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"^{path}: OpenVINO [0-9.]+ cannot load the file \(truncated, .*\): [^\n]+$"):
        open_once(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
@pytest.mark.parametrize("ratio", [0, 0.5, 0.99])
def test_open_truncated_directory_raises(
    folder: Path, name: str, ratio: float, capfd: pytest.CaptureFixture[str]
) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(ratio * len(content))])
    with pytest.raises(DataError, match=rf"^{folder}/model\.xml: OpenVINO .* cannot load the file [^\n]+$"):
        open_once(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", DIRECTORY_FILES)
def test_open_incomplete_directory_raises(folder: Path, name: str) -> None:
    (folder / name).unlink()
    messages = {"model.xml": "not an OpenVINO directory", "metadata.yaml": "hkd.format is missing"}
    with pytest.raises(DataError, match=messages.get(name, f"{name}: no such")):
        open_once(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "expected a YAML mapping, got list"),
        ("a: [", "not YAML: "),
        ("names: {0: person}\ntask: detect\n", "not an hkd-det model"),  # as Ultralytics writes it
    ],
)
def test_open_invalid_metadata_yaml_raises(folder: Path, text: str, message: str) -> None:
    (folder / "metadata.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        open_once(folder)
    assert "\n" not in str(caught.value)


def test_open_newer_opset_raises(tiny_onnx: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_onnx()
    model = onnx.load(path)
    model.opset_import[0].version = 99
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=r"or too new\): [^\n]*$"):
        open_once(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"device": "cuda"}, "--device cuda: the openvino backend supports cpu only"),
        ({"device": "tpu"}, "--device tpu: the openvino backend supports cpu only"),
        ({"threads": 0}, "--threads: expected at least 1, got 0"),
        ({"performance_hint": "speed"}, "performance_hint speed: expected latency or throughput"),
    ],
)
def test_open_invalid_argument_raises(folder: Path, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_once(folder, **kwargs)


def test_open_bf16_unsupported_processor_raises(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(UnavailableError, match=r"does not support bfloat16\. Set --backend openvino"):
        open_once(folder, precision="bf16")


def test_open_without_openvino_raises(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnavailableError, match=r"not installed\. Run pip install 'hkd-det\[openvino\]'"):
        open_once(folder)


def test_list_model_files_returns_all_files(folder: Path, tiny_onnx: Callable[..., Path]) -> None:
    assert [path.name for path in list_model_files(folder)] == list(DIRECTORY_FILES)
    assert list_model_files(folder / "model.xml") == list_model_files(folder)
    assert list_model_files(tiny_onnx()) == [tiny_onnx()]
