"""OpenVINO on the CPU: an ONNX file or a folder of hkd-export, in the precision that was asked for."""

import importlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import (
    OUTPUT_DTYPES,
    PerformanceHint,
    RuntimeOutputs,
    TensorInfo,
    make_closed_error,
    validate_io,
)
from hkd_deploy.export.openvino import list_model_files, read_openvino_metadata
from hkd_det.errors import DataError, UnavailableError, UsageError, import_package

Precision = Literal["bf16"]
PERFORMANCE_HINTS = ("latency", "throughput")
OPENVINO_DTYPES = {"u8": "uint8", "f32": "float32", "f16": "float16", "i32": "int32", "i64": "int64"}
OPENVINO_LOAD_ERRORS = (
    "GeneralFailure", "InitializationFailure", "NotImplementedFailure", "OpConversionFailure", "OpValidationFailure",
)  # fmt: skip
IGNORED_MESSAGE_PREFIXES = (
    "Check '", "Errors during", "Exception from ", "FrontEnd API failed", "Model wasn't fully converted",
    "While validating",
)  # fmt: skip


class OpenVinoBackend:
    """A compiled model; several threads may call `run`, each takes a request of its own.

    metadata: the file's own strings. batch: pictures a call takes, None for any number. input_hw: (height, width)
    pixels, None where the graph leaves them free. parallel: calls at once that make the most of the processor.
    """

    def __init__(self, path: Path, metadata: dict[str, str], compiled: Any) -> None:
        self.path = path
        self.device = "cpu"
        self.metadata = metadata
        self.batch, self.input_hw = validate_io(
            path, metadata, _read_port_io(compiled.inputs), _read_port_io(compiled.outputs)
        )
        self.num_requests: int = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._compiled: Any | None = compiled
        self._idle_requests: deque[Any] = deque()  # requests nobody is using: a request serves one thread at a time

    def run(self, images: NDArray[np.uint8]) -> RuntimeOutputs:
        """(B, H, W, 3) uint8 RGB to boxes [B, K, 4] in pixels of them, scores [B, K], valid rows [B]."""
        compiled = self._compiled
        if compiled is None:
            raise make_closed_error(self.path)
        try:
            request = self._idle_requests.pop()
        except IndexError:
            request = compiled.create_infer_request()
        try:
            request.infer({"images": images}, share_inputs=True)
            # Copied: the memory is the request's, and the next caller's answers lie there.
            boxes, scores, count = (request.get_tensor(name).data.copy() for name in OUTPUT_DTYPES)
        finally:
            self._idle_requests.append(request)
        return boxes, scores, count

    def close(self) -> None:
        """Give the model's memory back."""
        self._compiled = None
        self._idle_requests.clear()


@contextmanager
def open_openvino(
    path: Path,
    device: str = "cpu",
    threads: int | None = None,
    precision: Precision | None = None,
    performance_hint: PerformanceHint = "latency",
) -> Iterator[OpenVinoBackend]:
    """Open an ONNX file, a folder that hkd-export --openvino wrote, or the .xml in it.

    threads: CPU threads; None leaves it to OpenVINO. precision: bf16 where it is asked for; else float32, which
    OpenVINO itself would leave for bfloat16 in silence on processors that have it.
    hint: latency answers one call as fast as it can; throughput answers `parallel` calls at once, each more slowly.
    Raises UsageError for what makes no sense, UnavailableError if OpenVINO is not there or the processor has no
    bfloat16, DataError if the file is none of ours.
    """
    if device != "cpu":
        raise UsageError(
            f"--device {device}: OpenVINO runs on cpu here; for an NVIDIA GPU: --backend onnxruntime or tensorrt"
        )
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: at least 1")
    if performance_hint not in PERFORMANCE_HINTS:
        raise UsageError(f"hint {performance_hint}: expected {' or '.join(PERFORMANCE_HINTS)}")
    model_path = list_model_files(path)[0]
    core = create_core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("--backend openvino-bf16: this processor has no bfloat16; say --backend openvino")
    wanted = {"INFERENCE_PRECISION_HINT": precision or "f32", "PERFORMANCE_HINT": performance_hint.upper()}
    if threads is not None:
        wanted["INFERENCE_NUM_THREADS"] = str(threads)
    metadata, compiled = _compile_model(core, model_path, wanted)
    if metadata.get("hkd.precision") == "bf16":
        raise DataError(
            f"{path}: a file of --precision bf16 is for TensorRT, OpenVINO answers NaN; "
            "say --backend openvino-bf16 with the FP32 file"
        )
    _check_inference_precision(compiled, precision)
    opened = OpenVinoBackend(path, metadata, compiled)
    try:
        yield opened
    finally:
        opened.close()


def _compile_model(core: Any, path: Path, config: dict[str, str]) -> tuple[dict[str, str], Any]:
    """The metadata and the compiled model; the model itself, with its weights, is let go."""
    with _convert_load_errors(path):
        model = read_model(path)
        return _read_rt_info(model, path), core.compile_model(model, "CPU", config)


def create_core() -> Any:
    """A Core of OpenVINO's that leaves the caller's signals alone. Raises UnavailableError if OpenVINO is not there."""
    core = import_package("openvino", "OpenVINO", "pip install 'hkd-det[openvino]'").Core()
    # The CPU plugin gives the thread that loads it another stack for signal handlers, unmaps it when the Core goes, and
    # puts back the one before. After two Cores that go in the order they came, or one that goes in another thread, the
    # stack is no longer there: the next signal that Python hears (Ctrl-C; a child's end, once torch has loaded pictures
    # with workers) ends the process, or overwrites what lies there by then. So a thread that ends at once loads it.
    # Seen in OpenVINO 2026.4.1.
    with ThreadPoolExecutor(1) as aside:
        aside.submit(core.get_versions, "CPU").result()
    return core


@contextmanager
def _convert_load_errors(path: Path) -> Iterator[None]:
    """What OpenVINO raises for a file it can't load, as a DataError; its errors share no base but Exception."""
    front_ends = importlib.import_module("openvino.frontend")
    known = [getattr(front_ends, name) for name in OPENVINO_LOAD_ERRORS if hasattr(front_ends, name)]
    try:
        yield
    except (RuntimeError, UnicodeDecodeError, *known) as error:  # of names or metadata that are no text
        version = importlib.import_module("openvino").__version__.partition("-")[0]
        raise DataError(
            f"{path}: OpenVINO {version} cannot load it (truncated, no model, or too new): {_extract_error_reason(error)}"
        ) from None


def read_model(path: Path) -> Any:
    """OpenVINO's Model of an .onnx or .xml file.

    By the one front end that fits: left to choose, OpenVINO tries all, and TensorFlow's prints to the terminal.
    """
    manager = importlib.import_module("openvino.frontend").FrontEndManager()
    front_end = manager.load_by_framework("ir" if path.suffix == ".xml" else "onnx")
    return front_end.convert(front_end.load(str(path)))


def _read_rt_info(model: Any, path: Path) -> dict[str, str]:
    if path.suffix == ".xml":
        return read_openvino_metadata(path.parent)
    if not model.has_rt_info(["framework"]):
        return {}
    found = _unwrap_ovany(model.get_rt_info(["framework"]))
    return {key: str(_unwrap_ovany(value)) for key, value in found.items()}


def _unwrap_ovany(value: Any) -> Any:
    """Some of OpenVINO's values come wrapped (OVAny)."""
    return getattr(value, "value", value)


def _check_inference_precision(compiled: Any, precision: Precision | None) -> None:
    asked = "bf16" if precision == "bf16" else "f32"
    found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if found != asked:
        raise UnavailableError(f"OpenVINO computes in {found} here, not in {asked} as it was asked to")


def _read_port_io(ports: Sequence[Any]) -> list[TensorInfo]:
    return [
        TensorInfo(
            port.get_any_name(),
            OPENVINO_DTYPES.get(port.element_type.get_type_name(), port.element_type.get_type_name()),
            tuple(side.get_length() if side.is_static else None for side in port.partial_shape),
        )
        for port in ports
    ]


def _extract_error_reason(error: Exception) -> str:
    """What is left of OpenVINO's message without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(IGNORED_MESSAGE_PREFIXES)]
    return said[0].removeprefix("-- ").removesuffix(" with a message:") if said else type(error).__name__
