"""ONNX Runtime: open a model file on the device that was asked for, or fail.

ONNX Runtime's two TensorRT providers: TensorRT itself, and TensorRT for RTX, a plugin of its own.

Both build an engine when a model is first opened, in the precision of the file, and keep it for the next time.
"""

import importlib
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import OUTPUT_DTYPES, RuntimeOutputs, TensorInfo, make_closed_error, validate_io
from hkd_det.errors import DataError, UnavailableError, UsageError, first_error_line
from hkd_det.files import file_sha256
from hkd_det.onnxrt.session import Provider, import_onnxruntime, open_session, parse_gpu_index

X86_MACHINES = ("x86_64", "AMD64")


ORT_DTYPES = {
    "tensor(uint8)": "uint8",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


class OnnxRuntimeBackend:
    """An open session; several threads may call `run`, which keeps nothing.

    metadata: the file's own strings. batch: pictures a call takes, None for any number.
    input_hw: (height, width) pixels, None where the graph leaves them free.
    """

    def __init__(self, path: Path, device: str, session: Any) -> None:
        self.path = path
        self.device = device
        self.metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
        self.batch, self.input_hw = validate_io(
            path, self.metadata, _read_session_io(session.get_inputs()), _read_session_io(session.get_outputs())
        )
        self._output_names = list(OUTPUT_DTYPES)
        self._session: Any | None = session

    def run(self, images: NDArray[np.uint8]) -> RuntimeOutputs:
        """(B, H, W, 3) uint8 RGB to boxes [B, K, 4] in pixels of them, scores [B, K], valid rows [B]."""
        session = self._session
        if session is None:
            raise make_closed_error(self.path)
        boxes, scores, count = session.run(self._output_names, {"images": images})
        return boxes, scores, count

    def close(self) -> None:
        """Give the model's memory back."""
        self._session = None


@contextmanager
def open_onnx_runtime(
    path: Path, device: str = "cpu", threads: int | None = None, provider: Provider | None = None
) -> Iterator[OnnxRuntimeBackend]:
    """Open an ONNX file on `device`: cpu, cuda or cuda:N.

    threads: CPU threads inside one operator; None leaves it to ONNX Runtime (one a physical core).
    provider: the execution provider, by default ONNX Runtime's own for the device.
    Raises UsageError for a device or thread count that makes no sense, UnavailableError if ONNX
    Runtime or the device is not there, DataError if the file is none of ours.
    """
    # ONNX Runtime's quick INT8 kernels for x86 want unsigned zero points, our files have the 0 that TensorRT wants:
    # what it would make of them is slower than floats with the weights folded once.
    plain_qdq = device == "cpu" and platform.machine() in X86_MACHINES
    opened = OnnxRuntimeBackend(path, device, open_session(path, device, threads, provider, plain_qdq))
    try:
        yield opened
    finally:
        opened.close()


def _read_session_io(nodes: Sequence[Any]) -> list[TensorInfo]:
    return [
        TensorInfo(
            value.name,
            ORT_DTYPES.get(value.type, value.type),
            tuple(side if isinstance(side, int) else None for side in value.shape),
        )
        for value in nodes
    ]


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
    folder = Path.home() / ".cache" / "hkd-det" / "ort-tensorrt" / file_sha256(path)[:16]
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
