"""TensorRT backend. It runs an engine on the GPU that the engine was built for."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import INPUT_DTYPE, INPUT_NAME, OUTPUT_DTYPES, Backend, RuntimeOutputs, make_closed_error
from hkd_deploy.backends.tensorrt_request import AsyncQueue, InferRequest, LoadedEngine
from hkd_deploy.trt.bindings import TrtLog, import_tensorrt, make_trt_logger
from hkd_deploy.trt.cuda import open_cuda
from hkd_deploy.trt.engine_info import EngineInfo, check_compatibility, read_engine_info, read_plan
from hkd_det.errors import DataError


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
