"""CUDA's runtime through cuda-python: memory, streams, graphs. Every call is checked; there is no logic here.

The tensorrt package: there and new enough, or how to get it on this machine.
"""

import ctypes
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import UnavailableError, UsageError, import_package

CUDA_INSTALL_HINT = "pip install 'hkd-det[tensorrt]' (with CUDA 12, as on JetPack 6: pip install 'cuda-python<13')"


@dataclass(frozen=True)
class GpuInfo:
    """What an engine is bound to. sm: compute capability, "8.7" on Orin."""

    name: str
    sm: str


class CudaDevice:
    """One GPU. Addresses are plain integers; streams and graphs are cuda-python's handles.

    Every method raises UnavailableError with CUDA's own words if a call fails.
    """

    def __init__(self, runtime: Any, device: int) -> None:
        self._runtime = runtime
        self._device = device
        count = self._call("cudaGetDeviceCount")
        if device >= count:
            raise UnavailableError(f"--device cuda:{device}: this machine has {count} GPU(s), counted from 0")
        self.set_current()

    def set_current(self) -> None:
        """Make this the GPU of the calling thread; each thread starts with the first."""
        self._call("cudaSetDevice", self._device)

    def get_info(self) -> GpuInfo:
        """Its name and compute capability."""
        found = self._call("cudaGetDeviceProperties", self._device)
        return GpuInfo(found.name.split(b"\0")[0].decode(), f"{found.major}.{found.minor}")

    def allocate_pinned(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        """Page-locked host memory of `size` bytes: its address and a view of it."""
        address = int(self._call("cudaHostAlloc", size, self._runtime.cudaHostAllocDefault))
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, address: int) -> None:
        """Give page-locked memory back."""
        self._call("cudaFreeHost", address)

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def create_stream(self) -> Any:
        """A stream that waits for no other."""
        return self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def destroy_stream(self, stream: Any) -> None:
        """Give a stream back."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        """Until all work of the stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def copy_host_to_device(self, device: int, host: int, size: int, stream: Any) -> None:
        """Host to device, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host, size, kind, stream)

    def copy_device_to_host(self, host: int, device: int, size: int, stream: Any) -> None:
        """Device to host, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host, device, size, kind, stream)

    def capture_graph(self, stream: Any, function: Callable[[], None]) -> Any:
        """The calls that `work` makes on the stream as one graph; they are recorded, not run."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            function()
        except BaseException:
            error, graph = self._runtime.cudaStreamEndCapture(stream)  # what went wrong in `work` is what to tell
            if error == self._runtime.cudaError_t.cudaSuccess:
                self._call("cudaGraphDestroy", graph)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch_graph(self, graph: Any, stream: Any) -> None:
        """Run a captured graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Give a captured graph back."""
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._runtime, name)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            raise UnavailableError(f"--device cuda:{self._device}: {name}: {self._format_error(error)}")
        return values[0] if values else None

    def _format_error(self, error: Any) -> str:
        words = self._runtime.cudaGetErrorString(error)[1].decode()
        if error == self._runtime.cudaError_t.cudaErrorInsufficientDriver:
            return f"{words}: no NVIDIA driver here, or one older than this cuda-python; {CUDA_INSTALL_HINT}"
        return words


def open_cuda(device: str) -> CudaDevice:
    """The GPU named by `device`: cuda or cuda:N. Raises UsageError or UnavailableError."""
    match = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if not match:
        raise UsageError(f"--device {device}: an engine runs on a GPU: expected cuda or cuda:0")
    runtime = import_package("cuda.bindings.runtime", "cuda-python", CUDA_INSTALL_HINT)
    try:
        return CudaDevice(runtime, int(match[1] or 0))
    except RuntimeError as error:  # cuda-python 12.6, where the driver's library is missing
        raise UnavailableError(f"--device {device}: no NVIDIA driver here: {error}") from None


MIN_VERSION = (10, 0)  # strongly typed networks and the progress monitor; JetPack 6 has 10.3


JETSON_RELEASE_FILE = Path("/etc/nv_tegra_release")


def import_tensorrt() -> Any:
    """The module. Raises UnavailableError where it is missing, broken or too old, saying what to do."""
    trt = import_package("tensorrt", "TensorRT", install_hint())
    if parse_trt_version(trt) < MIN_VERSION:
        raise UnavailableError(
            f"TensorRT {trt.__version__} is too old: from {MIN_VERSION[0]}.{MIN_VERSION[1]} on (JetPack 6); "
            "here the .onnx file runs with --backend onnxruntime"
        )
    return trt


def parse_trt_version(trt: Any) -> tuple[int, int]:
    """(major, minor) of the module."""
    major, minor, *_ = trt.__version__.split(".")
    return int(major), int(minor)


def is_jetson() -> bool:
    """Whether this is an NVIDIA Jetson with its own Linux."""
    return JETSON_RELEASE_FILE.exists()


def install_hint() -> str:
    """What to do for TensorRT on this machine."""
    return _format_install_hint(platform.system(), platform.machine(), is_jetson())


def _format_install_hint(system: str, machine: str, jetson: bool) -> str:
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if jetson:
        return (
            "on a Jetson it comes with JetPack: sudo apt install python3-libnvinfer, and a virtual environment of the "
            "system's own Python, made with --system-site-packages "
            f"(this is {python}; JetPack 7 has 3.12, JetPack 6 3.10)"
        )
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        return "pip install tensorrt (needs NVIDIA's driver); to check a file without a GPU: make tensorrt-cpu"
    return f"engines are built and run on Linux with an NVIDIA GPU, not on {system} {machine}; use the .onnx file here"
