"""ONNX Runtime's two TensorRT providers: TensorRT itself, and TensorRT for RTX, a plugin of its own.

Both build an engine when a model is first opened, in the precision of the file, and keep it for the next time.
"""

import hashlib
import importlib
from functools import cache
from pathlib import Path
from typing import Any

from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.onnx_session import Provider, import_onnxruntime, parse_gpu_index
from hkd_det.packages import first_error_line

_TENSORRT_MISSING_HINT = (
    "the ONNX Runtime installed here has no TensorRT; pip uninstall -y onnxruntime && "
    "pip install 'hkd-det[gpu]' tensorrt (on Jetson: NVIDIA's own onnxruntime-gpu wheel)"
)
_TENSORRT_FAILURE_HINT = (
    "TensorRT, CUDA or cuDNN is missing or of another version than onnxruntime-gpu was built for; "
    "try pip install 'onnxruntime-gpu[cuda,cudnn]' tensorrt"
)
_RTX_MISSING_HINT = (
    "TensorRT for RTX is not installed; for an RTX GPU, Ampere or later: "
    "pip uninstall -y onnxruntime-gpu && pip install 'onnxruntime>=1.24' onnxruntime-ep-nv-tensorrt-rtx"
)
_RTX_FAILURE_HINT = "see that the driver fits the plugin's CUDA (onnxruntime-ep-nv-tensorrt-rtx-cu12 or -cu13)"


def make_tensorrt_provider(path: Path, device: str) -> Provider:
    """TensorRT for the model at `path` on cuda or cuda:N; what it does not take runs by CUDA on the same GPU."""
    index = _require_gpu_index(device, "ort-tensorrt")
    folder = str(create_engine_cache_dir(path))
    return Provider(
        "TensorrtExecutionProvider",
        _TENSORRT_MISSING_HINT,
        _TENSORRT_FAILURE_HINT,
        {
            "device_id": index,
            # Neither FP16 nor INT8 is allowed on top: the network is then built strongly typed, as the file says.
            "trt_fp16_enable": "0",
            "trt_int8_enable": "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        },
        extra_providers=(("CUDAExecutionProvider", {"device_id": index}),),
    )


def make_tensorrt_rtx_provider(path: Path, device: str) -> Provider:
    """TensorRT for RTX for the model at `path` on cuda or cuda:N, its plugin registered with ONNX Runtime.

    Raises UnavailableError where the plugin, or the GPU, is missing.
    """
    index = int(_require_gpu_index(device, "ort-tensorrt-rtx"))
    runtime = import_onnxruntime()
    name, found = _find_rtx_devices(runtime)
    if index >= len(found):
        raise UnavailableError(
            f"--device {device}: TensorRT for RTX sees {len(found)} RTX GPUs (Ampere or later) here; {_RTX_FAILURE_HINT}"
        )
    cache = {"nv_runtime_cache_path": str(create_engine_cache_dir(path))}
    return Provider(name, _RTX_MISSING_HINT, _RTX_FAILURE_HINT, cache, devices=(found[index],))


def create_engine_cache_dir(path: Path) -> Path:
    """The folder for this file's engines.

    Named by the file's content: the cache itself knows a model by its name and shape, and would run the old weights
    of one that was exported again.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such model file; hkd-export writes one")
    folder = Path.home() / ".cache" / "hkd-det" / "ort-tensorrt" / hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _require_gpu_index(device: str, backend: str) -> str:
    index = parse_gpu_index(device)
    if index is None:
        raise UsageError(f"--backend {backend} --device {device}: runs on an NVIDIA GPU only; say --device cuda")
    return index


def _find_rtx_devices(ort: Any) -> tuple[str, list[Any]]:
    """The plugin's name and the GPUs that it sees, once it is registered."""
    try:
        plugin = importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")
    except ImportError:
        raise UnavailableError(f"--backend ort-tensorrt-rtx: {_RTX_MISSING_HINT}") from None
    if not hasattr(ort, "register_execution_provider_library"):
        raise UnavailableError(
            f"--backend ort-tensorrt-rtx: ONNX Runtime {ort.__version__} takes no plugins; "
            "pip install 'onnxruntime>=1.24'"
        )
    try:
        _register_provider_library(ort, plugin)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors share no base but this
        raise UnavailableError(
            f"--backend ort-tensorrt-rtx: the plugin does not load: {first_error_line(error)}; {_RTX_FAILURE_HINT}"
        ) from None
    name = plugin.get_ep_name()
    return name, [device for device in ort.get_ep_devices() if device.ep_name == name]


@cache  # a second registration is an error
def _register_provider_library(ort: Any, plugin: Any) -> None:
    ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
