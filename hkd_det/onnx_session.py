"""ONNX Runtime sessions: a model file on the device that was asked for, or an error."""

import importlib
import re
from pathlib import Path
from typing import Any

from hkd_det.errors import DataError, UnavailableError, UsageError

# What ONNX Runtime raises for a file it cannot load; they share no base but Exception.
LOAD_ERRORS = (
    "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelRequiresCompilation", "NoModel", "NoSuchFile",
    "NotImplemented", "RuntimeException",
)  # fmt: skip


def open_session(path: Path, device: str = "cpu", threads: int | None = None) -> Any:
    """ONNX Runtime's InferenceSession of an ONNX file on `device`: cpu, cuda or cuda:N.

    threads: CPU threads inside one operator; None leaves it to ONNX Runtime (one a physical core).
    Raises UsageError for a device or thread count that makes no sense, UnavailableError if ONNX
    Runtime or the device is not there, DataError if the file can't be loaded.
    """
    provider, options = _provider(device)
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: at least 1")
    _check_file(path)
    runtime = _import_onnxruntime()
    if provider not in runtime.get_available_providers():
        raise UnavailableError(f"--device {device}: {_GET_CUDA}")
    session = _load(runtime, path, provider, options, threads)
    _check_device(session, device, provider, options)
    return session


_GET_CUDA = (
    "the ONNX Runtime installed here has no CUDA; for an NVIDIA GPU: "
    "pip uninstall -y onnxruntime && pip install 'hkd-det[gpu]' (on Jetson: NVIDIA's own onnxruntime-gpu wheel)"
)


def _provider(device: str) -> tuple[str, dict[str, str]]:
    if device == "cpu":
        return "CPUExecutionProvider", {}
    match = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if not match:
        raise UsageError(f"--device {device}: expected cpu, cuda or cuda:0")
    return "CUDAExecutionProvider", {"device_id": match[1] or "0"}


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: a folder, not an ONNX file")
    if not path.is_file():
        raise DataError(f"{path}: no such model file; hkd-export writes one")


def _import_onnxruntime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise UnavailableError(
            "ONNX Runtime is not installed; pip install 'hkd-det[cpu]' (or 'hkd-det[gpu]')"
        ) from None
    except ImportError as error:
        raise UnavailableError(f"ONNX Runtime is installed but does not load: {_first_line(error)}") from None


def _load(runtime: Any, path: Path, provider: str, options: dict[str, str], threads: int | None) -> Any:
    settings = runtime.SessionOptions()
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 4  # fatal only: what goes wrong is raised, and said once
    if threads is not None:
        settings.intra_op_num_threads = threads
    state = runtime.capi.onnxruntime_pybind11_state
    load_errors = tuple(getattr(state, name) for name in LOAD_ERRORS if hasattr(state, name))
    try:
        return runtime.InferenceSession(str(path), settings, providers=[(provider, options)])
    except load_errors as error:
        raise DataError(
            f"{path}: ONNX Runtime {runtime.__version__} cannot load it (truncated, no ONNX file, or too new): "
            f"{_reason(error)}"
        ) from None


def _check_device(session: Any, device: str, provider: str, options: dict[str, str]) -> None:
    """ONNX Runtime takes the CPU in silence when CUDA's libraries are missing: read back what it took."""
    found = session.get_providers()[0]
    if found != provider:
        raise UnavailableError(
            f"--device {device}: ONNX Runtime has opened the model on {found} instead; "
            "CUDA or cuDNN is missing or of another version than onnxruntime-gpu was built for; "
            "try pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    taken = session.get_provider_options()[provider].get("device_id", "0")
    if taken != options.get("device_id", "0"):
        raise UnavailableError(f"--device {device}: ONNX Runtime has taken GPU {taken} instead")


def _reason(error: Exception) -> str:
    """ONNX Runtime's message without its code prefix and the path, which are said already."""
    text = _first_line(error)
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : (Load model from .*? failed: ?)?", "", text)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
