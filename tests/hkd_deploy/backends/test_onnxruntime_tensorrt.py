"""Tests of the TensorRT execution providers of ONNX Runtime, with fakes in place of TensorRT and the GPU."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

from hkd_deploy.backends import open_backend
from hkd_deploy.backends.onnxruntime import (
    _register_provider_library,
    create_engine_cache_dir,
    make_tensorrt_provider,
    make_tensorrt_rtx_provider,
)
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.onnxrt.session import open_session

RTX = "NvTensorRTRTXExecutionProvider"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Home directory, which contains the engine cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def open_once(path: Path, backend: str, device: str = "cuda") -> None:
    with open_backend(path, device, backend=backend):
        pass


@pytest.mark.parametrize("backend", ["ort-tensorrt", "ort-tensorrt-rtx"])
def test_open_on_cpu_raises(tiny_onnx: Callable[..., Path], backend: str) -> None:
    with pytest.raises(UsageError, match=f"--backend {backend} --device cpu: expected an NVIDIA GPU. Set"):
        open_once(tiny_onnx(), backend, "cpu")


def test_open_without_tensorrt_provider_raises(tiny_onnx: Callable[..., Path]) -> None:
    with pytest.raises(UnavailableError, match=r"--device cuda: .*has no TensorRT provider.*'hkd-det\[gpu\]' tensorrt"):
        open_once(tiny_onnx(), "ort-tensorrt")


def test_open_without_rtx_plugin_raises(tiny_onnx: Callable[..., Path]) -> None:
    with pytest.raises(UnavailableError, match=r"not installed\. .*onnxruntime-ep-nv-tensorrt-rtx\.$"):
        open_once(tiny_onnx(), "ort-tensorrt-rtx")


def test_make_tensorrt_provider_keeps_precision_and_gpu(tiny_onnx: Callable[..., Path]) -> None:
    provider = make_tensorrt_provider(tiny_onnx(), "cuda:1")
    assert provider.options["device_id"] == "1" and provider.extra_providers == (
        ("CUDAExecutionProvider", {"device_id": "1"}),
    )
    assert provider.options["trt_fp16_enable"] == provider.options["trt_int8_enable"] == "0"
    assert provider.options["trt_engine_cache_enable"] == "1"


def test_create_engine_cache_dir_depends_on_file_content(tiny_onnx: Callable[..., Path], home: Path) -> None:
    first = create_engine_cache_dir(tiny_onnx())
    assert create_engine_cache_dir(tiny_onnx()) == first and first.is_dir() and first.is_relative_to(home)
    assert create_engine_cache_dir(tiny_onnx(changes={"hkd.weights_sha256": "ab" * 32})) != first
    with pytest.raises(DataError, match=r"none\.onnx: no such model file"):
        create_engine_cache_dir(home / "none.onnx")


class Session:
    """A session that records its arguments."""

    def __init__(self, *_: object, **kwargs: object) -> None:
        self.kwargs = kwargs
        Session.last = self

    last: "Session"
    provider = "TensorrtExecutionProvider"

    def get_providers(self) -> list[str]:
        return [self.provider]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {self.provider: {"device_id": "0"}}

    def get_modelmeta(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(custom_metadata_map={})

    def get_inputs(self) -> list[object]:
        return []

    get_outputs = get_inputs


def test_open_silent_fallback_to_cuda_raises(tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    path = tiny_onnx()
    open_session(path, "cuda", provider=make_tensorrt_provider(path, "cuda"))
    kwargs = Session.last.kwargs
    assert [name for name, _ in kwargs["providers"]] == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]  # type: ignore[attr-defined]
    assert kwargs["enable_fallback"] == 0
    monkeypatch.setattr(Session, "provider", "CUDAExecutionProvider")
    with pytest.raises(UnavailableError, match=r"on CUDAExecutionProvider instead of Tensorrt.*\. TensorRT, CUDA or"):
        open_once(path, "ort-tensorrt")


def test_open_provider_start_failure_raises(tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("libnvinfer.so.10: cannot open shared object file\nmore")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    with pytest.raises(UnavailableError, match=r"TensorrtExecutionProvider does not start: lib[^\n]*\. TensorRT"):
        open_once(tiny_onnx(), "ort-tensorrt")


class Plugin(types.ModuleType):
    """The two functions of the plugin package of NVIDIA."""

    @staticmethod
    def get_ep_name() -> str:
        return RTX

    @staticmethod
    def get_library_path() -> str:
        return "plugin.so"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Install a fake plugin with a CPU and two RTX GPUs; return the list of registrations."""
    registered: list[tuple[str, str]] = []
    module = Plugin("onnxruntime_ep_nv_tensorrt_rtx")
    devices = [types.SimpleNamespace(ep_name=name) for name in ("CPUExecutionProvider", RTX, RTX)]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda *named: registered.append(named), raising=False
    )
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices, raising=False)
    _register_provider_library.cache_clear()
    return registered


def test_make_tensorrt_rtx_provider_registers_plugin_once(
    tiny_onnx: Callable[..., Path], plugin: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[tuple[list[object], dict[str, str]]] = []
    monkeypatch.setattr(
        onnxruntime.SessionOptions, "add_provider_for_devices", lambda _, *args: added.append(args), raising=False
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(Session, "provider", RTX)
    path = tiny_onnx()
    for device in ("cuda:1", "cuda"):
        provider = make_tensorrt_rtx_provider(path, device)
        open_session(path, device, provider=provider)
        assert "providers" not in Session.last.kwargs  # the session options contain them
    assert plugin == [(RTX, "plugin.so")]
    gpus = [device for device in onnxruntime.get_ep_devices() if device.ep_name == RTX]
    assert [devices for devices, _ in added] == [[gpus[1]], [gpus[0]]]
    assert Path(added[0][1]["nv_runtime_cache_path"]) == create_engine_cache_dir(path)


@pytest.mark.usefixtures("plugin")
def test_open_rtx_gpu_out_of_range_raises(tiny_onnx: Callable[..., Path]) -> None:
    with pytest.raises(UnavailableError, match="--device cuda:2: TensorRT for RTX supports 2 GPUs"):
        open_once(tiny_onnx(), "ort-tensorrt-rtx", "cuda:2")


@pytest.mark.usefixtures("plugin")
def test_open_broken_rtx_plugin_raises(tiny_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str, library: str) -> None:
        raise onnxruntime.capi.onnxruntime_pybind11_state.Fail(f"{library}: undefined symbol\nmore")

    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", broken, raising=False)
    with pytest.raises(UnavailableError, match=r"the plugin does not load: plugin\.so: undefined symbol\. Check that"):
        open_once(tiny_onnx(), "ort-tensorrt-rtx")
