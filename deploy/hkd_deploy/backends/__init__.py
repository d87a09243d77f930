"""Selection of the runtime that opens a model file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hkd_deploy.backends.base import Backend, PerformanceHint
from hkd_det.errors import DataError, UsageError

BACKENDS = ("onnxruntime", "openvino", "openvino-bf16", "tensorrt", "ort-tensorrt", "ort-tensorrt-rtx")


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


@contextmanager
def open_backend(
    path: Path,
    device: str = "cpu",
    threads: int | None = None,
    backend: str | None = None,
    performance_hint: PerformanceHint = "latency",
) -> Iterator[OpenedBackend]:
    """Open a model file or OpenVINO directory on exactly the requested device.

    The function imports a runtime only if it is used.

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
    name = backend or default_backend(path)
    if performance_hint != "latency" and not name.startswith("openvino"):
        raise UsageError(f"performance_hint {performance_hint}: backend {name} supports latency only. Use openvino.")
    match name:
        case "onnxruntime" | "ort-tensorrt" | "ort-tensorrt-rtx":
            # Runtimes are imported here: each takes up to a second, and most devices have only one.
            from hkd_deploy.backends import onnxruntime  # noqa: PLC0415

            providers = {
                "ort-tensorrt": onnxruntime.make_tensorrt_provider,
                "ort-tensorrt-rtx": onnxruntime.make_tensorrt_rtx_provider,
            }
            provider = providers[name](path, device) if name in providers else None
            with onnxruntime.open_onnx_runtime(path, device, threads, provider) as session:
                yield OpenedBackend(session, name)
        case "openvino" | "openvino-bf16":
            from hkd_deploy.backends.openvino import open_openvino  # noqa: PLC0415 - see above

            precision: Literal["bf16"] | None = "bf16" if name == "openvino-bf16" else None
            with open_openvino(path, device, threads, precision, performance_hint) as compiled:
                yield OpenedBackend(compiled, name, compiled.num_requests if performance_hint == "throughput" else 1)
        case "tensorrt" if path.suffix == ".onnx":
            raise UsageError(f"{path}: --backend tensorrt expects an engine. Build one with hkd-export {path} --trt.")
        case "tensorrt":
            from hkd_deploy.backends.tensorrt import open_tensorrt  # noqa: PLC0415 - see above

            with open_tensorrt(path, device) as engine:
                yield OpenedBackend(engine, name, max_batch=engine.max_batch)
        case _:
            raise UsageError(f"--backend {name}: expected one of {', '.join(BACKENDS)}.")


def default_backend(path: Path) -> str:
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
            raise DataError(f"{path}: a checkpoint, which no backend opens. Create an .onnx file: hkd-export {path}.")
    raise DataError(f"{path}: expected an .onnx file, an .engine file or an OpenVINO directory.")
