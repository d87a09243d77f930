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

from hkd_deploy.trt.bindings import import_tensorrt
from hkd_deploy.trt.builder import Log, recording_logger
from hkd_deploy.trt.cuda import Cuda, open_cuda
from hkd_deploy.trt.sidecar import Sidecar, check_home, read_plan, read_sidecar
from hkd_det.errors import DataError, UnavailableError

INPUT = ("images", "uint8")
OUTPUTS = {"boxes": "float32", "scores": "float32", "count": "int64"}

Answer = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Opened:
    """A deserialised engine. smallest, largest: shapes of `images` it runs from and to; equal where it is fixed.

    log: what TensorRT says goes wrong.
    """

    path: Path
    engine: Any
    log: Log
    smallest: Shape
    largest: Shape


class Buffer:
    """Pinned host memory and device memory for a tensor of at most `shape`."""

    def __init__(self, cuda: Cuda, shape: Shape, dtype: str, undo: ExitStack) -> None:
        self._dtype = np.dtype(dtype)
        size = prod(shape) * self._dtype.itemsize
        self.host, self._bytes = cuda.pinned(size)
        undo.callback(cuda.free_pinned, self.host)
        self.device = cuda.allocate(size)
        undo.callback(cuda.free, self.device)

    def size(self, shape: Shape) -> int:
        """Bytes of a tensor of `shape`."""
        return prod(shape) * self._dtype.itemsize

    def view(self, shape: Shape) -> NDArray[Any]:
        """The host memory as an array of `shape`; valid until the slot is closed."""
        return self._bytes[: self.size(shape)].view(self._dtype).reshape(shape)


class Slot:
    """The way of one batch through the GPU: `start` returns at once, `finish` waits. For one batch at a time."""

    def __init__(self, cuda: Cuda, opened: Opened, graph: bool) -> None:
        self._cuda, self._opened = cuda, opened
        self._graph: Any | None = None
        cuda.use()
        with ExitStack() as undo:
            self._context = opened.engine.create_execution_context()
            if self._context is None:
                raise UnavailableError(f"{opened.path}: the GPU has no memory left for it")
            self._stream = cuda.stream()
            undo.callback(cuda.destroy_stream, self._stream)
            self._reshape(opened.largest)
            self._images = Buffer(cuda, opened.largest, INPUT[1], undo)
            self._outputs = {name: Buffer(cuda, self._shapes[name], OUTPUTS[name], undo) for name in OUTPUTS}
            undo.callback(self._let_go)
            undo.callback(cuda.wait, self._stream)  # undone early: nothing may be under way when memory is freed
            undo.callback(cuda.use)  # undone first: any thread may close
            for name, buffer in {INPUT[0]: self._images, **self._outputs}.items():
                self._done(self._context.set_tensor_address(name, buffer.device), f"set_tensor_address({name})")
            if graph and opened.smallest == opened.largest:
                self._enqueue()  # a first run: what TensorRT puts off until then can't be captured
                cuda.wait(self._stream)
                self._graph = cuda.capture(self._stream, self._enqueue)
            self._undo = undo.pop_all()

    def start(self, pictures: NDArray[np.uint8]) -> None:
        """Set the GPU to work on [B, H, W, 3] uint8 RGB.

        Raises ValueError for what no engine takes, DataError for a batch or a size outside this one's profile.
        """
        self._check(pictures)
        self._cuda.use()
        if pictures.shape != self._shape:
            self._reshape(pictures.shape)
        self._images.view(self._shape)[...] = pictures
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph, self._stream)

    def finish(self) -> Answer:
        """Wait, and give the answer as arrays of their own."""
        self._cuda.use()
        self._cuda.wait(self._stream)
        boxes, scores, count = (buffer.view(self._shapes[name]).copy() for name, buffer in self._outputs.items())
        return boxes, scores, count

    def close(self) -> None:
        """Wait for what runs, and give everything back."""
        self._undo.close()

    def _let_go(self) -> None:
        """Of the graph and the context, which use the memory and the stream."""
        graph, self._graph, self._context = self._graph, None, None
        if graph is not None:
            self._cuda.destroy_graph(graph)

    def _enqueue(self) -> None:
        stream = self._stream
        self._cuda.copy_in(self._images.device, self._images.host, self._images.size(self._shape), stream)
        self._done(self._context.execute_async_v3(int(stream)), "execute_async_v3")
        for name, buffer in self._outputs.items():
            self._cuda.copy_out(buffer.host, buffer.device, buffer.size(self._shapes[name]), stream)

    def _reshape(self, shape: Shape) -> None:
        self._done(self._context.set_input_shape(INPUT[0], shape), f"set_input_shape{shape}")
        self._shape = shape
        self._shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in OUTPUTS}

    def _check(self, pictures: NDArray[np.uint8]) -> None:
        low, high = self._opened.smallest, self._opened.largest
        said = (
            f"{self._opened.path} takes uint8 {low if low == high else f'{low} to {high}'}, "
            f"not {pictures.dtype} {pictures.shape}"
        )
        if pictures.dtype != np.uint8 or pictures.ndim != len(low) or pictures.shape[3] != low[3]:
            raise ValueError(said)
        if not all(a <= n <= b for a, n, b in zip(low, pictures.shape, high, strict=True)):
            raise DataError(f"{said}; build it for that: hkd-export MODEL.onnx --trt --profile SMALLEST,USUAL,LARGEST")

    def _done(self, succeeded: bool, call: str) -> None:
        if not succeeded:
            raise UnavailableError(f"{self._opened.path}: TensorRT's {call} failed: {self._opened.log.reason}")


class InFlight:
    """Batches under way on the GPU, answered in the order they were submitted. For one thread."""

    def __init__(self, slots: list[Slot]) -> None:
        self._free, self._flying = deque(slots), deque[Slot]()

    def __len__(self) -> int:
        """Batches submitted and not yet collected."""
        return len(self._flying)

    def submit(self, pictures: NDArray[np.uint8]) -> None:
        """Set off [B, H, W, 3] uint8 RGB and return. Raises ValueError if every slot is in flight: collect first."""
        if not self._free:
            raise ValueError(f"{len(self._flying)} batches are in flight already; collect one first")
        self._free[0].start(pictures)
        self._flying.append(self._free.popleft())

    def collect(self) -> Answer:
        """Wait for the oldest batch; its boxes, scores and count. Raises ValueError if nothing is in flight."""
        if not self._flying:
            raise ValueError("nothing is in flight; submit first")
        slot = self._flying.popleft()
        self._free.append(slot)
        return slot.finish()


class TensorRT:
    """An open engine. Several threads may call `run`; they take turns.

    metadata: the ONNX file's own strings. input_hw: (height, width) pixels, None where free. batch: pictures a call
    takes, None for any number up to `max_batch`.
    """

    def __init__(self, opened: Opened, device: str, sidecar: Sidecar, new_slot: Callable[[], Slot]) -> None:
        self.path = opened.path
        self.device = device
        self.sidecar = sidecar
        self.metadata = sidecar.metadata
        (low, *low_hw), (high, *high_hw) = opened.smallest[:3], opened.largest[:3]
        self.input_hw = (high_hw[0], high_hw[1]) if low_hw == high_hw else None
        self.max_batch = high
        self.batch = high if low == high else None
        self._new_slot: Callable[[], Slot] | None = new_slot
        self._lock = threading.Lock()
        self._slot = new_slot()

    def run(self, pictures: NDArray[np.uint8]) -> Answer:
        """(B, H, W, 3) uint8 RGB, letterboxed, to boxes [B, K, 4] in input pixels, scores [B, K], valid rows [B]."""
        with self._lock:
            self._check_open()
            self._slot.start(pictures)
            return self._slot.finish()

    @contextmanager
    def in_flight(self, slots: int = 2) -> Iterator[InFlight]:
        """A queue that lets `slots` batches be under way at once, each with memory of its own."""
        if slots < 1:
            raise ValueError(f"{slots} slots: at least one")
        new_slot = self._check_open()
        with ExitStack() as undo:
            made = []
            for _ in range(slots):
                made.append(new_slot())
                undo.callback(made[-1].close)
            yield InFlight(made)

    def close(self) -> None:
        """Give the model's memory back."""
        with self._lock:
            if self._new_slot is not None:
                self._new_slot = None
                self._slot.close()

    def _check_open(self) -> Callable[[], Slot]:
        if self._new_slot is None:
            raise ValueError(f"{self.path}: this model has been closed; call it inside its `with` block")
        return self._new_slot


@contextmanager
def open_tensorrt(path: Path, device: str = "cuda", cuda_graph: bool = True) -> Iterator[TensorRT]:
    """Open an engine of hkd-export on `device`: cuda or cuda:N.

    cuda_graph: launch a fixed shape as one graph; never for an engine on DLA, or of a free shape.
    Opening runs code inside the file: only open engines you trust. Raises UsageError, DataError or
    UnavailableError; nothing is deserialised unless the sidecar says it was built for this machine.
    """
    sidecar = read_sidecar(path)
    trt, cuda = import_tensorrt(), open_cuda(device)
    check_home(path, sidecar, trt.__version__, cuda.gpu())
    plan = read_plan(path, sidecar)
    log = Log()
    runtime = trt.Runtime(recording_logger(trt, log))
    runtime.engine_host_code_allowed = "version" in sidecar.compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise DataError(f"{path}: TensorRT {trt.__version__} does not open it: {log.reason}")
    opened = _checked(trt, engine, path, log)
    graph = cuda_graph and sidecar.dla is None
    running = TensorRT(opened, device, sidecar, lambda: Slot(cuda, opened, graph))
    try:
        yield running
    finally:
        running.close()


def _checked(trt: Any, engine: Any, path: Path, log: Log) -> Opened:
    """The engine, if its inputs and outputs are hkd-export's."""
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        found[name] = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
    if found != dict([INPUT]) | OUTPUTS:
        raise DataError(f"{path}: not an engine of hkd-export: expected {dict([INPUT]) | OUTPUTS}, found {found}")
    shape = tuple(engine.get_tensor_shape(INPUT[0]))
    if len(shape) != 4 or shape[3] != 3:
        raise DataError(f"{path}: not an engine of hkd-export: images is {shape}, not (B, H, W, 3)")
    if -1 not in shape:
        return Opened(path, engine, log, shape, shape)
    smallest, _, largest = (tuple(dims) for dims in engine.get_tensor_profile_shape(INPUT[0], 0))
    return Opened(path, engine, log, smallest, largest)
