# ruff: noqa: N802, ARG002 - names and arguments of CUDA and TensorRT
"""Tests of the TensorRT backend with a fake CUDA and a fake TensorRT.

The fake CUDA executes work only when a stream is synchronized. It fails on memory that is
freed twice or used after it was freed. The tests at the end compare its calls with the real cuda-python, and the fake
engine with the real TensorRT bindings.
"""

import ctypes
import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hkd_deploy.backends import open_backend
from hkd_deploy.backends.tensorrt import TensorRTBackend, open_tensorrt
from hkd_deploy.model_metadata import TensorInfo
from hkd_deploy.trt import bindings
from hkd_deploy.trt.engine_info import EngineInfo, get_current_platform, write_engine
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.files import bytes_sha256

K = 3  # boxes per image
HW = (4, 6)


def compute_outputs(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Compute boxes, scores and count as the fake network does."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    scores = flat.mean(1, keepdims=True) / 255 * np.array([1, 0.5, 0.25], np.float32)
    boxes = np.broadcast_to(flat[:, None, :4], (len(images), K, 4)).copy()
    return boxes, scores.astype(np.float32), flat.max(1).astype(np.int64)


# Subset of the error codes of cuda-python.
CudaError = IntEnum("CudaError", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorInsufficientDriver": 35})


class Handle:
    """A stream or a graph.

    Attributes:
        class_name: Name of the class in cuda-python.
        work: Enqueued functions.
        captured: Functions of the running capture, or None.
    """

    numbers = itertools.count(1000)

    def __init__(self, class_name: str) -> None:
        self.class_name, self.number = class_name, next(self.numbers)
        self.work: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None

    def __int__(self) -> int:
        return self.number

    def enqueue(self, function: Callable[[], None]) -> None:
        (self.work if self.captured is None else self.captured).append(function)


class FakeCuda:
    """cuda.bindings.runtime with a record of its calls.

    Args:
        num_gpus: Number of GPUs.
        failing_call: Index of the call that returns an error.
    """

    def __init__(self, num_gpus: int = 2, failing_call: int | None = None) -> None:
        self.num_gpus, self.failing_call = num_gpus, failing_call
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.memory: dict[int, tuple[str, Any]] = {}
        self.handles: dict[int, Handle] = {}
        self.current: dict[threading.Thread, int] = {}
        self.cudaError_t = CudaError
        self.cudaHostAllocDefault, self.cudaStreamNonBlocking = 0, 1
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not inspect.ismethod(value) or name == "cudaGetErrorString":
            return value

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            if len(self.calls) - 1 == self.failing_call:
                if name == "cudaStreamEndCapture":
                    arguments[0].captured = None  # an error also ends the capture
                return (CudaError.cudaErrorMemoryAllocation, *[None] * (name not in ("cudaSetDevice",)))
            result = value(*arguments)
            return (CudaError.cudaSuccess,) if result is None else (CudaError.cudaSuccess, result)

        return call

    def call_names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def cudaGetErrorString(self, error: CudaError) -> tuple[CudaError, bytes]:
        return CudaError.cudaSuccess, error.name.encode()

    def cudaGetDeviceCount(self) -> int:
        return self.num_gpus

    def cudaSetDevice(self, device: int) -> None:
        self.current[threading.current_thread()] = device

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return SimpleNamespace(name=b"Orin\0\0", major=8, minor=7)

    def cudaHostAlloc(self, size: int, flags: int) -> int:
        return self._allocate("host", size)

    def cudaMalloc(self, size: int) -> int:
        return self._allocate("device", size)

    def cudaFreeHost(self, address: int) -> None:
        assert self.memory.pop(address)[0] == "host"

    def cudaFree(self, address: int) -> None:
        assert self.memory.pop(address)[0] == "device"

    def cudaStreamCreateWithFlags(self, flags: int) -> Handle:
        return self._create_handle("cudaStream_t")

    def cudaStreamDestroy(self, stream: Handle) -> None:
        assert not stream.work and self.handles.pop(int(stream))

    def cudaStreamSynchronize(self, stream: Handle) -> None:
        assert stream.captured is None
        while stream.work:
            stream.work.pop(0)()

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: Handle) -> None:
        locations = ("device", "host") if kind == 1 else ("host", "device")

        def copy() -> None:
            assert (self.memory[target][0], self.memory[source][0]) == locations
            assert size <= min(ctypes.sizeof(self.memory[target][1]), ctypes.sizeof(self.memory[source][1]))
            ctypes.memmove(target, source, size)

        stream.enqueue(copy)

    def cudaStreamBeginCapture(self, stream: Handle, mode: int) -> None:
        assert not stream.work
        stream.captured = []

    def cudaStreamEndCapture(self, stream: Handle) -> Handle:
        graph = self._create_handle("cudaGraph_t")
        graph.work, stream.captured = stream.captured or [], None
        return graph

    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> Handle:
        executable = self._create_handle("cudaGraphExec_t")
        executable.work = list(graph.work)
        return executable

    def cudaGraphDestroy(self, graph: Handle) -> None:
        del self.handles[int(graph)]

    def cudaGraphExecDestroy(self, graph: Handle) -> None:
        del self.handles[int(graph)]

    def cudaGraphLaunch(self, graph: Handle, stream: Handle) -> None:
        stream.work.extend(graph.work)

    def _allocate(self, location: str, size: int) -> int:
        assert size > 0
        block = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(block)] = (location, block)
        return ctypes.addressof(block)

    def _create_handle(self, class_name: str) -> Handle:
        handle = Handle(class_name)
        self.handles[int(handle)] = handle
        return handle


class FakeContext:
    """IExecutionContext."""

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine, self.addresses, self.shape = engine, dict[str, int](), engine.shape

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return self.engine.succeeds and name == "images"

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> list[int]:
        batch = self.shape[0]
        return {"images": [*self.shape], "boxes": [batch, K, 4], "scores": [batch, K], "count": [batch]}[name]

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert isinstance(stream_handle, int)
        self.engine.num_executions += 1
        memory, shape = self.engine.cuda.memory, self.shape

        def compute() -> None:
            images = np.frombuffer(memory[self.addresses["images"]][1], np.uint8)[: prod(shape)].reshape(shape)
            for name, value in zip(("boxes", "scores", "count"), compute_outputs(images), strict=True):
                ctypes.memmove(self.addresses[name], value.tobytes(), value.nbytes)

        self.engine.cuda.handles[stream_handle].enqueue(compute)
        return True


class FakeEngine:
    """ICudaEngine with a fixed or a free batch.

    Args:
        cuda: The fake CUDA.
        min_batch: Smallest batch.
        max_batch: Largest batch. Equal to `min_batch` for a fixed batch.
        boxes_name: Name of the first output.
        succeeds: Whether `set_input_shape` succeeds.
    """

    def __init__(
        self, cuda: FakeCuda, min_batch: int, max_batch: int, boxes_name: str = "boxes", succeeds: bool = True
    ) -> None:
        self.cuda, self.succeeds, self.num_executions = cuda, succeeds, 0
        self.profile_shapes = [(batch, *HW, 3) for batch in (min_batch, min_batch, max_batch)]
        self.shape = (min_batch if min_batch == max_batch else -1, *HW, 3)
        self.names = ["images", boxes_name, "scores", "count"]
        self.num_io_tensors = 4

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> str:
        return {"images": "uint8", "count": "int64"}.get(name, "float32")

    def get_tensor_shape(self, name: str) -> list[int]:
        return [*self.shape]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return self.profile_shapes

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


class FakeTensorRT:
    """The module `tensorrt`. Its runtime returns the given engine for every plan, or an error for None."""

    __version__ = "10.3.0"
    nptype = staticmethod(np.dtype)

    class ILogger:
        ERROR, INTERNAL_ERROR = "ERROR", "INTERNAL_ERROR"

        def __init__(self) -> None:
            """Take no arguments, as the real class."""

    def __init__(self, engine: FakeEngine | None) -> None:
        self.engine, self.deserialized = engine, list[bytes]()

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> FakeEngine | None:
            self.deserialized.append(plan)
            if self.engine is None:
                logger.log("ERROR", "the plan's\nmagic tag is wrong")
            return self.engine

        return SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=False)


def make_info(**changes: Any) -> EngineInfo:
    values: dict[str, Any] = {
        "format": 1, "tensorrt": "10.3.0", "gpu": "Orin", "sm": "8.7", "platform": get_current_platform(),
        "version_compatible": False, "hardware_compatible": False, "dla": None,
        "precision_requested": "fp16", "precision_actual": {"fp16": 3},
        "inputs": (TensorInfo("images", "uint8", (1, *HW, 3)),), "outputs": (), "profile": None,
        "workspace_mib": 1024, "context_mib": 1.5, "build_s": 2.0, "date": "2026-01-02T03:04:05+00:00",
        "source": "tiny.onnx", "source_sha256": "0f" * 32, "engine_sha256": bytes_sha256(b"plan"),
        "metadata": {"hkd.model": "tiny"},
    }  # fmt: skip
    return EngineInfo(**(values | changes))


class Board:
    """A machine with a fake GPU and a fake TensorRT, and an engine file."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self._monkeypatch = directory / "tiny.engine", monkeypatch
        self.install_engine()
        self.write_engine()

    def install_engine(
        self, min_batch: int = 1, max_batch: int = 1, failing_call: int | None = None, **options: Any
    ) -> None:
        """Replace the fakes by new ones. `options` are arguments of `FakeEngine`."""
        self.cuda = FakeCuda(failing_call=failing_call)
        self.engine = FakeEngine(self.cuda, min_batch, max_batch, **options)
        self.install_tensorrt(FakeTensorRT(self.engine))

    def install_tensorrt(self, trt: Any) -> None:
        self.trt = trt
        modules = {"tensorrt": trt, "cuda.bindings.runtime": self.cuda}
        self._monkeypatch.setattr(importlib, "import_module", lambda name: modules[name])

    def write_engine(self, **changes: Any) -> None:
        write_engine(self.path, b"plan", make_info(**changes))

    def is_all_released(self) -> bool:
        return not self.cuda.memory and not self.cuda.handles


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    return Board(tmp_path, monkeypatch)


def make_images(batch: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (batch, *HW, 3)).astype(np.uint8)


def assert_outputs_of(images: NDArray[np.uint8], outputs: tuple[NDArray[Any], ...]) -> None:
    for value, expected in zip(outputs, compute_outputs(images), strict=True):
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)


def test_fixed_engine_runs_and_releases_all(board: Board) -> None:
    with open_tensorrt(board.path) as backend:
        assert (backend.batch, backend.max_batch, backend.input_hw, backend.device) == (1, 1, HW, "cuda")
        assert backend.metadata == {"hkd.model": "tiny"} and backend.path == board.path
        first, second = make_images(1, 0), make_images(1, 1)
        first_outputs = backend.run(first)
        assert_outputs_of(second, backend.run(second))
        assert_outputs_of(first, first_outputs)  # a copy, not a view of the reused memory
    assert board.is_all_released()


def test_fixed_shape_is_one_graph_launch(board: Board) -> None:
    with open_tensorrt(board.path) as backend:
        num_calls = len(board.cuda.calls)
        for seed in range(3):
            backend.run(make_images(1, seed))
        assert board.engine.num_executions == 2  # the warm-up and the capture
        calls_per_run = ["cudaSetDevice", "cudaGraphLaunch", "cudaSetDevice", "cudaStreamSynchronize"]
        assert board.cuda.call_names()[num_calls:] == calls_per_run * 3


@pytest.mark.parametrize(("use_cuda_graph", "dla"), [(False, None), (True, 0)])
def test_without_graph_calls_are_separate(board: Board, use_cuda_graph: bool, dla: int | None) -> None:
    board.write_engine(dla=dla)
    with open_tensorrt(board.path, use_cuda_graph=use_cuda_graph) as backend:
        assert_outputs_of(make_images(1, 0), backend.run(make_images(1, 0)))
        assert "cudaGraphLaunch" not in board.cuda.call_names() and board.engine.num_executions == 1
    assert board.is_all_released()


def test_free_batch_accepts_all_batches_of_the_profile(board: Board) -> None:
    board.install_engine(min_batch=1, max_batch=4)
    with open_tensorrt(board.path) as backend:
        assert (backend.batch, backend.max_batch) == (None, 4)
        for batch in (4, 1, 3, 3, 2):
            outputs = backend.run(make_images(batch, batch))
            assert outputs[0].shape == (batch, K, 4)
            assert_outputs_of(make_images(batch, batch), outputs)
    assert board.is_all_released()


def test_open_backend_reports_free_batch(board: Board) -> None:
    board.install_engine(min_batch=1, max_batch=4)
    with open_backend(board.path, "cuda") as opened:
        runtime = opened.runtime
        assert (opened.name, opened.max_batch, runtime.batch, runtime.input_hw) == ("tensorrt", 4, None, HW)


def test_open_backend_reports_free_size(board: Board) -> None:
    board.engine.shape = (1, -1, -1, 3)
    board.engine.profile_shapes = [(1, 32, 32, 3), (1, *HW, 3), (1, *HW, 3)]
    with open_backend(board.path, "cuda") as opened:
        assert (opened.max_batch, opened.runtime.batch, opened.runtime.input_hw) == (1, 1, None)


@pytest.mark.parametrize("compatible", [False, True])
def test_host_code_only_for_version_compatible(board: Board, monkeypatch: pytest.MonkeyPatch, compatible: bool) -> None:
    board.write_engine(version_compatible=compatible)
    runtimes: list[Any] = []
    create_runtime = FakeTensorRT.Runtime

    def record(self: FakeTensorRT, logger: Any) -> Any:
        runtimes.append(create_runtime(self, logger))
        return runtimes[-1]

    monkeypatch.setattr(FakeTensorRT, "Runtime", record)
    with open_tensorrt(board.path):
        assert runtimes[0].engine_host_code_allowed is compatible


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((5, *HW, 3), np.uint8),
        np.zeros((0, *HW, 3), np.uint8),
        np.zeros((1, *HW, 4), np.uint8),
        np.zeros((1, 5, 6, 3), np.uint8),
        np.zeros((*HW, 3), np.uint8),
        np.zeros((1, *HW, 3), np.float32),
    ],
)
def test_wrong_input_raises_before_any_cuda_call(board: Board, images: NDArray[Any]) -> None:
    board.install_engine(min_batch=1, max_batch=4)
    with open_tensorrt(board.path) as backend:
        num_calls = len(board.cuda.calls)
        with pytest.raises((ValueError, DataError), match=r"uint8 \(1, 4, 6, 3\) to \(4, 4, 6, 3\)"):
            backend.run(images)
        assert len(board.cuda.calls) == num_calls
        assert_outputs_of(make_images(2, 0), backend.run(make_images(2, 0)))


@pytest.mark.parametrize("max_batch", [1, 2])
def test_any_failing_cuda_call_releases_all(board: Board, max_batch: int) -> None:
    def run_session() -> None:
        with open_tensorrt(board.path) as backend:
            backend.run(make_images(1, 0))
            with backend.open_async_queue(2) as queue:
                queue.submit(make_images(1, 0))
                queue.collect()

    board.install_engine(max_batch=max_batch)
    run_session()
    names = board.cuda.call_names()
    assert len(names) > 40
    releases = ("cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaGraphDestroy", "cudaGraphExecDestroy")
    for index, name in enumerate(names):
        if name in releases:
            continue
        board.install_engine(max_batch=max_batch, failing_call=index)
        with pytest.raises(UnavailableError, match=f"--device cuda:0: {name}: cudaErrorMemoryAllocation"):
            run_session()
        assert board.is_all_released(), (index, name)


def test_queue_returns_batches_in_order(board: Board) -> None:
    board.install_engine(max_batch=2)
    with open_tensorrt(board.path) as backend:
        with backend.open_async_queue(3) as queue:
            for seed, batch in enumerate((1, 2, 1)):
                queue.submit(make_images(batch, seed))
            assert len(queue) == 3
            num_waits = board.cuda.call_names().count("cudaStreamSynchronize")
            with pytest.raises(ValueError, match="3 batches are in flight"):
                queue.submit(make_images(1, 9))
            assert_outputs_of(make_images(1, 0), queue.collect())
            assert board.cuda.call_names().count("cudaStreamSynchronize") == num_waits + 1  # waits for the oldest only
            queue.submit(make_images(2, 3))
            assert_outputs_of(make_images(2, 7), backend.run(make_images(2, 7)))  # independent of the queue
            for seed, batch in ((1, 2), (2, 1), (3, 2)):
                assert_outputs_of(make_images(batch, seed), queue.collect())
            with pytest.raises(ValueError, match="in flight"):
                queue.collect()
        assert len(board.cuda.handles) == 1  # the stream of the backend itself
    assert board.is_all_released()


def test_queue_closed_with_batches_in_flight(board: Board) -> None:
    with open_tensorrt(board.path) as backend, backend.open_async_queue(2) as queue:
        queue.submit(make_images(1, 0))
    assert board.is_all_released()


@pytest.mark.parametrize("batch", [3, 5])
def test_batch_outside_the_profile_is_a_data_error(board: Board, batch: int) -> None:
    """The size of a frame depends on user input, so it is not a programming error."""
    board.install_engine(min_batch=4, max_batch=4)
    with open_tensorrt(board.path) as backend, pytest.raises(DataError, match="--trt --trt-profile MIN,OPT,MAX"):
        backend.run(make_images(batch, 0))


def test_rejected_batch_occupies_no_request(board: Board) -> None:
    with open_tensorrt(board.path) as backend, backend.open_async_queue(1) as queue:
        with pytest.raises(DataError, match="uint8"):
            queue.submit(make_images(2, 0))
        queue.submit(make_images(1, 0))
        assert_outputs_of(make_images(1, 0), queue.collect())


def test_concurrent_threads_get_their_own_outputs(board: Board) -> None:
    board.install_engine(max_batch=4)
    errors: list[BaseException] = []

    def run_batches(backend: TensorRTBackend, batch: int) -> None:
        try:
            for seed in range(20):
                assert_outputs_of(make_images(batch, seed), backend.run(make_images(batch, seed)))
        except BaseException as error:  # noqa: BLE001 - checked by the main thread
            errors.append(error)

    with open_tensorrt(board.path, "cuda:1") as backend:
        threads = [threading.Thread(target=run_batches, args=(backend, batch)) for batch in (1, 2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(board.cuda.current) == 5 and set(board.cuda.current.values()) == {1}  # each thread selects the GPU


def test_closed_backend_raises(board: Board) -> None:
    with open_tensorrt(board.path) as backend:
        pass
    backend.close()
    with pytest.raises(ValueError, match="closed"):
        backend.run(make_images(1, 0))
    with pytest.raises(ValueError, match="closed"), backend.open_async_queue():
        pass


def test_failing_tensorrt_call_raises_and_releases_all(board: Board) -> None:
    board.install_engine(succeeds=False)
    message = r"tiny.engine: TensorRT.* set_input_shape.* failed"
    with pytest.raises(UnavailableError, match=message), open_tensorrt(board.path):
        pass
    assert board.is_all_released()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensorrt": "10.7.0"}, "built for TensorRT 10.7.0, this machine has TensorRT 10.3.0"),
        ({"gpu": "NVIDIA L4", "sm": "8.9"}, r"built for NVIDIA L4 \(SM 8.9\), this machine has Orin \(SM 8.7\)"),
        ({"platform": "windows-amd64"}, "built for windows-amd64, this machine has linux-"),
    ],
)
def test_engine_of_another_machine_is_not_deserialized(board: Board, changes: dict[str, Any], message: str) -> None:
    board.write_engine(**changes)
    hint = "Build it on this machine: hkd-export tiny.onnx --trt"
    with pytest.raises(UnavailableError, match=f"{message}.* {hint}"), open_tensorrt(board.path):
        pass
    assert board.trt.deserialized == []


@pytest.mark.parametrize("content", [b"", b"pla", b"plan!"])
def test_damaged_engine_is_not_deserialized(board: Board, content: bytes) -> None:
    board.path.write_bytes(content)
    with pytest.raises(DataError, match=r"truncated or changed since it was built\. Build"), open_tensorrt(board.path):
        pass
    assert board.trt.deserialized == []


def test_engine_that_tensorrt_rejects_raises(board: Board) -> None:
    board.install_tensorrt(FakeTensorRT(None))
    with pytest.raises(DataError, match=r"10\.3\.0 .*: the plan's magic tag is wrong"), open_tensorrt(board.path):
        pass


def test_engine_with_other_outputs_raises(board: Board) -> None:
    board.install_engine(boxes_name="output0")
    with pytest.raises(DataError, match=r"not an engine of hkd-export: .*output0"), open_tensorrt(board.path):
        pass


@pytest.mark.parametrize(
    ("device", "error_class", "message"),
    [
        ("cpu", UsageError, "--device cpu: expected cuda or cuda:N"),
        ("cuda:2", UnavailableError, r"--device cuda:2: this machine has 2 GPU\(s\), numbered from 0"),
    ],
)
def test_unavailable_device_raises(board: Board, device: str, error_class: type[Exception], message: str) -> None:
    with pytest.raises(error_class, match=message), open_tensorrt(board.path, device):
        pass


def record_calls(board: Board) -> list[tuple[str, tuple[Any, ...]]]:
    with open_tensorrt(board.path) as backend:
        backend.run(make_images(1, 0))
    return board.cuda.calls


@pytest.fixture
def real_cuda() -> Any:
    """Return the real cuda-python. Skip on a machine with a GPU, where the calls below would do harm."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    try:
        error, _ = runtime.cudaGetDeviceCount()
    except RuntimeError:
        return runtime  # cuda-python 12.6 without the library of the driver
    if error == runtime.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU")
    return runtime


def test_calls_match_the_real_cuda_python(real_cuda: Any, board: Board) -> None:
    """Without a driver, a correct call returns an error of CUDA; a wrong number or type of arguments raises."""
    calls = record_calls(board)
    assert len({name for name, _ in calls}) == 17
    memcpy_kinds = {1: real_cuda.cudaMemcpyKind(1), 2: real_cuda.cudaMemcpyKind(2)}
    mode = real_cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    for name, recorded in calls:
        arguments = [
            getattr(real_cuda, value.class_name)(0) if isinstance(value, Handle) else value for value in recorded
        ]
        if name == "cudaMemcpyAsync":
            arguments[:2], arguments[3] = [0, 0], memcpy_kinds[arguments[3]]
        if name in ("cudaFree", "cudaFreeHost"):
            arguments = [0]
        if name == "cudaStreamBeginCapture":
            arguments[1] = mode
        with suppress(RuntimeError):  # cuda-python 12.6 raises if there is no driver
            error, *values = getattr(real_cuda, name)(*arguments)
            assert isinstance(error, real_cuda.cudaError_t) and len(values) <= 1, name
        documented = re.match(rf"{name}\((.*?)\)", getattr(real_cuda, name).__doc__.strip())
        assert documented is not None, name
        assert len([part for part in documented[1].split(",") if part]) == len(arguments), name


def test_values_match_the_real_cuda_python(real_cuda: Any) -> None:
    with suppress(RuntimeError):
        text = real_cuda.cudaGetErrorString(real_cuda.cudaError_t.cudaErrorInsufficientDriver)[1]
        assert text.startswith(b"CUDA driver")
    assert isinstance(real_cuda.cudaDeviceProp().name, bytes) and int(real_cuda.cudaStream_t(5)) == 5
    assert (real_cuda.cudaHostAllocDefault, real_cuda.cudaStreamNonBlocking) == (0, 1)


@pytest.mark.usefixtures("real_cuda")
def test_open_cuda_without_a_driver_raises() -> None:
    with pytest.raises(UnavailableError, match="the NVIDIA driver is missing"):
        bindings.open_cuda("cuda")


def test_open_cuda_without_cuda_python_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(UnavailableError, match=r"cuda-python: not installed.*pip install 'hkd-det\[tensorrt\]'"):
        bindings.open_cuda("cuda:0")


COMPARE = """
import json, sys
import numpy, tensorrt as trt
for cls, names in json.loads(sys.argv[1]).items():
    missing = [name for name in names if not hasattr(getattr(trt, cls), name)]
    assert not missing, (cls, missing)
for cls, name, parameters in json.loads(sys.argv[2]):
    doc = getattr(getattr(trt, cls), name).__doc__
    assert all(f"{parameter}:" in doc for parameter in parameters), doc
assert [trt.nptype(t) for t in (trt.uint8, trt.float32, trt.int64)] == [numpy.uint8, numpy.float32, numpy.int64]
assert trt.ILogger.ERROR != trt.ILogger.INTERNAL_ERROR and "engine_host_code_allowed" in dir(trt.Runtime)
"""


@pytest.mark.slow
def test_fake_engine_matches_the_real_tensorrt(tensorrt_python: Path) -> None:
    """The fake engine and context have only methods and parameters of the real ones."""
    names = {
        "ICudaEngine": [name for name in vars(FakeEngine) if not name.startswith("_")] + ["num_io_tensors"],
        "IExecutionContext": [name for name in vars(FakeContext) if not name.startswith("_")],
        "Runtime": ["deserialize_cuda_engine"],
    }
    parameters = [
        (cls, name, list(inspect.signature(getattr(fake, name)).parameters)[1:])
        for cls, fake in (("ICudaEngine", FakeEngine), ("IExecutionContext", FakeContext))
        for name in names[cls]
        if callable(getattr(fake, name, None))
    ]
    command = [str(tensorrt_python), "-c", COMPARE, json.dumps(names), json.dumps(parameters)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
