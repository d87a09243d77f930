# ruff: noqa: N802, ARG002 - the names and arguments of others
"""The TensorRT backend on a make-believe GPU: every buffer, copy and call in its order, and all given back.

The make-believe CUDA runs nothing before the stream is waited for, knows memory by its address, and fails on what is
freed twice or used afterwards. Its calls are held against the real cuda-python and the real TensorRT bindings.
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
from hkd_deploy.trt import cuda as cuda_module
from hkd_deploy.trt.engine_info import EngineInfo, TensorInfo, bytes_sha256, current_platform, write_engine
from hkd_det.errors import DataError, UnavailableError, UsageError

K = 3  # boxes a picture
HW = (4, 6)


def answer(pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """What the make-believe network says of pictures."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float32)
    scores = flat.mean(1, keepdims=True) / 255 * np.array([1, 0.5, 0.25], np.float32)
    boxes = np.broadcast_to(flat[:, None, :4], (len(pictures), K, 4)).copy()
    return boxes, scores.astype(np.float32), flat.max(1).astype(np.int64)


# cuda-python's names.
Error = IntEnum("Error", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2, "cudaErrorInsufficientDriver": 35})


class Handle:
    """A stream or a graph; `kind` is cuda-python's class of it."""

    numbers = itertools.count(1000)

    def __init__(self, kind: str) -> None:
        self.kind, self.number = kind, next(self.numbers)
        self.work: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None

    def __int__(self) -> int:
        return self.number

    def add(self, step: Callable[[], None]) -> None:
        (self.work if self.captured is None else self.captured).append(step)


class FakeCuda:
    """cuda.bindings.runtime. `fails`: the number of the call that returns an error."""

    def __init__(self, gpus: int = 2, fails: int | None = None) -> None:
        self.gpus, self.fails = gpus, fails
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.memory: dict[int, tuple[str, Any]] = {}
        self.handles: dict[int, Handle] = {}
        self.current: dict[threading.Thread, int] = {}
        self.cudaError_t = Error
        self.cudaHostAllocDefault, self.cudaStreamNonBlocking = 0, 1
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not inspect.ismethod(found) or name == "cudaGetErrorString":
            return found

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            if len(self.calls) - 1 == self.fails:
                if name == "cudaStreamEndCapture":
                    arguments[0].captured = None  # a capture that fails is over, too
                return (Error.cudaErrorMemoryAllocation, *[None] * (name not in ("cudaSetDevice",)))
            given = found(*arguments)
            return (Error.cudaSuccess,) if given is None else (Error.cudaSuccess, given)

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, error.name.encode()

    def cudaGetDeviceCount(self) -> int:
        return self.gpus

    def cudaSetDevice(self, device: int) -> None:
        self.current[threading.current_thread()] = device

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return SimpleNamespace(name=b"Orin\0\0", major=8, minor=7)

    def cudaHostAlloc(self, size: int, flags: int) -> int:
        return self._new("host", size)

    def cudaMalloc(self, size: int) -> int:
        return self._new("device", size)

    def cudaFreeHost(self, address: int) -> None:
        assert self.memory.pop(address)[0] == "host"

    def cudaFree(self, address: int) -> None:
        assert self.memory.pop(address)[0] == "device"

    def cudaStreamCreateWithFlags(self, flags: int) -> Handle:
        return self._handle("cudaStream_t")

    def cudaStreamDestroy(self, stream: Handle) -> None:
        assert not stream.work and self.handles.pop(int(stream))

    def cudaStreamSynchronize(self, stream: Handle) -> None:
        assert stream.captured is None
        while stream.work:
            stream.work.pop(0)()

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: Handle) -> None:
        sides = ("device", "host") if kind == 1 else ("host", "device")

        def copy() -> None:
            assert (self.memory[to][0], self.memory[source][0]) == sides
            assert size <= min(ctypes.sizeof(self.memory[to][1]), ctypes.sizeof(self.memory[source][1]))
            ctypes.memmove(to, source, size)

        stream.add(copy)

    def cudaStreamBeginCapture(self, stream: Handle, mode: int) -> None:
        assert not stream.work
        stream.captured = []

    def cudaStreamEndCapture(self, stream: Handle) -> Handle:
        graph = self._handle("cudaGraph_t")
        graph.work, stream.captured = stream.captured or [], None
        return graph

    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> Handle:
        runnable = self._handle("cudaGraphExec_t")
        runnable.work = list(graph.work)
        return runnable

    def cudaGraphDestroy(self, graph: Handle) -> None:
        del self.handles[int(graph)]

    def cudaGraphExecDestroy(self, graph: Handle) -> None:
        del self.handles[int(graph)]

    def cudaGraphLaunch(self, graph: Handle, stream: Handle) -> None:
        stream.work.extend(graph.work)

    def _new(self, side: str, size: int) -> int:
        assert size > 0
        block = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(block)] = (side, block)
        return ctypes.addressof(block)

    def _handle(self, kind: str) -> Handle:
        handle = Handle(kind)
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
        self.engine.executed += 1
        memory, shape = self.engine.cuda.memory, self.shape

        def compute() -> None:
            pictures = np.frombuffer(memory[self.addresses["images"]][1], np.uint8)[: prod(shape)].reshape(shape)
            for name, value in zip(("boxes", "scores", "count"), answer(pictures), strict=True):
                ctypes.memmove(self.addresses[name], value.tobytes(), value.nbytes)

        self.engine.cuda.handles[stream_handle].add(compute)
        return True


class FakeEngine:
    """ICudaEngine of a fixed shape, or of batches `smallest` to `largest`."""

    def __init__(
        self, cuda: FakeCuda, smallest: int, largest: int, boxes: str = "boxes", succeeds: bool = True
    ) -> None:
        self.cuda, self.succeeds, self.executed = cuda, succeeds, 0
        self.limits = [(batch, *HW, 3) for batch in (smallest, smallest, largest)]
        self.shape = (smallest if smallest == largest else -1, *HW, 3)
        self.names = ["images", boxes, "scores", "count"]
        self.num_io_tensors = 4

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> str:
        return {"images": "uint8", "count": "int64"}.get(name, "float32")

    def get_tensor_shape(self, name: str) -> list[int]:
        return [*self.shape]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return self.limits

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


class FakeTensorRT:
    """The module `tensorrt`; its runtime opens whatever engine it was given, once it is asked to."""

    __version__ = "10.3.0"
    nptype = staticmethod(np.dtype)

    class ILogger:
        ERROR, INTERNAL_ERROR = "ERROR", "INTERNAL_ERROR"

        def __init__(self) -> None:
            """As the real one must be called."""

    def __init__(self, engine: FakeEngine | None) -> None:
        self.engine, self.opened = engine, list[bytes]()

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> FakeEngine | None:
            self.opened.append(plan)
            if self.engine is None:
                logger.log("ERROR", "the plan's\nmagic tag is wrong")
            return self.engine

        return SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=False)


def facts(**changes: Any) -> EngineInfo:
    known: dict[str, Any] = {
        "format": 1, "tensorrt": "10.3.0", "gpu": "Orin", "sm": "8.7", "platform": current_platform(), "compatible": [],
        "dla": None, "precision_asked": "fp16", "precision_found": {"fp16": 3},
        "inputs": [TensorInfo("images", "UINT8", [1, *HW, 3])], "outputs": [], "profile": None, "workspace_mib": 1024,
        "context_mib": 1.5, "build_s": 2.0, "date": "2026-01-02T03:04:05+00:00", "source": "tiny.onnx",
        "source_sha256": "0f" * 32, "engine_sha256": bytes_sha256(b"plan"), "metadata": {"hkd.model": "tiny"},
    }  # fmt: skip
    return EngineInfo(**(known | changes))


class Board:
    """A machine with a make-believe GPU and TensorRT, and an engine on its disk."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self._monkeypatch = folder / "tiny.engine", monkeypatch
        self.put()
        self.write()

    def put(self, smallest: int = 1, largest: int = 1, fails: int | None = None, **engine: Any) -> None:
        self.cuda = FakeCuda(fails=fails)
        self.engine = FakeEngine(self.cuda, smallest, largest, **engine)
        self.use(FakeTensorRT(self.engine))

    def use(self, trt: Any) -> None:
        self.trt = trt
        modules = {"tensorrt": trt, "cuda.bindings.runtime": self.cuda}
        self._monkeypatch.setattr(importlib, "import_module", lambda name: modules[name])

    def write(self, **changes: Any) -> None:
        write_engine(self.path, b"plan", facts(**changes))

    def all_given_back(self) -> bool:
        return not self.cuda.memory and not self.cuda.handles


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    return Board(tmp_path, monkeypatch)


def pictures(batch: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (batch, *HW, 3)).astype(np.uint8)


def assert_answers(found: tuple[NDArray[Any], ...], asked: NDArray[np.uint8]) -> None:
    for value, wanted in zip(found, answer(asked), strict=True):
        assert value.dtype == wanted.dtype
        np.testing.assert_array_equal(value, wanted)


def test_a_fixed_engine_answers_and_gives_all_back(board: Board) -> None:
    with open_tensorrt(board.path) as engine:
        assert (engine.batch, engine.max_batch, engine.input_hw, engine.device) == (1, 1, HW, "cuda")
        assert engine.metadata == {"hkd.model": "tiny"} and engine.path == board.path
        first, second = pictures(1, 0), pictures(1, 1)
        kept = engine.run(first)
        assert_answers(engine.run(second), second)
        assert_answers(kept, first)  # not a view of memory that the next call writes to
    assert board.all_given_back()


def test_a_fixed_shape_is_one_graph_launch(board: Board) -> None:
    with open_tensorrt(board.path) as engine:
        before = len(board.cuda.calls)
        for seed in range(3):
            engine.run(pictures(1, seed))
        assert board.engine.executed == 2  # once to warm up, once while it is captured
        assert (
            board.cuda.names()[before:]
            == ["cudaSetDevice", "cudaGraphLaunch", "cudaSetDevice", "cudaStreamSynchronize"] * 3
        )


@pytest.mark.parametrize("how", ["asked", "dla"])
def test_without_a_graph_the_calls_are_made_one_by_one(board: Board, how: str) -> None:
    board.write(dla=0 if how == "dla" else None)
    with open_tensorrt(board.path, use_cuda_graph=how != "asked") as engine:
        assert_answers(engine.run(pictures(1, 0)), pictures(1, 0))
        assert "cudaGraphLaunch" not in board.cuda.names() and board.engine.executed == 1
    assert board.all_given_back()


def test_any_batch_of_the_profile(board: Board) -> None:
    board.put(smallest=1, largest=4)
    with open_tensorrt(board.path) as engine:
        assert (engine.batch, engine.max_batch) == (None, 4)
        for batch in (4, 1, 3, 3, 2):
            found = engine.run(pictures(batch, batch))
            assert found[0].shape == (batch, K, 4)
            assert_answers(found, pictures(batch, batch))
    assert board.all_given_back()


def test_the_pipeline_hears_what_is_free(board: Board) -> None:
    board.put(smallest=1, largest=4)
    with open_backend(board.path, "cuda") as opened:
        assert (opened.name, opened.max_batch, opened.runtime.batch, opened.runtime.input_hw) == (
            "tensorrt",
            4,
            None,
            HW,
        )
    board.put()
    board.engine.shape = (1, -1, -1, 3)
    board.engine.limits = [(1, 32, 32, 3), (1, *HW, 3), (1, *HW, 3)]
    with open_backend(board.path, "cuda") as opened:
        assert (opened.max_batch, opened.runtime.batch, opened.runtime.input_hw) == (1, 1, None)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((5, *HW, 3), np.uint8),
        np.zeros((0, *HW, 3), np.uint8),
        np.zeros((1, *HW, 4), np.uint8),
        np.zeros((1, 5, 6, 3), np.uint8),
        np.zeros((*HW, 3), np.uint8),
        np.zeros((1, *HW, 3), np.float32),
    ],
)
def test_what_does_not_fit_is_refused_before_the_gpu_hears_of_it(board: Board, wrong: NDArray[Any]) -> None:
    board.put(smallest=1, largest=4)
    with open_tensorrt(board.path) as engine:
        before = len(board.cuda.calls)
        with pytest.raises((ValueError, DataError), match=r"takes uint8 \(1, 4, 6, 3\) to \(4, 4, 6, 3\), not"):
            engine.run(wrong)
        assert len(board.cuda.calls) == before
        assert_answers(engine.run(pictures(2, 0)), pictures(2, 0))


@pytest.mark.parametrize("largest", [1, 2])
def test_whatever_cuda_call_fails_all_is_given_back(board: Board, largest: int) -> None:
    def session() -> None:
        with open_tensorrt(board.path) as engine:
            engine.run(pictures(1, 0))
            with engine.open_async_queue(2) as flying:
                flying.submit(pictures(1, 0))
                flying.collect()

    board.put(largest=largest)
    session()
    names = board.cuda.names()
    assert len(names) > 40
    giving_back = ("cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaGraphDestroy", "cudaGraphExecDestroy")
    for number, name in enumerate(names):
        if name in giving_back:
            continue
        board.put(largest=largest, fails=number)
        with pytest.raises(UnavailableError, match=f"--device cuda:0: {name}: cudaErrorMemoryAllocation"):
            session()
        assert board.all_given_back(), (number, name)


def test_batches_in_flight_come_back_in_order(board: Board) -> None:
    board.put(largest=2)
    with open_tensorrt(board.path) as engine:
        with engine.open_async_queue(3) as flying:
            for seed, batch in enumerate((1, 2, 1)):
                flying.submit(pictures(batch, seed))
            assert len(flying) == 3
            waits = board.cuda.names().count("cudaStreamSynchronize")
            with pytest.raises(ValueError, match="3 batches are in flight already"):
                flying.submit(pictures(1, 9))
            assert_answers(flying.collect(), pictures(1, 0))
            assert board.cuda.names().count("cudaStreamSynchronize") == waits + 1  # only the oldest was waited for
            flying.submit(pictures(2, 3))
            assert_answers(engine.run(pictures(2, 7)), pictures(2, 7))  # beside the queue
            for seed, batch in ((1, 2), (2, 1), (3, 2)):
                assert_answers(flying.collect(), pictures(batch, seed))
            with pytest.raises(ValueError, match="nothing is in flight"):
                flying.collect()
        assert len(board.cuda.handles) == 1  # the plain run's stream
    assert board.all_given_back()


def test_a_queue_left_while_batches_fly(board: Board) -> None:
    with open_tensorrt(board.path) as engine, engine.open_async_queue(2) as flying:
        flying.submit(pictures(1, 0))
    assert board.all_given_back()


@pytest.mark.parametrize("batch", [3, 5])
def test_a_batch_outside_the_profile_is_the_users_to_mend(board: Board, batch: int) -> None:
    """A frame that the command line brings may be of any size, a list of any length: no programming error."""
    board.put(smallest=4, largest=4)
    with (
        open_tensorrt(board.path) as engine,
        pytest.raises(DataError, match=r"; build it for that: .* --trt --profile SMALLEST,USUAL,LARGEST"),
    ):
        engine.run(pictures(batch, 0))


def test_a_batch_that_does_not_fit_takes_no_slot(board: Board) -> None:
    with open_tensorrt(board.path) as engine, engine.open_async_queue(1) as flying:
        with pytest.raises(DataError, match="takes uint8"):
            flying.submit(pictures(2, 0))
        flying.submit(pictures(1, 0))
        assert_answers(flying.collect(), pictures(1, 0))


def test_threads_take_turns(board: Board) -> None:
    board.put(largest=4)
    wrong: list[BaseException] = []

    def ask(engine: TensorRTBackend, batch: int) -> None:
        try:
            for seed in range(20):
                assert_answers(engine.run(pictures(batch, seed)), pictures(batch, seed))
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            wrong.append(error)

    with open_tensorrt(board.path, "cuda:1") as engine:
        threads = [threading.Thread(target=ask, args=(engine, batch)) for batch in (1, 2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(board.cuda.current) == 5 and set(board.cuda.current.values()) == {1}  # each thread was told its GPU


def test_a_closed_engine_says_so(board: Board) -> None:
    with open_tensorrt(board.path) as engine:
        pass
    engine.close()
    with pytest.raises(ValueError, match="this model has been closed"):
        engine.run(pictures(1, 0))
    with pytest.raises(ValueError, match="this model has been closed"), engine.open_async_queue():
        pass


def test_a_call_of_tensorrt_that_fails(board: Board) -> None:
    board.put(succeeds=False)
    with (
        pytest.raises(UnavailableError, match=r"tiny.engine: TensorRT's set_input_shape.* failed"),
        open_tensorrt(board.path),
    ):
        pass
    assert board.all_given_back()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensorrt": "10.7.0"}, "built for TensorRT 10.7.0, this machine has TensorRT 10.3.0"),
        ({"gpu": "NVIDIA L4", "sm": "8.9"}, r"built for NVIDIA L4 \(SM 8.9\), this machine has Orin \(SM 8.7\)"),
        ({"platform": "windows-amd64"}, "built for windows-amd64, this machine has linux-"),
    ],
)
def test_an_engine_of_another_machine_is_not_even_opened(board: Board, changes: dict[str, Any], words: str) -> None:
    board.write(**changes)
    with (
        pytest.raises(UnavailableError, match=f"{words}.*; build it here: hkd-export tiny.onnx --trt"),
        open_tensorrt(board.path),
    ):
        pass
    assert board.trt.opened == []


@pytest.mark.parametrize("content", [b"", b"pla", b"plan!"])
def test_a_truncated_or_changed_engine_is_not_even_opened(board: Board, content: bytes) -> None:
    board.path.write_bytes(content)
    with (
        pytest.raises(DataError, match="truncated or changed since it was built; build it here"),
        open_tensorrt(board.path),
    ):
        pass
    assert board.trt.opened == []


def test_an_engine_that_does_not_open(board: Board) -> None:
    board.use(FakeTensorRT(None))
    with (
        pytest.raises(DataError, match=r"10\.3\.0 does not open it: the plan's magic tag is wrong$"),
        open_tensorrt(board.path),
    ):
        pass


def test_an_engine_of_someone_else(board: Board) -> None:
    board.put(boxes="output0")
    with pytest.raises(DataError, match=r"not an engine of hkd-export: .*output0"), open_tensorrt(board.path):
        pass


@pytest.mark.parametrize(
    ("device", "kind", "words"),
    [
        ("cpu", UsageError, "--device cpu: an engine runs on a GPU"),
        ("cuda:2", UnavailableError, r"--device cuda:2: this machine has 2 GPU\(s\), counted from 0"),
    ],
)
def test_a_device_that_is_not_there(board: Board, device: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words), open_tensorrt(board.path, device):
        pass


def recorded(board: Board) -> list[tuple[str, tuple[Any, ...]]]:
    with open_tensorrt(board.path) as engine:
        engine.run(pictures(1, 0))
    return board.cuda.calls


@pytest.fixture
def real_cuda() -> Any:
    """cuda-python itself, where no GPU can come to harm."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    try:
        error, _ = runtime.cudaGetDeviceCount()
    except RuntimeError:
        return runtime  # cuda-python 12.6 without the driver's library
    if error == runtime.cudaError_t.cudaSuccess:
        pytest.skip("a real GPU is here")
    return runtime


def test_cuda_python_takes_every_call_as_it_is_made(real_cuda: Any, board: Board) -> None:
    """Without a driver a call of the right form fails with CUDA's error, and one of the wrong form with Python's."""
    calls = recorded(board)
    assert len({name for name, _ in calls}) == 17
    real = {1: real_cuda.cudaMemcpyKind(1), 2: real_cuda.cudaMemcpyKind(2)}
    mode = real_cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    for name, arguments in calls:
        given = [getattr(real_cuda, value.kind)(0) if isinstance(value, Handle) else value for value in arguments]
        if name == "cudaMemcpyAsync":
            given[:2], given[3] = [0, 0], real[given[3]]
        if name in ("cudaFree", "cudaFreeHost"):
            given = [0]
        if name == "cudaStreamBeginCapture":
            given[1] = mode
        with suppress(RuntimeError):  # cuda-python 12.6 says so that there is no driver
            error, *values = getattr(real_cuda, name)(*given)
            assert isinstance(error, real_cuda.cudaError_t) and len(values) <= 1, name
        documented = re.match(rf"{name}\((.*?)\)", getattr(real_cuda, name).__doc__.strip())
        assert documented is not None and len([part for part in documented[1].split(",") if part]) == len(given), name
    with suppress(RuntimeError):
        words = real_cuda.cudaGetErrorString(real_cuda.cudaError_t.cudaErrorInsufficientDriver)[1]
        assert words.startswith(b"CUDA driver")
    assert isinstance(real_cuda.cudaDeviceProp().name, bytes) and int(real_cuda.cudaStream_t(5)) == 5
    assert (real_cuda.cudaHostAllocDefault, real_cuda.cudaStreamNonBlocking) == (0, 1)


def test_without_a_driver(real_cuda: Any) -> None:  # noqa: ARG001 - there is none where this fixture is
    with pytest.raises(UnavailableError, match="no NVIDIA driver here"):
        cuda_module.open_cuda("cuda")


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(UnavailableError, match=r"cuda-python is not installed.*pip install 'hkd-det\[tensorrt\]'"):
        cuda_module.open_cuda("cuda:0")


REAL = """
import json, sys
import numpy, tensorrt as trt
for kind, names in json.loads(sys.argv[1]).items():
    missing = [name for name in names if not hasattr(getattr(trt, kind), name)]
    assert not missing, (kind, missing)
for kind, name, wanted in json.loads(sys.argv[2]):
    line = getattr(getattr(trt, kind), name).__doc__
    assert all(f"{word}:" in line for word in wanted), line
assert [trt.nptype(t) for t in (trt.uint8, trt.float32, trt.int64)] == [numpy.uint8, numpy.float32, numpy.int64]
assert trt.ILogger.ERROR != trt.ILogger.INTERNAL_ERROR and "engine_host_code_allowed" in dir(trt.Runtime)
"""


@pytest.mark.slow
def test_tensorrt_has_every_call(tensorrt_python: Path) -> None:
    """The make-believe engine and context have no method that the real ones lack, nor other arguments."""
    public = {
        "ICudaEngine": [name for name in vars(FakeEngine) if not name.startswith("_")] + ["num_io_tensors"],
        "IExecutionContext": [name for name in vars(FakeContext) if not name.startswith("_")],
        "Runtime": ["deserialize_cuda_engine"],
    }
    arguments = [
        (kind, name, list(inspect.signature(getattr(fake, name)).parameters)[1:])
        for kind, fake in (("ICudaEngine", FakeEngine), ("IExecutionContext", FakeContext))
        for name in public[kind]
        if callable(getattr(fake, name, None))
    ]
    command = [str(tensorrt_python), "-c", REAL, json.dumps(public), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
