"""ONNX Runtime backend, with its CUDA, TensorRT and TensorRT for RTX execution providers.

Both TensorRT providers build an engine in the precision of the file when they open a model for the first time. They
cache the engine for later runs.
"""

import importlib
import platform
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import OUTPUT_DTYPES, Backend, RuntimeOutputs, make_closed_error, validate_io
from hkd_deploy.model_metadata import make_tensor_info
from hkd_det.errors import DataError, UnavailableError, UsageError, first_error_line
from hkd_det.files import file_sha256
from hkd_det.onnxrt.session import Provider, import_onnxruntime, open_session, parse_gpu_index

X86_MACHINES = ("x86_64", "AMD64")

_TENSORRT_MISSING_HINT = (
    "the installed ONNX Runtime has no TensorRT provider. Run pip uninstall -y onnxruntime && "
    "pip install 'hkd-det[gpu]' tensorrt (on Jetson, install NVIDIA's onnxruntime-gpu wheel)."
)
_TENSORRT_FAILURE_HINT = (
    "TensorRT, CUDA or cuDNN is missing, or onnxruntime-gpu was built for another version. "
    "Try pip install 'onnxruntime-gpu[cuda,cudnn]' tensorrt."
)
_RTX_MISSING_HINT = (
    "TensorRT for RTX is not installed. For an RTX GPU of the Ampere generation or later: "
    "pip uninstall -y onnxruntime-gpu && pip install 'onnxruntime>=1.24' onnxruntime-ep-nv-tensorrt-rtx."
)
_RTX_FAILURE_HINT = (
    "Check that the driver supports the CUDA version of the plugin (onnxruntime-ep-nv-tensorrt-rtx-cu12 or -cu13)."
)


class OnnxRuntimeBackend(Backend):
    """An ONNX Runtime session. Several threads may call `run` at the same time.

    Args:
        path: The ONNX file.
        device: Device of the session: cpu, cuda or cuda:N.
        session: The opened `InferenceSession`.

    Attributes:
        metadata: Metadata strings of the file.
        batch: Fixed batch size. None if the batch dimension is free.
        input_hw: Fixed (height, width) of the input, pixels. None if the size is free.
    """

    def __init__(self, path: Path, device: str, session: Any) -> None:
        self.path = path
        self.device = device
        self.metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
        inputs, outputs = (
            [make_tensor_info(node.name, node.type, node.shape) for node in nodes]
            for nodes in (session.get_inputs(), session.get_outputs())
        )
        self.batch, self.input_hw = validate_io(path, self.metadata, inputs, outputs)
        self._output_names = list(OUTPUT_DTYPES)
        self._session: Any | None = session

    def run(self, images: NDArray[np.uint8]) -> RuntimeOutputs:
        """Run inference on a batch. See `Backend.run`."""
        session = self._session
        if session is None:
            raise make_closed_error(self.path)
        boxes, scores, count = session.run(self._output_names, {"images": images})
        return boxes, scores, count

    def close(self) -> None:
        """Release the memory of the model."""
        self._session = None


@contextmanager
def open_onnx_runtime(
    path: Path, device: str = "cpu", threads: int | None = None, provider: Provider | None = None
) -> Iterator[OnnxRuntimeBackend]:
    """Open an ONNX file with ONNX Runtime.

    Args:
        path: The ONNX file.
        device: cpu, cuda or cuda:N.
        threads: Number of CPU threads per operator. None for one thread per physical core.
        provider: Execution provider. None for the default provider of the device.

    Yields:
        The opened model.

    Raises:
        UsageError: The device or the number of threads is invalid.
        DataError: The file is not a model of `hkd-export`.
        UnavailableError: ONNX Runtime or the device is missing.
    """
    session = open_session(path, device, threads, provider, prefers_float_int8(device))
    with closing(OnnxRuntimeBackend(path, device, session)) as backend:
        yield backend


def prefers_float_int8(device: str) -> bool:
    """Return whether INT8 files of hkd-export run faster with float operators and folded weights.

    The fast INT8 kernels on x86 expect unsigned zero points. The files have signed zero points, as TensorRT requires.

    Args:
        device: cpu, cuda or cuda:N.
    """
    return device == "cpu" and platform.machine() in X86_MACHINES


def make_tensorrt_provider(path: Path, device: str) -> Provider:
    """Configure the TensorRT execution provider. Operators that it does not support run on CUDA.

    Args:
        path: The ONNX file.
        device: cuda or cuda:N.

    Returns:
        The provider with its options.

    Raises:
        UsageError: `device` is not a GPU.
        DataError: The file does not exist.
    """
    index = _require_gpu_index(device, "ort-tensorrt")
    cache_dir = str(create_engine_cache_dir(path))
    return Provider(
        "TensorrtExecutionProvider",
        _TENSORRT_MISSING_HINT,
        _TENSORRT_FAILURE_HINT,
        {
            "device_id": index,
            # Without FP16 and INT8 flags the network is strongly typed: TensorRT keeps the precision of the file.
            "trt_fp16_enable": "0",
            "trt_int8_enable": "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": cache_dir,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": cache_dir,
        },
        extra_providers=(("CUDAExecutionProvider", {"device_id": index}),),
    )


def make_tensorrt_rtx_provider(path: Path, device: str) -> Provider:
    """Configure the TensorRT for RTX execution provider and register its plugin with ONNX Runtime.

    Args:
        path: The ONNX file.
        device: cuda or cuda:N.

    Returns:
        The provider with its options and its device.

    Raises:
        UsageError: `device` is not a GPU.
        DataError: The file does not exist.
        UnavailableError: The plugin or the GPU is missing.
    """
    index = int(_require_gpu_index(device, "ort-tensorrt-rtx"))
    ort = import_onnxruntime()
    name, devices = _find_rtx_devices(ort)
    if index >= len(devices):
        raise UnavailableError(
            f"--device {device}: TensorRT for RTX supports {len(devices)} GPUs of this machine "
            f"(RTX, Ampere or later required). Otherwise, {_RTX_FAILURE_HINT}"
        )
    options = {"nv_runtime_cache_path": str(create_engine_cache_dir(path))}
    return Provider(name, _RTX_MISSING_HINT, _RTX_FAILURE_HINT, options, devices=(devices[index],))


def create_engine_cache_dir(path: Path) -> Path:
    """Create the directory for the cached engines of a model file.

    The hash of the file names the directory. The cache of ONNX Runtime identifies a model by name and shape only, and
    would run old weights after a second export.

    Args:
        path: The ONNX file.

    Returns:
        The directory, below `~/.cache/hkd-det`.

    Raises:
        DataError: The file does not exist.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such model file. Create it with hkd-export.")
    cache_dir = Path.home() / ".cache" / "hkd-det" / "ort-tensorrt" / file_sha256(path)[:16]
    cache_dir.mkdir(parents=True, exist_ok=True)
    return cache_dir


def _require_gpu_index(device: str, backend: str) -> str:
    index = parse_gpu_index(device)
    if index is None:
        raise UsageError(f"--backend {backend} --device {device}: expected an NVIDIA GPU. Set --device cuda.")
    return index


def _find_rtx_devices(ort: Any) -> tuple[str, list[Any]]:
    """Register the plugin. Return its provider name and its devices."""
    try:
        plugin = importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")
    except ImportError:
        raise UnavailableError(f"--backend ort-tensorrt-rtx: {_RTX_MISSING_HINT}") from None
    if not hasattr(ort, "register_execution_provider_library"):
        raise UnavailableError(
            f"--backend ort-tensorrt-rtx: ONNX Runtime {ort.__version__} does not support plugins. "
            "Run pip install 'onnxruntime>=1.24'."
        )
    try:
        _register_provider_library(ort, plugin)
    except Exception as error:  # noqa: BLE001 - the only common base class of ONNX Runtime errors
        raise UnavailableError(
            f"--backend ort-tensorrt-rtx: the plugin does not load: {first_error_line(error)}. {_RTX_FAILURE_HINT}"
        ) from None
    name = plugin.get_ep_name()
    return name, [device for device in ort.get_ep_devices() if device.ep_name == name]


@cache  # a second registration raises an error
def _register_provider_library(ort: Any, plugin: Any) -> None:
    ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
