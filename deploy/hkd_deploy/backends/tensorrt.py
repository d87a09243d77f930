"""TensorRT backend. It runs an engine on the GPU that the engine was built for.

An `InferRequest` runs one batch. It owns pinned host memory, device memory, a stream and an execution context. If the
input shape is fixed, its copies and kernels form one CUDA graph.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import INPUT_DTYPE, INPUT_NAME, OUTPUT_DTYPES, Backend, RuntimeOutputs, make_closed_error
from hkd_deploy.trt.bindings import CudaDevice, HostDeviceBuffer, TrtLog, import_tensorrt, make_trt_logger, open_cuda
from hkd_deploy.trt.engine_info import EngineInfo, check_compatibility, read_engine_info, read_plan
from hkd_det.errors import DataError, UnavailableError

TensorShape = tuple[int, ...]


@dataclass(frozen=True)
class LoadedEngine:
    """A deserialized engine.

    Attributes:
        path: The engine file.
        engine: The TensorRT `ICudaEngine`.
        log: Errors that TensorRT reported.
        min_shape: Smallest accepted shape of `images`.
        max_shape: Largest accepted shape of `images`. Equal to `min_shape` if the shape is fixed.
    """

    path: Path
    engine: Any
    log: TrtLog
    min_shape: TensorShape
    max_shape: TensorShape


class InferRequest:
    """Execution of one batch at a time. `start_async` returns immediately; `wait` returns the outputs.

    Args:
        cuda: The GPU.
        loaded_engine: The engine.
        use_cuda_graph: True to launch a fixed input shape as one CUDA graph.

    Raises:
        UnavailableError: The GPU has too little free memory, or TensorRT failed.
    """

    def __init__(self, cuda: CudaDevice, loaded_engine: LoadedEngine, use_cuda_graph: bool) -> None:
        self._cuda, self._loaded_engine = cuda, loaded_engine
        self._cuda_graph: Any | None = None
        cuda.set_current()
        with ExitStack() as stack:
            self._context = loaded_engine.engine.create_execution_context()
            if self._context is None:
                raise UnavailableError(
                    f"{loaded_engine.path}: not enough free GPU memory for an execution context. Close other programs."
                )
            self._stream = cuda.create_stream()
            stack.callback(cuda.destroy_stream, self._stream)
            self._set_input_shape(loaded_engine.max_shape)
            self._input_buffer = HostDeviceBuffer(cuda, loaded_engine.max_shape, INPUT_DTYPE, stack)
            self._output_buffers = {
                name: HostDeviceBuffer(cuda, self._shapes[name], OUTPUT_DTYPES[name], stack) for name in OUTPUT_DTYPES
            }
            # Callbacks run in reverse order: select the GPU for this thread, wait for the stream, free the memory.
            stack.callback(self._release)
            stack.callback(cuda.synchronize, self._stream)
            stack.callback(cuda.set_current)
            for name, buffer in {INPUT_NAME: self._input_buffer, **self._output_buffers}.items():
                self._check_call(self._context.set_tensor_address(name, buffer.device), f"set_tensor_address({name})")
            if use_cuda_graph and loaded_engine.min_shape == loaded_engine.max_shape:
                self._enqueue()  # the first run does lazy initialization, which cannot be captured
                cuda.synchronize(self._stream)
                self._cuda_graph = cuda.capture_graph(self._stream, self._enqueue)
            self._exit_stack = stack.pop_all()

    def start_async(self, images: NDArray[np.uint8]) -> None:
        """Start inference on a batch.

        Args:
            images (uint8[B, H, W, 3]): RGB, letterboxed.

        Raises:
            ValueError: Data type or number of dimensions is wrong.
            DataError: Batch or size is outside the optimization profile of the engine.
        """
        self._check_input(images)
        self._cuda.set_current()
        if images.shape != self._shape:
            self._set_input_shape(images.shape)
        self._input_buffer.get_host_array(self._shape)[...] = images
        if self._cuda_graph is None:
            self._enqueue()
        else:
            self._cuda.launch_graph(self._cuda_graph, self._stream)

    def wait(self) -> RuntimeOutputs:
        """Wait for the batch and return copies of its outputs.

        Returns:
            boxes (float32[B, K, 4]): xyxy, input pixels.
            scores (float32[B, K]): 0 to 1, descending.
            count (int64[B]): Number of valid rows per image.
        """
        self._cuda.set_current()
        self._cuda.synchronize(self._stream)
        boxes, scores, count = (
            buffer.get_host_array(self._shapes[name]).copy() for name, buffer in self._output_buffers.items()
        )
        return boxes, scores, count

    def close(self) -> None:
        """Wait for the running batch and release all memory."""
        self._exit_stack.close()

    def _release(self) -> None:
        """Destroy the CUDA graph and the context, which use the memory and the stream."""
        graph, self._cuda_graph, self._context = self._cuda_graph, None, None
        if graph is not None:
            self._cuda.destroy_graph(graph)

    def _enqueue(self) -> None:
        stream = self._stream
        num_bytes = self._input_buffer.compute_num_bytes(self._shape)
        self._cuda.copy_host_to_device(self._input_buffer.device, self._input_buffer.host, num_bytes, stream)
        self._check_call(self._context.execute_async_v3(int(stream)), "execute_async_v3")
        for name, buffer in self._output_buffers.items():
            num_bytes = buffer.compute_num_bytes(self._shapes[name])
            self._cuda.copy_device_to_host(buffer.host, buffer.device, num_bytes, stream)

    def _set_input_shape(self, shape: TensorShape) -> None:
        self._check_call(self._context.set_input_shape(INPUT_NAME, shape), f"set_input_shape{shape}")
        self._shape = shape
        self._shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in OUTPUT_DTYPES}

    def _check_input(self, images: NDArray[np.uint8]) -> None:
        path, low, high = self._loaded_engine.path, self._loaded_engine.min_shape, self._loaded_engine.max_shape
        expected = f"expected uint8 {low if low == high else f'{low} to {high}'}, got {images.dtype} {images.shape}"
        if images.dtype != np.uint8 or images.ndim != len(low) or images.shape[3] != low[3]:
            raise ValueError(f"{path}: {expected}.")
        if not all(a <= n <= b for a, n, b in zip(low, images.shape, high, strict=True)):
            hint = "Build a larger engine: hkd-export MODEL.onnx --trt --trt-profile MIN,OPT,MAX."
            raise DataError(f"{path}: {expected}. {hint}")

    def _check_call(self, succeeded: bool, call: str) -> None:
        if not succeeded:
            engine = self._loaded_engine
            raise UnavailableError(
                f"{engine.path}: TensorRT {call} failed: {engine.log.first_error}. "
                "Close other programs that use the GPU, or build the engine again."
            )


class AsyncQueue:
    """Batches that run on the GPU at the same time. Outputs are returned in the order of submission.

    Only one thread may use a queue.

    Args:
        requests: Idle requests. Their number limits the batches in flight.
    """

    def __init__(self, requests: list[InferRequest]) -> None:
        self._idle_requests, self._active_requests = deque(requests), deque[InferRequest]()

    def __len__(self) -> int:
        """Return the number of batches that are submitted and not collected."""
        return len(self._active_requests)

    def submit(self, images: NDArray[np.uint8]) -> None:
        """Start inference on a batch and return immediately.

        Args:
            images (uint8[B, H, W, 3]): RGB, letterboxed.

        Raises:
            ValueError: All requests are in flight.
        """
        if not self._idle_requests:
            raise ValueError(f"{len(self._active_requests)} batches are in flight. Call collect() first.")
        self._idle_requests[0].start_async(images)
        self._active_requests.append(self._idle_requests.popleft())

    def collect(self) -> RuntimeOutputs:
        """Wait for the oldest batch and return its outputs.

        Returns:
            boxes (float32[B, K, 4]): xyxy, input pixels.
            scores (float32[B, K]): 0 to 1, descending.
            count (int64[B]): Number of valid rows per image.

        Raises:
            ValueError: No batch is in flight.
        """
        if not self._active_requests:
            raise ValueError("no batch is in flight. Call submit() first.")
        request = self._active_requests.popleft()
        self._idle_requests.append(request)
        return request.wait()


class TensorRTBackend(Backend):
    """An opened engine. Several threads may call `run`; a lock serializes the calls.

    Args:
        loaded_engine: The engine.
        device: cuda or cuda:N.
        engine_info: Content of the engine's JSON file.
        make_request: Function that creates an `InferRequest`.

    Attributes:
        metadata: Metadata strings of the ONNX file.
        input_hw: Fixed (height, width) of the input, pixels. None if the size is free.
        batch: Fixed batch size. None if the batch dimension is free.
        max_batch: Largest batch of a call.
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
        (min_batch, *min_hw), (max_batch, *max_hw) = loaded_engine.min_shape[:3], loaded_engine.max_shape[:3]
        self.input_hw = (max_hw[0], max_hw[1]) if min_hw == max_hw else None
        self.max_batch = max_batch
        self.batch = max_batch if min_batch == max_batch else None
        self._make_request: Callable[[], InferRequest] | None = make_request
        self._lock = threading.Lock()
        self._request = make_request()

    def run(self, images: NDArray[np.uint8]) -> RuntimeOutputs:
        """Run inference on a batch. See `Backend.run`."""
        with self._lock:
            self._check_open()
            self._request.start_async(images)
            return self._request.wait()

    @contextmanager
    def open_async_queue(self, num_requests: int = 2) -> Iterator[AsyncQueue]:
        """Open a queue for batches that run at the same time.

        Args:
            num_requests: Largest number of batches in flight. Each has its own memory.

        Yields:
            The queue.

        Raises:
            ValueError: `num_requests` is less than 1, or the model is closed.
        """
        if num_requests < 1:
            raise ValueError(f"num_requests {num_requests}: expected at least 1.")
        make_request = self._check_open()
        with ExitStack() as stack:
            requests = []
            for _ in range(num_requests):
                requests.append(make_request())
                stack.callback(requests[-1].close)
            yield AsyncQueue(requests)

    def close(self) -> None:
        """Release the memory of the model."""
        with self._lock:
            if self._make_request is not None:
                self._make_request = None
                self._request.close()

    def _check_open(self) -> Callable[[], InferRequest]:
        if self._make_request is None:
            raise make_closed_error(self.path)
        return self._make_request


@contextmanager
def open_tensorrt(path: Path, device: str = "cuda", use_cuda_graph: bool = True) -> Iterator[TensorRTBackend]:
    """Open an engine of `hkd-export`.

    Deserialization executes code of the file. Open only engines from a trusted source.

    Args:
        path: The engine. Its JSON file must be in the same directory.
        device: cuda or cuda:N.
        use_cuda_graph: True to launch a fixed input shape as one CUDA graph. No effect for DLA or a free shape.

    Yields:
        The opened model.

    Raises:
        UsageError: The device is invalid.
        DataError: The engine or its JSON file is missing or damaged.
        UnavailableError: TensorRT or the GPU is missing, or the engine was built for another machine.
    """
    engine_info = read_engine_info(path)
    trt, cuda = import_tensorrt(), open_cuda(device)
    check_compatibility(path, engine_info, trt.__version__, cuda.get_info())
    plan = read_plan(path, engine_info)
    log = TrtLog()
    runtime = trt.Runtime(make_trt_logger(trt, log))
    runtime.engine_host_code_allowed = engine_info.version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise DataError(
            f"{path}: TensorRT {trt.__version__} cannot open the engine: {log.first_error}. Build it again."
        )
    loaded_engine = _validate_engine_io(trt, engine, path, log)
    can_use_graph = use_cuda_graph and engine_info.dla is None
    with closing(
        TensorRTBackend(loaded_engine, device, engine_info, lambda: InferRequest(cuda, loaded_engine, can_use_graph))
    ) as backend:
        yield backend


def _validate_engine_io(trt: Any, engine: Any, path: Path, log: TrtLog) -> LoadedEngine:
    """Check that the engine has the inputs and outputs of hkd-export."""
    actual = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        actual[name] = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
    expected = {INPUT_NAME: INPUT_DTYPE} | OUTPUT_DTYPES
    if actual != expected:
        raise DataError(f"{path}: not an engine of hkd-export: expected {expected}, got {actual}.")
    shape = tuple(engine.get_tensor_shape(INPUT_NAME))
    if len(shape) != 4 or shape[3] != 3:
        raise DataError(f"{path}: not an engine of hkd-export: expected images (B, H, W, 3), got {shape}.")
    if -1 not in shape:
        return LoadedEngine(path, engine, log, shape, shape)
    min_shape, _, max_shape = (tuple(dims) for dims in engine.get_tensor_profile_shape(INPUT_NAME, 0))
    return LoadedEngine(path, engine, log, min_shape, max_shape)
