"""The Python packages of TensorRT and CUDA, which are imported on use.

tensorrt: import, version, installation hint and log. cuda-python: memory, streams and graphs of a GPU.
"""

import ctypes
import platform
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import UnavailableError, UsageError, import_package

MIN_VERSION = (10, 0)  # the first with strongly typed networks and a progress monitor; JetPack 6 has 10.3
JETSON_RELEASE_FILE = Path("/etc/nv_tegra_release")
CUDA_INSTALL_HINT = "Run pip install 'hkd-det[tensorrt]' (with CUDA 12, as on JetPack 6: pip install 'cuda-python<13')."


def import_tensorrt() -> Any:
    """Import the tensorrt package.

    Returns:
        The module.

    Raises:
        UnavailableError: If the package is missing, does not load or is too old. The message contains the
            installation command for this machine.
    """
    trt = import_package("tensorrt", "TensorRT", get_install_hint())
    if parse_trt_version(trt) < MIN_VERSION:
        raise UnavailableError(
            f"TensorRT: expected version {MIN_VERSION[0]}.{MIN_VERSION[1]} or later, got {trt.__version__}. "
            "Run the .onnx file with --backend onnxruntime instead."
        )
    return trt


def parse_trt_version(trt: Any) -> tuple[int, int]:
    """Parse the version of the tensorrt package.

    Args:
        trt: The module `tensorrt`.

    Returns:
        Major and minor version.
    """
    major, minor, *_ = trt.__version__.split(".")
    return int(major), int(minor)


def is_jetson() -> bool:
    """Return whether this machine is an NVIDIA Jetson with Jetson Linux."""
    return JETSON_RELEASE_FILE.exists()


def get_install_hint() -> str:
    """Return how to install TensorRT on this machine."""
    return _format_install_hint(platform.system(), platform.machine(), is_jetson())


def _format_install_hint(system: str, machine: str, jetson: bool) -> str:
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if jetson:
        return (
            "On a Jetson it is part of JetPack: sudo apt install python3-libnvinfer. Use the Python of the system, in "
            "a virtual environment made with --system-site-packages "
            f"(this is {python}; JetPack 7 has 3.12, JetPack 6 has 3.10)."
        )
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        return "Run pip install tensorrt (requires the NVIDIA driver). For --dry-run without a GPU: make tensorrt-cpu."
    return (
        f"Engines are built and run on Linux with an NVIDIA GPU, not on {system} {machine}. Use the .onnx file instead."
    )


@dataclass
class TrtLog:
    """Messages of TensorRT that are needed later.

    Attributes:
        errors: All error messages, in order.
        layers: The verbose message that lists the layers of the built engine. Empty if there was none.
    """

    errors: list[str] = field(default_factory=list)
    layers: str = ""

    @property
    def first_error(self) -> str:
        """The first error as one line."""
        return " ".join(self.errors[0].split()) if self.errors else "no reason given"


def make_trt_logger(trt: Any, log: TrtLog) -> Any:
    """Create a TensorRT logger that writes to a `TrtLog` and prints nothing.

    Args:
        trt: The module `tensorrt`.
        log: Receives the messages.

    Returns:
        The `ILogger`.
    """

    class Recorder(trt.ILogger):  # type: ignore[misc]  # the module is untyped
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                log.errors.append(msg)
            elif msg.startswith("Layers:"):
                log.layers = msg

    return Recorder()


@dataclass(frozen=True)
class GpuInfo:
    """Properties of a GPU that an engine depends on.

    Attributes:
        name: Product name as the driver reports it, for example "Orin".
        sm: Compute capability, for example "8.7".
    """

    name: str
    sm: str


class CudaDevice:
    """One GPU: memory, streams and graphs through `cuda.bindings.runtime`.

    Addresses are integers. Streams and graphs are handles of cuda-python. Every method checks the return
    code and raises UnavailableError with CUDA's error text if the call fails.

    Args:
        runtime: The module `cuda.bindings.runtime`.
        index: Number of the GPU, counted from 0.
    """

    def __init__(self, runtime: Any, index: int) -> None:
        self._runtime = runtime
        self._index = index
        count = self._call("cudaGetDeviceCount")
        if index >= count:
            raise UnavailableError(
                f"--device cuda:{index}: this machine has {count} GPU(s), numbered from 0. Set --device cuda:0."
            )
        self.set_current()

    def set_current(self) -> None:
        """Select this GPU for the calling thread. Every new thread starts with GPU 0."""
        self._call("cudaSetDevice", self._index)

    def get_info(self) -> GpuInfo:
        """Return name and compute capability."""
        properties = self._call("cudaGetDeviceProperties", self._index)
        return GpuInfo(properties.name.split(b"\0")[0].decode(), f"{properties.major}.{properties.minor}")

    def read_used_mib(self) -> float:
        """Return the memory in use on this GPU, of all processes, in MiB; with unified memory that of the board."""
        self.set_current()  # the caller may be another thread
        free, total = self._call_all("cudaMemGetInfo")
        return float(total - free) / 2**20

    def allocate_pinned(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        """Allocate page-locked host memory.

        Args:
            size: Number of bytes.

        Returns:
            address: Host address, for `free_pinned` and the copy methods.
            array (uint8 [size]): View of the memory, valid until it is freed.
        """
        address = int(self._call("cudaHostAlloc", size, self._runtime.cudaHostAllocDefault))
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, address: int) -> None:
        """Free page-locked host memory.

        Args:
            address: Result of `allocate_pinned`.
        """
        self._call("cudaFreeHost", address)

    def allocate(self, size: int) -> int:
        """Allocate device memory.

        Args:
            size: Number of bytes.

        Returns:
            Device address.
        """
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        """Free device memory.

        Args:
            address: Result of `allocate`.
        """
        self._call("cudaFree", address)

    def create_stream(self) -> Any:
        """Create a stream that does not synchronize with the default stream.

        Returns:
            Handle of the stream.
        """
        return self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream.

        Args:
            stream: Result of `create_stream`.
        """
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        """Wait until all work in a stream has finished.

        Args:
            stream: Result of `create_stream`.
        """
        self._call("cudaStreamSynchronize", stream)

    def copy_host_to_device(self, device: int, host: int, size: int, stream: Any) -> None:
        """Enqueue a copy from pinned host memory to device memory.

        Args:
            device: Target address.
            host: Source address.
            size: Number of bytes.
            stream: Stream of the copy.
        """
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host, size, kind, stream)

    def copy_device_to_host(self, host: int, device: int, size: int, stream: Any) -> None:
        """Enqueue a copy from device memory to pinned host memory.

        Args:
            host: Target address.
            device: Source address.
            size: Number of bytes.
            stream: Stream of the copy.
        """
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host, device, size, kind, stream)

    def capture_graph(self, stream: Any, function: Callable[[], None]) -> Any:
        """Capture the work that a function enqueues as one graph. The work is recorded, not executed.

        Args:
            stream: Stream that `function` uses. It must be idle.
            function: Function that enqueues the work.

        Returns:
            Handle of the executable graph.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            function()
        except BaseException:
            # End the capture without a check: the exception of `function` is the cause to report.
            error, graph = self._runtime.cudaStreamEndCapture(stream)
            if error == self._runtime.cudaError_t.cudaSuccess:
                self._call("cudaGraphDestroy", graph)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch_graph(self, graph: Any, stream: Any) -> None:
        """Enqueue a captured graph.

        Args:
            graph: Result of `capture_graph`.
            stream: Stream in which the graph runs.
        """
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a captured graph.

        Args:
            graph: Result of `capture_graph`.
        """
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        values = self._call_all(name, *arguments)
        return values[0] if values else None

    def _call_all(self, name: str, *arguments: Any) -> list[Any]:
        """Call a function and return all its values."""
        error, *values = getattr(self._runtime, name)(*arguments)
        if error != self._runtime.cudaError_t.cudaSuccess:
            raise UnavailableError(f"--device cuda:{self._index}: {name}: {self._format_error_and_hint(error)}")
        return values

    def _format_error_and_hint(self, error: Any) -> str:
        """Return the error text of CUDA and a remedy, as sentences."""
        message = self._runtime.cudaGetErrorString(error)[1].decode()
        if error == self._runtime.cudaError_t.cudaErrorInsufficientDriver:
            return (
                f"{message}: the NVIDIA driver is missing or older than this cuda-python requires. "
                f"Install a driver, or a matching package. {CUDA_INSTALL_HINT}"
            )
        return f"{message}. Check the GPU with nvidia-smi, and close other programs that use it."


class HostDeviceBuffer:
    """Pinned host memory and device memory of one tensor.

    Args:
        cuda: The GPU.
        shape: Largest shape of the tensor.
        dtype: NumPy name of the data type.
        stack: Exit stack that frees the memory.

    Attributes:
        host: Address of the host memory.
        device: Address of the device memory.
    """

    def __init__(self, cuda: CudaDevice, shape: tuple[int, ...], dtype: str, stack: ExitStack) -> None:
        self._dtype = np.dtype(dtype)
        size = prod(shape) * self._dtype.itemsize
        self.host, self._bytes = cuda.allocate_pinned(size)
        stack.callback(cuda.free_pinned, self.host)
        self.device = cuda.allocate(size)
        stack.callback(cuda.free, self.device)

    def compute_num_bytes(self, shape: tuple[int, ...]) -> int:
        """Compute the size of a tensor.

        Args:
            shape: Shape of the tensor.

        Returns:
            Number of bytes.
        """
        return prod(shape) * self._dtype.itemsize

    def get_host_array(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return a view of the host memory. It is valid until the request is closed.

        Args:
            shape: Shape of the array.

        Returns:
            The array.
        """
        return self._bytes[: self.compute_num_bytes(shape)].view(self._dtype).reshape(shape)


def open_cuda(device: str) -> CudaDevice:
    """Select a GPU.

    Args:
        device: "cuda" or "cuda:N".

    Returns:
        The GPU, selected for the calling thread.

    Raises:
        UsageError: If `device` has another form.
        UnavailableError: If cuda-python, a driver or the GPU is missing.
    """
    match = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if not match:
        raise UsageError(
            f"--device {device}: expected cuda or cuda:N, because an engine runs on a GPU only. Set --device cuda."
        )
    runtime = import_package("cuda.bindings.runtime", "cuda-python", CUDA_INSTALL_HINT)
    try:
        return CudaDevice(runtime, int(match[1] or 0))
    except RuntimeError as error:  # cuda-python 12.6 without the library of the driver
        raise UnavailableError(f"--device {device}: the NVIDIA driver is missing: {error}. Install it.") from None
