"""ONNX Runtime sessions: a model file on the device that was asked for, or an error."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hkd_det.errors import DataError, UnavailableError, UsageError, first_error_line, import_package

# What ONNX Runtime raises for a file it cannot load; they share no base but Exception.
LOAD_ERRORS = (
    "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelRequiresCompilation", "NoModel", "NoSuchFile",
    "NotImplemented", "RuntimeException",
)  # fmt: skip


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime and its options, both as ONNX Runtime names them.

    absent, broken: what to say where ONNX Runtime has no such provider, and where it has but takes another in silence.
    others: providers for the operators that it does not take; the CPU's is always among them.
    devices: of a provider that is a plugin, what it runs on.
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
    """ONNX Runtime's InferenceSession of an ONNX file on `device`: cpu, cuda or cuda:N.

    threads: CPU threads inside one operator; None leaves it to ONNX Runtime (one a physical core).
    provider: by default ONNX Runtime's own for the device.
    plain_qdq: reckon between an INT8 file's Q/DQ nodes in floats, instead of making integer operators of them.
    Raises UsageError for a device or thread count that makes no sense, UnavailableError if ONNX
    Runtime or the device is not there, DataError if the file can't be loaded.
    """
    taken = provider or _select_provider(device)
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: at least 1")
    _check_file(path)
    runtime = import_onnxruntime()
    if not taken.devices and taken.name not in runtime.get_available_providers():
        raise UnavailableError(f"--device {device}: {taken.missing_hint}")
    session = _create_session(runtime, path, taken, threads, disable_quant_qdq)
    _check_device(session, device, taken)
    _check_utf8(session, path)
    return session


_CUDA_MISSING_HINT = (
    "the ONNX Runtime installed here has no CUDA; for an NVIDIA GPU: "
    "pip uninstall -y onnxruntime && pip install 'hkd-det[gpu]' (on Jetson: NVIDIA's own onnxruntime-gpu wheel)"
)


_CUDA_FAILURE_HINT = (
    "CUDA or cuDNN is missing or of another version than onnxruntime-gpu was built for; "
    "try pip install 'onnxruntime-gpu[cuda,cudnn]'"
)


def parse_gpu_index(device: str) -> str | None:
    """The N of cuda:N, "0" of cuda, None of cpu. Raises UsageError for any other device."""
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if not match:
        raise UsageError(f"--device {device}: expected cpu, cuda or cuda:0")
    return match[1] or "0"


def _select_provider(device: str) -> Provider:
    index = parse_gpu_index(device)
    if index is None:
        return Provider(
            "CPUExecutionProvider", missing_hint="ONNX Runtime without a CPU", failure_hint="install it again"
        )
    return Provider("CUDAExecutionProvider", _CUDA_MISSING_HINT, _CUDA_FAILURE_HINT, {"device_id": index})


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: a folder, not an ONNX file")
    if not path.is_file():
        raise DataError(f"{path}: no such model file; hkd-export writes one")


def import_onnxruntime() -> Any:
    """The package. Raises UnavailableError where it is missing or does not load."""
    return import_package("onnxruntime", "ONNX Runtime", "pip install 'hkd-det[cpu]' (or 'hkd-det[gpu]')")


def _create_session(runtime: Any, path: Path, provider: Provider, threads: int | None, disable_quant_qdq: bool) -> Any:
    settings = runtime.SessionOptions()
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = 4  # fatal only: what goes wrong is raised, and said once
    if threads is not None:
        settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.disable_quant_qdq", "1" if disable_quant_qdq else "0")
    asked: dict[str, Any] = {"providers": [(provider.name, dict(provider.options)), *provider.extra_providers]}
    if provider.devices:
        settings.add_provider_for_devices(list(provider.devices), dict(provider.options))
        asked = {}
    state = runtime.capi.onnxruntime_pybind11_state
    load_errors = tuple(getattr(state, name) for name in LOAD_ERRORS if hasattr(state, name))
    try:
        # enable_fallback: or a provider that fails, now or in a later run, is replaced by the CPU's.
        return runtime.InferenceSession(str(path), settings, enable_fallback=0, **asked)
    except UnicodeDecodeError:  # of ONNX Runtime's words for what it can't load
        raise _make_damaged_error(path) from None
    except load_errors as error:
        raise DataError(
            f"{path}: ONNX Runtime {runtime.__version__} cannot load it (truncated, no ONNX file, or too new): "
            f"{_format_load_error(error)}"
        ) from None
    except (RuntimeError, ValueError, getattr(state, "EPFail", RuntimeError)) as error:
        raise UnavailableError(
            f"{provider.name} does not start: {_format_load_error(error)}; {provider.failure_hint}"
        ) from None


def _check_device(session: Any, device: str, provider: Provider) -> None:
    """ONNX Runtime takes the CPU in silence when CUDA's libraries are missing: read back what it took."""
    found = session.get_providers()[0]
    if found != provider.name:
        raise UnavailableError(
            f"--device {device}: ONNX Runtime has opened the model on {found} instead of {provider.name}; "
            f"{provider.failure_hint}"
        )
    if "device_id" not in provider.options:
        return
    taken = session.get_provider_options()[provider.name].get("device_id", "0")
    if taken != provider.options["device_id"]:
        raise UnavailableError(f"--device {device}: ONNX Runtime has taken GPU {taken} instead")


def _check_utf8(session: Any, path: Path) -> None:
    """ONNX Runtime does not look whether names and metadata are text, and fails each time somebody asks for them."""
    try:
        _ = session.get_modelmeta().custom_metadata_map
        _ = [(end.name, end.shape) for end in (*session.get_inputs(), *session.get_outputs())]
    except UnicodeDecodeError:
        raise _make_damaged_error(path) from None


def _make_damaged_error(path: Path) -> DataError:
    return DataError(f"{path}: damaged: a name in it, or its metadata, is no text; export it again")


def _format_load_error(error: Exception) -> str:
    """ONNX Runtime's message without its code prefix and paths: of the model, said already, and of its own source."""
    text = first_error_line(error)
    opset = re.search(r"Opset (\d+) .* till opset (\d+)", text)
    if opset:
        return f"its opset is {opset[1]}, this version reads up to {opset[2]}; update ONNX Runtime"
    missing = re.search(r"Could not find an implementation for (\w+)", text)
    if missing:
        return f"it has no {missing[1]} for this file's numbers here; a file of --precision bf16 is for TensorRT"
    text = re.sub(r" ?/\S+\.(?:h|cc):\d+ .*?\) (?=[A-Z])", " ", text)
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : (Load model from .*? failed: ?)?", "", text)
