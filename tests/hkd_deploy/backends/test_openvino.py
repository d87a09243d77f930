"""OpenVINO: the precision that was asked for, folders that are whole or refused, one line for every bad file."""

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
from hkd_deploy.backends.openvino import create_core, open_openvino
from hkd_deploy.export.cli import main as export
from hkd_deploy.export.openvino import FOLDER_FILES, export_openvino, list_model_files, write_openvino_folder
from hkd_det.errors import DataError, UnavailableError, UsageError

ov = importlib.import_module("openvino")


CTRL_C = """
import signal, sys, threading
from pathlib import Path
from hkd_deploy.backends.openvino import open_openvino

class Opened:
    def __init__(self):
        self.context = open_openvino(Path(sys.argv[1]))
        self.context.__enter__()

    def close(self):
        self.context.__exit__(None, None, None)
        del self.context

def in_order():
    first, second = Opened(), Opened()
    first.close()
    second.close()

def elsewhere():
    closing = threading.Thread(target=Opened().close)
    closing.start()
    closing.join()

signal.signal(signal.SIGINT, signal.default_int_handler)
globals()[sys.argv[2]]()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("heard")
"""


def open_once(path: Path, **wanted: object) -> None:
    with open_openvino(path, **wanted):  # type: ignore[arg-type]
        pass


@pytest.fixture
def folder(tiny_onnx: Callable[..., Path]) -> Path:
    return export_openvino(tiny_onnx())


def test_float32_is_asked_for_where_openvino_would_choose_bfloat16(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}
    compile_model = ov.Core.compile_model

    def spy(core: object, model: object, device: str, config: dict[str, str]) -> object:
        asked.update(config)
        return compile_model(core, model, device, config)

    monkeypatch.setattr(ov.Core, "compile_model", spy)
    open_once(folder, threads=1)
    assert asked == {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": "1",
    }


def test_bfloat16_is_read_back(folder: Path) -> None:
    if "BF16" not in create_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UnavailableError, match="this processor has no bfloat16"):
            open_once(folder, precision="bf16")
        return
    with open_openvino(folder, precision="bf16") as runtime:
        found = runtime._compiled.get_property("INFERENCE_PRECISION_HINT")  # type: ignore[union-attr]
    assert found.get_type_name() == "bf16"


def test_another_precision_than_asked_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_model = ov.Core.compile_model
    monkeypatch.setattr(
        ov.Core,
        "compile_model",
        lambda core, model, device, config: compile_model(
            core, model, device, {**config, "INFERENCE_PRECISION_HINT": "f32"}
        ),
    )
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: ["BF16"])
    with pytest.raises(UnavailableError, match="computes in f32 here, not in bf16"):
        open_once(folder, precision="bf16")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in_order", "elsewhere"])
def test_ctrl_c_is_heard_after_models_have_gone(folder: Path, way: str) -> None:
    """Two in the order they came, or one in another thread: OpenVINO can leave an unmapped stack to the handler."""
    command = [sys.executable, "-c", CTRL_C, str(folder), way]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_throughput_runs_several_requests_side_by_side(folder: Path) -> None:
    """Two streams on two threads; the answers stay in the order of the frames."""
    frames = []
    for x in range(0, 100, 10):
        frames.append(np.zeros((96, 160, 3), np.uint8))
        frames[-1][20:60, x : x + 40] = 255
    with open_detector(folder, threads=2, performance_hint="throughput") as detector:
        found = detector(frames)
        assert detector._num_requests >= 1
    assert [one.boxes_xyxy[0, 0] for one in found] == list(range(0, 100, 10))


def test_the_folder_is_what_the_fields_readers_know(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FOLDER_FILES)
    said = yaml.safe_load((folder / "metadata.yaml").read_text())
    assert (said["task"], said["stride"], said["imgsz"], said["names"]) == ("detect", 32, [96, 160], {0: "person"})
    assert said["batch"] == "dynamic" and said["hkd.model"] == "tiny" and isinstance(said["date"], str)
    with open_openvino(folder / "model.xml") as runtime, open_openvino(folder) as other:
        assert runtime.metadata == other.metadata
        assert runtime.metadata["imgsz"] == "[96, 160]" and runtime.metadata["names"] == "{0: 'person'}"


def test_metadata_comes_back_as_the_onnx_file_has_it(tiny_onnx: Callable[..., Path]) -> None:
    path = tiny_onnx(batch=3)
    with open_openvino(path) as from_onnx, open_openvino(export_openvino(path)) as from_folder:
        assert from_folder.metadata == from_onnx.metadata
        assert from_onnx.metadata == {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_an_older_folder_is_replaced_and_a_users_own_is_not(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    folder = export_openvino(tiny_onnx(imgsz_hw=(96, 160)))
    assert export_openvino(tiny_onnx(imgsz_hw=(64, 96))) == folder
    with open_openvino(folder) as runtime:
        assert runtime.input_hw == (64, 96)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"holds thesis\.txt, .* name another folder"):
        export_openvino(tmp_path / "tiny.onnx")
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_what_cannot_be_opened_is_not_written(tiny_onnx: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_onnx()
    folder = export_openvino(path)
    before = (folder / "model.xml").read_bytes()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"tiny\.onnx: OpenVINO .* cannot load it"):
        write_openvino_folder(path, folder)
    assert (folder / "model.xml").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tiny.onnx", "tiny_openvino"]


def test_a_full_disk(tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What save_model raised on a file system of 1.5 MB."""

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    path = tiny_onnx()
    monkeypatch.setattr("openvino.save_model", full)
    with pytest.raises(DataError, match=r"/ov: OpenVINO cannot write it: basic_ios.*; is the disk full\?$"):
        write_openvino_folder(path, path.with_name("ov"))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing_behind(
    tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, stop: signal.Signals
) -> None:
    def stopped(_: object, path: Path, **__: object) -> None:
        path.write_text("half a model")
        signal.raise_signal(stop)

    def unheard(*_: object) -> None:
        raise AssertionError("nobody listens to SIGTERM")

    path = tiny_onnx()
    monkeypatch.setattr("openvino.save_model", stopped)
    before = signal.signal(signal.SIGTERM, unheard)
    try:
        assert export([str(path), "--openvino"]) == 130
        assert signal.getsignal(signal.SIGTERM) is unheard
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(path.parent.iterdir()) == [path]


def test_export_command(tiny_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_onnx()
    assert export([str(path), "--openvino"]) == 0
    assert "tiny_openvino: OpenVINO's form of" in capsys.readouterr().out
    assert export([str(path), "--openvino", "--output", str(path.parent / "elsewhere")]) == 0
    open_once(path.parent / "elsewhere")
    capsys.readouterr()
    path.write_bytes(b"no model")
    assert export([str(path), "--openvino"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_empty_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(DataError, match=r"empty\.onnx: not an hkd-det model"):  # OpenVINO takes it for an empty graph
        open_once(tmp_path / "empty.onnx")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("keep", [1, 100, -1])
def test_a_truncated_onnx_file(tiny_onnx: Callable[..., Path], keep: int, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_onnx()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"^{path}: OpenVINO [0-9.]+ cannot load it \(truncated, .*\): [^\n]+$"):
        open_once(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_folder(folder: Path, name: str, share: float, capfd: pytest.CaptureFixture[str]) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=rf"^{folder}/model\.xml: OpenVINO .* cannot load it [^\n]+$"):
        open_once(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FOLDER_FILES)
def test_a_folder_with_a_file_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match="not an OpenVINO folder" if name == "model.xml" else f"{name}: no such"):
        open_once(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list", "expected keys and values, found list"),
        ("a: [", "not YAML: "),
        ("names: {0: person}\ntask: detect\n", "not an hkd-det model"),  # Ultralytics'
    ],
)
def test_metadata_that_is_none_of_ours(folder: Path, text: str, words: str) -> None:
    (folder / "metadata.yaml").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        open_once(folder)
    assert "\n" not in str(caught.value)


def test_an_opset_of_the_future(tiny_onnx: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_onnx()
    model = onnx.load(path)
    model.opset_import[0].version = 99
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=r"or too new\): [^\n]*$"):
        open_once(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"device": "cuda"}, "--device cuda: OpenVINO runs on cpu here"),
        ({"device": "tpu"}, "--device tpu: OpenVINO runs on cpu here"),
        ({"threads": 0}, "--threads 0: at least 1"),
        ({"hint": "speed"}, "hint speed: expected latency or throughput"),
    ],
)
def test_what_makes_no_sense(folder: Path, wanted: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_once(folder, **wanted)


def test_a_processor_without_bfloat16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(UnavailableError, match="no bfloat16; say --backend openvino"):
        open_once(folder, precision="bf16")


def test_openvino_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnavailableError, match=r"not installed; pip install 'hkd-det\[openvino\]'"):
        open_once(folder)


def test_files_that_belong_to_a_model(folder: Path, tiny_onnx: Callable[..., Path]) -> None:
    assert [path.name for path in list_model_files(folder)] == list(FOLDER_FILES)
    assert list_model_files(folder / "model.xml") == list_model_files(folder)
    assert list_model_files(tiny_onnx()) == [tiny_onnx()]
