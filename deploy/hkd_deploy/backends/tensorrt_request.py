"""Inference requests of the TensorRT backend: memory, stream and execution of one batch.

An `InferRequest` owns pinned host memory, device memory, a stream and an execution context. If the input shape is
fixed, its copies and kernels form one CUDA graph.
"""

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import INPUT_DTYPE, INPUT_NAME, OUTPUT_DTYPES, RuntimeOutputs
from hkd_deploy.trt.bindings import TrtLog
from hkd_deploy.trt.cuda import CudaDevice
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

    def __init__(self, cuda: CudaDevice, shape: TensorShape, dtype: str, stack: ExitStack) -> None:
        self._dtype = np.dtype(dtype)
        size = prod(shape) * self._dtype.itemsize
        self.host, self._bytes = cuda.allocate_pinned(size)
        stack.callback(cuda.free_pinned, self.host)
        self.device = cuda.allocate(size)
        stack.callback(cuda.free, self.device)

    def compute_num_bytes(self, shape: TensorShape) -> int:
        """Compute the size of a tensor.

        Args:
            shape: Shape of the tensor.

        Returns:
            Number of bytes.
        """
        return prod(shape) * self._dtype.itemsize

    def get_host_array(self, shape: TensorShape) -> NDArray[Any]:
        """Return a view of the host memory. It is valid until the request is closed.

        Args:
            shape: Shape of the array.

        Returns:
            The array.
        """
        return self._bytes[: self.compute_num_bytes(shape)].view(self._dtype).reshape(shape)


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
