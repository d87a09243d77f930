"""TensorRT: open an engine on the GPU it was built for, or fail.

Pinned host memory, device memory, one stream and one execution context make a `Slot`; where the input's shape is fixed,
its copies and kernels are one CUDA graph.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.trt.bindings import TrtLog, import_tensorrt, make_trt_logger
from hkd_deploy.trt.cuda import CudaDevice, open_cuda
from hkd_deploy.trt.engine_info import EngineInfo, check_compatibility, read_engine_info, read_plan
from hkd_det.errors import DataError, UnavailableError

INPUT = ("images", "uint8")
OUTPUT_DTYPES = {"boxes": "float32", "scores": "float32", "count": "int64"}

RuntimeOutputs = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
TensorShape = tuple[int, ...]


@dataclass(frozen=True)
class LoadedEngine:
    """A deserialised engine. smallest, largest: shapes of `images` it runs from and to; equal where it is fixed.

    log: what TensorRT says goes wrong.
    """

    path: Path
    engine: Any
    log: TrtLog
    min_shape: TensorShape
    max_shape: TensorShape


class HostDeviceBuffer:
    """Pinned host memory and device memory for a tensor of at most `shape`."""

    def __init__(self, cuda: CudaDevice, shape: TensorShape, dtype: str, stack: ExitStack) -> None:
        self._dtype = np.dtype(dtype)
        size = prod(shape) * self._dtype.itemsize
        self.host, self._bytes = cuda.allocate_pinned(size)
        stack.callback(cuda.free_pinned, self.host)
        self.device = cuda.allocate(size)
        stack.callback(cuda.free, self.device)

    def num_bytes(self, shape: TensorShape) -> int:
        """Bytes of a tensor of `shape`."""
        return prod(shape) * self._dtype.itemsize

    def view(self, shape: TensorShape) -> NDArray[Any]:
        """The host memory as an array of `shape`; valid until the slot is closed."""
        return self._bytes[: self.num_bytes(shape)].view(self._dtype).reshape(shape)


class InferRequest:
    """The way of one batch through the GPU: `start` returns at once, `finish` waits. For one batch at a time."""

    def __init__(self, cuda: CudaDevice, loaded_engine: LoadedEngine, use_cuda_graph: bool) -> None:
        self._cuda, self._loaded_engine = cuda, loaded_engine
        self._cuda_graph: Any | None = None
        cuda.set_current()
        with ExitStack() as undo:
            self._context = loaded_engine.engine.create_execution_context()
            if self._context is None:
                raise UnavailableError(f"{loaded_engine.path}: the GPU has no memory left for it")
            self._stream = cuda.create_stream()
            undo.callback(cuda.destroy_stream, self._stream)
            self._set_input_shape(loaded_engine.max_shape)
            self._input_buffer = HostDeviceBuffer(cuda, loaded_engine.max_shape, INPUT[1], undo)
            self._output_buffers = {
                name: HostDeviceBuffer(cuda, self._shapes[name], OUTPUT_DTYPES[name], undo) for name in OUTPUT_DTYPES
            }
            undo.callback(self._release)
            undo.callback(cuda.synchronize, self._stream)  # undone early: nothing may be under way when memory is freed
            undo.callback(cuda.set_current)  # undone first: any thread may close
            for name, buffer in {INPUT[0]: self._input_buffer, **self._output_buffers}.items():
                self._check_call(self._context.set_tensor_address(name, buffer.device), f"set_tensor_address({name})")
            if use_cuda_graph and loaded_engine.min_shape == loaded_engine.max_shape:
                self._enqueue()  # a first run: what TensorRT puts off until then can't be captured
                cuda.synchronize(self._stream)
                self._cuda_graph = cuda.capture_graph(self._stream, self._enqueue)
            self._exit_stack = undo.pop_all()

    def start_async(self, images: NDArray[np.uint8]) -> None:
        """Set the GPU to work on [B, H, W, 3] uint8 RGB.

        Raises ValueError for what no engine takes, DataError for a batch or a size outside this one's profile.
        """
        self._check_input(images)
        self._cuda.set_current()
        if images.shape != self._shape:
            self._set_input_shape(images.shape)
        self._input_buffer.view(self._shape)[...] = images
        if self._cuda_graph is None:
            self._enqueue()
        else:
            self._cuda.launch_graph(self._cuda_graph, self._stream)

    def wait(self) -> RuntimeOutputs:
        """Wait, and give the answer as arrays of their own."""
        self._cuda.set_current()
        self._cuda.synchronize(self._stream)
        boxes, scores, count = (buffer.view(self._shapes[name]).copy() for name, buffer in self._output_buffers.items())
        return boxes, scores, count

    def close(self) -> None:
        """Wait for what runs, and give everything back."""
        self._exit_stack.close()

    def _release(self) -> None:
        """Of the graph and the context, which use the memory and the stream."""
        graph, self._cuda_graph, self._context = self._cuda_graph, None, None
        if graph is not None:
            self._cuda.destroy_graph(graph)

    def _enqueue(self) -> None:
        stream = self._stream
        self._cuda.copy_host_to_device(
            self._input_buffer.device, self._input_buffer.host, self._input_buffer.num_bytes(self._shape), stream
        )
        self._check_call(self._context.execute_async_v3(int(stream)), "execute_async_v3")
        for name, buffer in self._output_buffers.items():
            self._cuda.copy_device_to_host(buffer.host, buffer.device, buffer.num_bytes(self._shapes[name]), stream)

    def _set_input_shape(self, shape: TensorShape) -> None:
        self._check_call(self._context.set_input_shape(INPUT[0], shape), f"set_input_shape{shape}")
        self._shape = shape
        self._shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in OUTPUT_DTYPES}

    def _check_input(self, images: NDArray[np.uint8]) -> None:
        low, high = self._loaded_engine.min_shape, self._loaded_engine.max_shape
        said = (
            f"{self._loaded_engine.path} takes uint8 {low if low == high else f'{low} to {high}'}, "
            f"not {images.dtype} {images.shape}"
        )
        if images.dtype != np.uint8 or images.ndim != len(low) or images.shape[3] != low[3]:
            raise ValueError(said)
        if not all(a <= n <= b for a, n, b in zip(low, images.shape, high, strict=True)):
            raise DataError(f"{said}; build it for that: hkd-export MODEL.onnx --trt --trt-profile MIN,OPT,MAX")

    def _check_call(self, succeeded: bool, call: str) -> None:
        if not succeeded:
            raise UnavailableError(
                f"{self._loaded_engine.path}: TensorRT's {call} failed: {self._loaded_engine.log.first_error}"
            )


class AsyncQueue:
    """Batches under way on the GPU, answered in the order they were submitted. For one thread."""

    def __init__(self, requests: list[InferRequest]) -> None:
        self._idle_requests, self._active_requests = deque(requests), deque[InferRequest]()

    def __len__(self) -> int:
        """Batches submitted and not yet collected."""
        return len(self._active_requests)

    def submit(self, images: NDArray[np.uint8]) -> None:
        """Set off [B, H, W, 3] uint8 RGB and return. Raises ValueError if every slot is in flight: collect first."""
        if not self._idle_requests:
            raise ValueError(f"{len(self._active_requests)} batches are in flight already; collect one first")
        self._idle_requests[0].start_async(images)
        self._active_requests.append(self._idle_requests.popleft())

    def collect(self) -> RuntimeOutputs:
        """Wait for the oldest batch; its boxes, scores and count. Raises ValueError if nothing is in flight."""
        if not self._active_requests:
            raise ValueError("nothing is in flight; submit first")
        slot = self._active_requests.popleft()
        self._idle_requests.append(slot)
        return slot.wait()


class TensorRTBackend:
    """An open engine. Several threads may call `run`; they take turns.

    metadata: the ONNX file's own strings. input_hw: (height, width) pixels, None where free. batch: pictures a call
    takes, None for any number up to `max_batch`.
    """

    def __init__(
        self,
        loaded_engine: LoadedEngine,
        device: str,
        engine_info: EngineInfo,
        make_request: Callable[[], InferRequest],
    ) -> None:
        self.path = loaded_engine.path
        self.device = device
        self.engine_info = engine_info
        self.metadata = engine_info.metadata
        (low, *low_hw), (high, *high_hw) = loaded_engine.min_shape[:3], loaded_engine.max_shape[:3]
        self.input_hw = (high_hw[0], high_hw[1]) if low_hw == high_hw else None
        self.max_batch = high
        self.batch = high if low == high else None
        self._make_request: Callable[[], InferRequest] | None = make_request
        self._lock = threading.Lock()
        self._request = make_request()

    def run(self, images: NDArray[np.uint8]) -> RuntimeOutputs:
        """(B, H, W, 3) uint8 RGB, letterboxed, to boxes [B, K, 4] in input pixels, scores [B, K], valid rows [B]."""
        with self._lock:
            self._check_open()
            self._request.start_async(images)
            return self._request.wait()

    @contextmanager
    def open_async_queue(self, num_requests: int = 2) -> Iterator[AsyncQueue]:
        """A queue that lets `slots` batches be under way at once, each with memory of its own."""
        if num_requests < 1:
            raise ValueError(f"{num_requests} slots: at least one")
        new_slot = self._check_open()
        with ExitStack() as undo:
            made = []
            for _ in range(num_requests):
                made.append(new_slot())
                undo.callback(made[-1].close)
            yield AsyncQueue(made)

    def close(self) -> None:
        """Give the model's memory back."""
        with self._lock:
            if self._make_request is not None:
                self._make_request = None
                self._request.close()

    def _check_open(self) -> Callable[[], InferRequest]:
        if self._make_request is None:
            raise ValueError(f"{self.path}: this model has been closed; call it inside its `with` block")
        return self._make_request


@contextmanager
def open_tensorrt(path: Path, device: str = "cuda", use_cuda_graph: bool = True) -> Iterator[TensorRTBackend]:
    """Open an engine of hkd-export on `device`: cuda or cuda:N.

    cuda_graph: launch a fixed shape as one graph; never for an engine on DLA, or of a free shape.
    Opening runs code inside the file: only open engines you trust. Raises UsageError, DataError or
    UnavailableError; nothing is deserialised unless the sidecar says it was built for this machine.
    """
    sidecar = read_engine_info(path)
    trt, cuda = import_tensorrt(), open_cuda(device)
    check_compatibility(path, sidecar, trt.__version__, cuda.get_info())
    plan = read_plan(path, sidecar)
    log = TrtLog()
    runtime = trt.Runtime(make_trt_logger(trt, log))
    runtime.engine_host_code_allowed = sidecar.version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise DataError(f"{path}: TensorRT {trt.__version__} does not open it: {log.first_error}")
    opened = _validate_engine_io(trt, engine, path, log)
    graph = use_cuda_graph and sidecar.dla is None
    running = TensorRTBackend(opened, device, sidecar, lambda: InferRequest(cuda, opened, graph))
    try:
        yield running
    finally:
        running.close()


def _validate_engine_io(trt: Any, engine: Any, path: Path, log: TrtLog) -> LoadedEngine:
    """The engine, if its inputs and outputs are hkd-export's."""
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        found[name] = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
    if found != dict([INPUT]) | OUTPUT_DTYPES:
        raise DataError(f"{path}: not an engine of hkd-export: expected {dict([INPUT]) | OUTPUT_DTYPES}, found {found}")
    shape = tuple(engine.get_tensor_shape(INPUT[0]))
    if len(shape) != 4 or shape[3] != 3:
        raise DataError(f"{path}: not an engine of hkd-export: images is {shape}, not (B, H, W, 3)")
    if -1 not in shape:
        return LoadedEngine(path, engine, log, shape, shape)
    smallest, _, largest = (tuple(dims) for dims in engine.get_tensor_profile_shape(INPUT[0], 0))
    return LoadedEngine(path, engine, log, smallest, largest)
