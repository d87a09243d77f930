"""ONNX Runtime sessions on exactly the requested device."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hkd_det.config import check_range
from hkd_det.errors import DataError, UnavailableError, UsageError, first_error_line, import_package

# Exceptions of ONNX Runtime for a file that it cannot load. Their only common base is Exception.
LOAD_ERRORS = (
    "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelRequiresCompilation", "NoModel", "NoSuchFile",
    "NotImplemented", "RuntimeException",
)  # fmt: skip
_CUDA_MISSING_HINT = (
    "the installed ONNX Runtime has no CUDA provider. For an NVIDIA GPU: "
    "pip uninstall -y onnxruntime && pip install 'hkd-det[gpu]' (on Jetson: NVIDIA's own onnxruntime-gpu wheel)."
)
_CUDA_FAILURE_HINT = (
    "CUDA or cuDNN is missing, or onnxruntime-gpu was built for another version. "
    "Try pip install 'onnxruntime-gpu[cuda,cudnn]'."
)


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime and its options.

    Attributes:
        name: Name of the provider in ONNX Runtime.
        missing_hint: Problem and remedy if ONNX Runtime does not have this provider; the end of the message.
        failure_hint: Remedy if the provider does not start, as sentences.
        options: Provider options.
        extra_providers: Providers, with options, for operators that this one does not support. ONNX Runtime
            always adds the CPU provider.
        devices: Devices of a plug-in provider.
    """

    name: str
    missing_hint: str
    failure_hint: str
    options: Mapping[str, str] = field(default_factory=dict)
    extra_providers: tuple[tuple[str, Mapping[str, str]], ...] = ()
    devices: tuple[Any, ...] = ()


def open_session(
    path: Path,
    device: str = "cpu",
    threads: int | None = None,
    provider: Provider | None = None,
    disable_quant_qdq: bool = False,
) -> Any:
    """Open an ONNX file with ONNX Runtime.

    Args:
        path: ONNX file.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads per operator (default: one per physical core).
        provider: Execution provider (default: the CPU or CUDA provider of `device`).
        disable_quant_qdq: Run the operators between Q/DQ nodes of an INT8 file in floating point, instead of
            fusing them to integer operators.

    Returns:
        The `onnxruntime.InferenceSession`.

    Raises:
        UsageError: The device or the number of threads is invalid.
        DataError: The file is missing or cannot be loaded.
        UnavailableError: ONNX Runtime, the provider or the device is not available.
    """
    provider = provider or _select_provider(device)
    if threads is not None:
        check_range("--threads", threads, 1)
    _check_file(path)
    runtime = import_onnxruntime()
    if not provider.devices and provider.name not in runtime.get_available_providers():
        raise UnavailableError(f"--device {device}: {provider.missing_hint}")
    session = _create_session(runtime, path, provider, threads, disable_quant_qdq)
    _check_device(session, device, provider)
    _check_utf8(session, path)
    return session


def parse_gpu_index(device: str) -> str | None:
    """Parse a device name.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Returns:
        The index N as a string ("0" for "cuda"), or None for the CPU.

    Raises:
        UsageError: The name has another form.
    """
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if not match:
        raise UsageError(f"--device: expected cpu, cuda or cuda:N, got {device}.")
    return match[1] or "0"


def _select_provider(device: str) -> Provider:
    index = parse_gpu_index(device)
    if index is None:
        return Provider(
            "CPUExecutionProvider",
            missing_hint="the installed ONNX Runtime has no CPU provider. Install ONNX Runtime again.",
            failure_hint="Install ONNX Runtime again.",
        )
    return Provider("CUDAExecutionProvider", _CUDA_MISSING_HINT, _CUDA_FAILURE_HINT, {"device_id": index})


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: expected an ONNX file, got a directory.")
    if not path.is_file():
        raise DataError(f"{path}: no such model file. Create it with hkd-export.")


def import_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Returns:
        The module `onnxruntime`.

    Raises:
        UnavailableError: It is not installed, or does not load.
    """
    return import_package("onnxruntime", "ONNX Runtime", "Run pip install 'hkd-det[cpu]' (or 'hkd-det[gpu]').")


def _create_session(runtime: Any, path: Path, provider: Provider, threads: int | None, disable_quant_qdq: bool) -> Any:
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # fatal only: errors are raised, not logged
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_quant_qdq", "1" if disable_quant_qdq else "0")
    arguments: dict[str, Any] = {"providers": [(provider.name, dict(provider.options)), *provider.extra_providers]}
    if provider.devices:
        options.add_provider_for_devices(list(provider.devices), dict(provider.options))
        arguments = {}
    state = runtime.capi.onnxruntime_pybind11_state
    load_errors = tuple(getattr(state, name) for name in LOAD_ERRORS if hasattr(state, name))
    try:
        # With enable_fallback, ONNX Runtime would replace a failing provider by the CPU provider.
        return runtime.InferenceSession(str(path), options, enable_fallback=0, **arguments)
    except UnicodeDecodeError:  # in the error message of ONNX Runtime
        raise _make_damaged_error(path) from None
    except load_errors as error:
        raise DataError(
            f"{path}: ONNX Runtime {runtime.__version__} cannot load it (truncated, not an ONNX file, or too new): "
            f"{_format_load_error(error)}. Export the model again, or update ONNX Runtime."
        ) from None
    except (RuntimeError, ValueError, getattr(state, "EPFail", RuntimeError)) as error:
        raise UnavailableError(
            f"{provider.name} does not start: {_format_load_error(error)}. {provider.failure_hint}"
        ) from None


def _check_device(session: Any, device: str, provider: Provider) -> None:
    """Compare the opened provider and GPU with the request: ONNX Runtime only logs a fallback to the CPU."""
    actual = session.get_providers()[0]
    if actual != provider.name:
        raise UnavailableError(
            f"--device {device}: ONNX Runtime opened the model on {actual} instead of {provider.name}. "
            f"{provider.failure_hint}"
        )
    if "device_id" not in provider.options:
        return
    index = session.get_provider_options()[provider.name].get("device_id", "0")
    if index != provider.options["device_id"]:
        raise UnavailableError(
            f"--device {device}: ONNX Runtime opened the model on GPU {index} instead. {provider.failure_hint}"
        )


def _check_utf8(session: Any, path: Path) -> None:
    """Check that names and metadata are UTF-8. ONNX Runtime raises on each access otherwise."""
    try:
        _ = session.get_modelmeta().custom_metadata_map
        _ = [(value.name, value.shape) for value in (*session.get_inputs(), *session.get_outputs())]
    except UnicodeDecodeError:
        raise _make_damaged_error(path) from None


def _make_damaged_error(path: Path) -> DataError:
    return DataError(f"{path}: damaged: a name or the metadata is not UTF-8. Export the model again.")


def _format_load_error(error: Exception) -> str:
    """Return the message of ONNX Runtime without its code prefix, the model path and paths of its source code."""
    text = first_error_line(error)
    opset = re.search(r"Opset (\d+) .* till opset (\d+)", text)
    if opset:
        return f"its opset is {opset[1]}, this version supports up to {opset[2]}"
    missing = re.search(r"Could not find an implementation for (\w+)", text)
    if missing:
        return f"it has no {missing[1]} for the number type of this file; a bf16 file requires TensorRT"
    text = re.sub(r" ?/\S+\.(?:h|cc):\d+ .*?\) (?=[A-Z])", " ", text)
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : (Load model from .*? failed: ?)?", "", text)
