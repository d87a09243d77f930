"""Tests of the ONNX Runtime backend: device selection and errors for damaged files."""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from hkd_deploy.backends.onnxruntime import open_onnx_runtime
from hkd_det.errors import DataError, UnavailableError, UsageError


def open_once(path: Path, device: str = "cpu", threads: int | None = None) -> None:
    with open_onnx_runtime(path, device, threads):
        pass


def test_run_batch_returns_boxes(tiny_onnx: Callable[..., Path]) -> None:
    images = np.zeros((2, 96, 160, 3), np.uint8)
    images[1, 10:20, 30:50] = 255
    with open_onnx_runtime(tiny_onnx(), threads=1) as runtime:
        assert (runtime.batch, runtime.input_hw, runtime.device) == (None, (96, 160), "cpu")
        boxes, scores, count = runtime.run(images)
    assert boxes.shape == (2, 2, 4)
    assert count.tolist() == [0, 1]
    assert boxes[1, 0].tolist() == [30, 10, 50, 20]
    assert scores[1, 0] == pytest.approx(200 / (96 * 160))


def test_open_fixed_batch_is_read_from_graph(tiny_onnx: Callable[..., Path]) -> None:
    with open_onnx_runtime(tiny_onnx(batch=3)) as runtime:
        assert runtime.batch == 3


def test_run_closed_model_raises(tiny_onnx: Callable[..., Path]) -> None:
    with open_onnx_runtime(tiny_onnx()) as runtime:
        pass
    with pytest.raises(ValueError, match="the model is closed"):
        runtime.run(np.zeros((1, 96, 160, 3), np.uint8))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "cpu:0", ""])
def test_open_unknown_device_raises(tiny_onnx: Callable[..., Path], device: str) -> None:
    with pytest.raises(UsageError, match=f"--device: expected cpu, cuda or cuda:N, got {device}"):
        open_once(tiny_onnx(), device)


@pytest.mark.parametrize("threads", [0, -2])
def test_open_zero_threads_raises(tiny_onnx: Callable[..., Path], threads: int) -> None:
    with pytest.raises(UsageError, match=f"--threads: expected at least 1, got {threads}"):
        open_once(tiny_onnx(), threads=threads)


def test_open_cuda_without_provider_raises(tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnavailableError, match=r"--device cuda:0: .*pip install 'hkd-det\[gpu\]'"):
        open_once(tiny_onnx(), "cuda:0")


class FallbackSession:
    """A session that ONNX Runtime opened on another provider because CUDA does not load."""

    def __init__(self, provider: str, device_id: str) -> None:
        self.provider, self.device_id = provider, device_id

    def get_providers(self) -> list[str]:
        return [self.provider]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {self.provider: {"device_id": self.device_id}}


@pytest.mark.parametrize(
    ("provider", "device_id", "message"),
    [("CPUExecutionProvider", "0", "CPUExecutionProvider instead"), ("CUDAExecutionProvider", "0", "GPU 0 instead")],
)
def test_open_silent_fallback_raises(
    tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, provider: str, device_id: str, message: str
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: FallbackSession(provider, device_id))
    with pytest.raises(UnavailableError, match=f"--device cuda:1: .*{message}"):
        open_once(tiny_onnx(), "cuda:1")


def test_open_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.onnx: no such model file"):
        open_once(tmp_path / "none.onnx")


def test_open_directory_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an ONNX file, got a directory"):
        open_once(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_open_truncated_file_raises_one_line(
    tiny_onnx: Callable[..., Path], keep: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny_onnx()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError) as caught:
        open_once(path)
    assert str(caught.value).startswith(f"{path}: ONNX Runtime ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_open_text_file_raises(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "best.pt.onnx"
    path.write_text("these are no protocol buffers\n" * 100)
    with pytest.raises(DataError, match="cannot load it"):
        open_once(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("field", ["ir_version", "opset"])
def test_open_newer_opset_or_ir_raises(
    tiny_onnx: Callable[..., Path], field: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny_onnx()
    model = onnx.load(path)
    if field == "opset":
        model.opset_import[0].version = 999
    else:
        model.ir_version = 999
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=r"too new.*999"):
        open_once(path)
    assert capfd.readouterr() == ("", "")


def test_open_other_input_name_raises(tiny_onnx: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="expected one input images uint8"):
        open_once(tiny_onnx(input_name="input"))


def test_open_other_output_name_raises(tiny_onnx: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"expected outputs .* got output0 float32"):
        open_once(tiny_onnx(output_name="output0"))


def test_open_without_onnxruntime_raises(tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_onnx()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # None makes the import fail
    with pytest.raises(UnavailableError, match=r"not installed\. Run pip install 'hkd-det\[cpu\]'"):
        open_once(path)


def test_open_broken_onnxruntime_raises(tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_onnx()

    def broken(name: str) -> types.ModuleType:
        raise ImportError(f"lib{name}.so: cannot open shared object file\nmore")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(UnavailableError, match=r"does not load: libonnxruntime\.so: cannot open[^\n]*$"):
        open_once(path)
