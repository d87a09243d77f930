"""Selection of the runtime that opens a model file.

A new backend is one file with a class of the interface `Backend`, and one row in `BACKENDS`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hkd_deploy.backends.base import Backend, PerformanceHint
from hkd_det.errors import DataError, UsageError


@dataclass(frozen=True)
class OpenRequest:
    """Arguments of `open_backend`, for the function that opens the model.

    Attributes:
        path: The model file or OpenVINO directory.
        device: cpu, cuda or cuda:N.
        threads: Number of CPU threads per operator. None for the default of the runtime.
        performance_hint: Optimize for `latency` or `throughput`.
    """

    path: Path
    device: str
    threads: int | None
    performance_hint: PerformanceHint


@dataclass(frozen=True)
class OpenedBackend:
    """An opened model with its execution limits.

    Attributes:
        runtime: The opened model.
        name: Name of the backend, one of `BACKENDS`.
        num_requests: Number of concurrent calls that use the device fully.
        max_batch: Largest batch of a call if `runtime.batch` is None. None for no limit.
    """

    runtime: Backend
    name: str
    num_requests: int = 1
    max_batch: int | None = None


# The runtimes are imported inside these functions: each takes up to a second, and most devices have only one.


@contextmanager
def _open_onnxruntime(request: OpenRequest) -> Iterator[OpenedBackend]:
    from hkd_deploy.backends.onnxruntime import open_onnx_runtime  # noqa: PLC0415 - see above

    with open_onnx_runtime(request.path, request.device, request.threads) as session:
        yield OpenedBackend(session, "onnxruntime")


@contextmanager
def _open_ort_tensorrt(request: OpenRequest) -> Iterator[OpenedBackend]:
    from hkd_deploy.backends.onnxruntime import make_tensorrt_provider, open_onnx_runtime  # noqa: PLC0415 - see above

    provider = make_tensorrt_provider(request.path, request.device)
    with open_onnx_runtime(request.path, request.device, request.threads, provider) as session:
        yield OpenedBackend(session, "ort-tensorrt")


@contextmanager
def _open_ort_tensorrt_rtx(request: OpenRequest) -> Iterator[OpenedBackend]:
    from hkd_deploy.backends.onnxruntime import (  # noqa: PLC0415 - see above
        make_tensorrt_rtx_provider,
        open_onnx_runtime,
    )

    provider = make_tensorrt_rtx_provider(request.path, request.device)
    with open_onnx_runtime(request.path, request.device, request.threads, provider) as session:
        yield OpenedBackend(session, "ort-tensorrt-rtx")


@contextmanager
def _open_openvino(request: OpenRequest) -> Iterator[OpenedBackend]:
    from hkd_deploy.backends.openvino import open_openvino  # noqa: PLC0415 - see above

    hint = request.performance_hint
    with open_openvino(request.path, request.device, request.threads, None, hint) as compiled:
        yield OpenedBackend(compiled, "openvino", compiled.num_requests if hint == "throughput" else 1)


@contextmanager
def _open_openvino_bf16(request: OpenRequest) -> Iterator[OpenedBackend]:
    from hkd_deploy.backends.openvino import open_openvino  # noqa: PLC0415 - see above

    hint = request.performance_hint
    with open_openvino(request.path, request.device, request.threads, "bf16", hint) as compiled:
        yield OpenedBackend(compiled, "openvino-bf16", compiled.num_requests if hint == "throughput" else 1)


@contextmanager
def _open_tensorrt(request: OpenRequest) -> Iterator[OpenedBackend]:
    from hkd_deploy.backends.tensorrt import open_tensorrt  # noqa: PLC0415 - see above

    path = request.path
    if path.suffix == ".onnx":
        raise UsageError(
            f"--backend tensorrt: expected an .engine file, got {path}. Build one with hkd-export {path} --trt."
        )
    with open_tensorrt(path, request.device) as engine:
        yield OpenedBackend(engine, "tensorrt", max_batch=engine.max_batch)


BACKENDS: dict[str, Callable[[OpenRequest], AbstractContextManager[OpenedBackend]]] = {
    "onnxruntime": _open_onnxruntime,
    "openvino": _open_openvino,
    "openvino-bf16": _open_openvino_bf16,
    "tensorrt": _open_tensorrt,
    "ort-tensorrt": _open_ort_tensorrt,
    "ort-tensorrt-rtx": _open_ort_tensorrt_rtx,
}


@contextmanager
def open_backend(
    path: Path,
    device: str = "cpu",
    threads: int | None = None,
    backend: str | None = None,
    performance_hint: PerformanceHint = "latency",
) -> Iterator[OpenedBackend]:
    """Open a model file or OpenVINO directory on exactly the requested device.

    Args:
        path: An .onnx file, an .engine file or an OpenVINO directory.
        device: cpu, cuda or cuda:N.
        threads: Number of CPU threads per operator. None for the default of the runtime.
        backend: One of `BACKENDS`. None selects the backend by the file type.
        performance_hint: `throughput` optimizes OpenVINO for concurrent calls. Other backends accept `latency` only.

    Yields:
        The opened model.

    Raises:
        UsageError: An argument is invalid, or the backend does not support it.
        DataError: The file is missing, damaged or not a model of `hkd-export`.
        UnavailableError: The runtime or the device is missing.
    """
    name = backend or get_default_backend(path)
    if name not in BACKENDS:
        raise UsageError(f"--backend: expected one of {', '.join(BACKENDS)}, got {name}.")
    if performance_hint != "latency" and not name.startswith("openvino"):
        raise UsageError(f"performance_hint {performance_hint}: backend {name} supports latency only. Use openvino.")
    with BACKENDS[name](OpenRequest(path, device, threads, performance_hint)) as opened:
        yield opened


def get_default_backend(path: Path) -> str:
    """Return the backend for a file type.

    Args:
        path: A model file or OpenVINO directory.

    Returns:
        Name of the backend: onnxruntime, openvino or tensorrt.

    Raises:
        DataError: The file is missing, or no backend opens its type.
    """
    if path.is_dir() or path.suffix == ".xml":
        return "openvino"
    if not path.exists():
        raise DataError(f"{path}: no such model file. Create it with hkd-export.")
    match path.suffix:
        case ".onnx":
            return "onnxruntime"
        case ".engine" | ".plan":
            return "tensorrt"
        case ".pt":
            raise DataError(
                f"{path}: expected an exported model, got a checkpoint. Create an .onnx file with hkd-export {path}."
            )
    raise DataError(
        f"{path}: expected an .onnx file, an .engine file or an OpenVINO directory. Create one with hkd-export."
    )
