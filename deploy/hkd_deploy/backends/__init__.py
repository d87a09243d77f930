"""Which runtime opens a model: the one that was asked for, else the one of the file's kind."""

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
    """An open model. name: of BACKENDS.

    parallel: calls at once that make the most of the device. max_batch: most pictures a call takes where
    `runtime.batch` is None; None for any number.
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
    """Open a model file or OpenVINO folder on `device`, with `backend` and nothing else; None goes by the file.

    Raises UsageError, DataError or UnavailableError, each saying what to do. A runtime is imported when it is used.
    """
    name = backend or default_backend(path)
    if performance_hint != "latency" and not name.startswith("openvino"):
        raise UsageError(f"hint {performance_hint}: only for openvino, not for {name}")
    match name:
        case "onnxruntime" | "ort-tensorrt" | "ort-tensorrt-rtx":
            from hkd_deploy.backends.onnxruntime import (  # noqa: PLC0415
                make_tensorrt_provider,
                make_tensorrt_rtx_provider,
                open_onnx_runtime,  # noqa: PLC0415
            )

            providers = {"ort-tensorrt": make_tensorrt_provider, "ort-tensorrt-rtx": make_tensorrt_rtx_provider}
            provider = providers[name](path, device) if name in providers else None
            with open_onnx_runtime(path, device, threads, provider) as session:
                yield OpenedBackend(session, name)
        case "openvino" | "openvino-bf16":
            from hkd_deploy.backends.openvino import open_openvino  # noqa: PLC0415

            precision: Literal["bf16"] | None = "bf16" if name == "openvino-bf16" else None
            with open_openvino(path, device, threads, precision, performance_hint) as compiled:
                yield OpenedBackend(compiled, name, compiled.num_requests if performance_hint == "throughput" else 1)
        case "tensorrt" if path.suffix == ".onnx":
            raise UsageError(f"{path}: TensorRT runs an engine of it: hkd-export {path} --trt makes one here")
        case "tensorrt":
            from hkd_deploy.backends.tensorrt import open_tensorrt  # noqa: PLC0415

            with open_tensorrt(path, device) as engine:
                yield OpenedBackend(engine, name, max_batch=engine.max_batch)
        case _:
            raise UsageError(f"--backend {name}: expected {', '.join(BACKENDS)}")


def default_backend(path: Path) -> str:
    """The runtime of a file's kind. Raises DataError for a file that is missing or of another kind."""
    if path.is_dir() or path.suffix == ".xml":
        return "openvino"
    if not path.exists():
        raise DataError(f"{path}: no such model file; hkd-export writes one")
    match path.suffix:
        case ".onnx":
            return "onnxruntime"
        case ".engine" | ".plan":
            return "tensorrt"
        case ".pt":
            raise DataError(f"{path}: weights, which run nowhere by themselves; hkd-export {path} makes an .onnx file")
    raise DataError(f"{path}: expected an .onnx file, an .engine file or an OpenVINO folder")
