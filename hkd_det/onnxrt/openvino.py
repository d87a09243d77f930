"""OpenVINO models: ONNX files, and .xml files of any tool with their .bin file. CPU only.

`compile_openvino_model` serves the backend of hkd-deploy as well. `OpenVinoSession` has the interface of an ONNX
Runtime session, so that `OnnxDetector` runs both.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, Literal
from xml.etree import ElementTree

import yaml
from numpy.typing import NDArray

from hkd_det.config import check_range
from hkd_det.errors import DataError, UnavailableError, UsageError, import_package
from hkd_det.files import bytes_sha256, file_sha256
from hkd_det.onnxrt.openvino_int8 import use_unsigned_activations

Precision = Literal["bf16"]
PerformanceHint = Literal["latency", "throughput"]
PERFORMANCE_HINTS = ("latency", "throughput")
METADATA_FILE = "metadata.yaml"  # of hkd-export and Ultralytics
DIRECTORY_FILES = ("model.xml", "model.bin", METADATA_FILE)
# Data types as OpenVINO names them, to names of ONNX Runtime.
ORT_DTYPES = {
    "f32": "tensor(float)", "f16": "tensor(float16)", "u8": "tensor(uint8)", "i64": "tensor(int64)",
    "i32": "tensor(int32)",
}  # fmt: skip
WEIGHT_TYPES = ("f64", "f32", "f16", "bf16", "i8", "u8")
OPENVINO_LOAD_ERRORS = (
    "GeneralFailure", "InitializationFailure", "NotImplementedFailure", "OpConversionFailure", "OpValidationFailure",
)  # fmt: skip
IGNORED_MESSAGE_PREFIXES = (
    "Check '", "Errors during", "Exception from ", "FrontEnd API failed", "Model wasn't fully converted",
    "While validating",
)  # fmt: skip


class OpenVinoSession:
    """OpenVINO with the interface of `onnxruntime.InferenceSession` that `OnnxDetector` uses.

    Args:
        path: An .onnx file, an .xml file or an OpenVINO directory.
        device: Must be cpu.
        threads: Number of CPU threads. None for the default of OpenVINO.
        precision: bf16 for bfloat16, None for float32.

    Raises:
        HkdError: As `compile_openvino_model`.
    """

    def __init__(
        self, path: Path, device: str = "cpu", threads: int | None = None, precision: Precision | None = None
    ) -> None:
        self._metadata, self._compiled = compile_openvino_model(path, device, threads, precision)
        self._request = self._compiled.create_infer_request()
        self._input_indices, self._output_indices = (
            {_get_port_name(port, index): index for index, port in enumerate(ports)}
            for ports in (self._compiled.inputs, self._compiled.outputs)
        )
        self._lock = Lock()  # a request serves one thread at a time

    def get_modelmeta(self) -> SimpleNamespace:
        """Return the metadata strings and the name of the network."""
        name = self._compiled.get_property("NETWORK_NAME")
        return SimpleNamespace(custom_metadata_map=self._metadata, graph_name=name)

    def get_inputs(self) -> list[SimpleNamespace]:
        """Return name, type and shape of each input. A free dimension is None."""
        return [_describe_port(port, index) for index, port in enumerate(self._compiled.inputs)]

    def get_outputs(self) -> list[SimpleNamespace]:
        """Return name, type and shape of each output. A free dimension is None."""
        return [_describe_port(port, index) for index, port in enumerate(self._compiled.outputs)]

    def run(self, output_names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run inference on a batch.

        Args:
            output_names: Names of the outputs.
            feeds: Input arrays by name.

        Returns:
            The outputs.
        """
        with self._lock:
            self._request.infer({self._input_indices[name]: array for name, array in feeds.items()}, share_inputs=True)
            # Copy: the request owns the memory and overwrites it in the next call.
            return [self._request.get_output_tensor(self._output_indices[name]).data.copy() for name in output_names]


def is_openvino_model(path: Path) -> bool:
    """Return whether a path is an .xml file, or a directory that contains one.

    Args:
        path: Model file or directory.
    """
    return path.suffix == ".xml" or (path.is_dir() and any(path.glob("*.xml")))


def compile_openvino_model(
    path: Path,
    device: str = "cpu",
    threads: int | None = None,
    precision: Precision | None = None,
    performance_hint: PerformanceHint = "latency",
) -> tuple[dict[str, str], Any]:
    """Compile a model of any tool, without a check of its inputs and outputs.

    Args:
        path: See `open_openvino`.
        device: See `open_openvino`.
        threads: See `open_openvino`.
        precision: See `open_openvino`.
        performance_hint: See `open_openvino`.

    Returns:
        metadata: Metadata strings of the file.
        compiled: The `CompiledModel`.

    Raises:
        UsageError: An argument is invalid.
        DataError: The file is missing, damaged or for another runtime.
        UnavailableError: OpenVINO is missing, or the processor does not support bfloat16.
    """
    if device != "cpu":
        raise UsageError(
            f"--device {device}: the openvino backend supports cpu only. "
            "For an NVIDIA GPU, set --backend onnxruntime or tensorrt."
        )
    if threads is not None:
        check_range("--threads", threads, 1)
    if performance_hint not in PERFORMANCE_HINTS:
        raise UsageError(f"performance_hint {performance_hint}: expected {' or '.join(PERFORMANCE_HINTS)}.")
    model_path = list_model_files(path)[0]
    core = create_core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError(
            "--backend openvino-bf16: this processor does not support bfloat16. Set --backend openvino."
        )
    config = {"INFERENCE_PRECISION_HINT": precision or "f32", "PERFORMANCE_HINT": performance_hint.upper()}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = str(threads)
    metadata, compiled = _compile_model(core, model_path, config)
    if metadata.get("hkd.precision") == "bf16":
        raise DataError(
            f"{path}: a file of --precision bf16 is for TensorRT; OpenVINO computes NaN from it. "
            "Set --backend openvino-bf16 with the FP32 file."
        )
    _check_inference_precision(compiled, precision)
    return metadata, compiled


def list_model_files(path: Path) -> list[Path]:
    """List the files of a model.

    Args:
        path: An .onnx file, an .xml file or an OpenVINO directory.

    Returns:
        The file to open, followed by the files that belong to it.

    Raises:
        DataError: A file is missing.
    """
    if path.is_dir():
        xml_files = sorted(path.glob("*.xml"))
        if len(xml_files) != 1:
            raise DataError(
                f"{path}: not an OpenVINO directory: expected {', '.join(DIRECTORY_FILES)}, got {len(xml_files)} "
                ".xml files. Create one with hkd-export student.onnx --openvino."
            )
        path = xml_files[0]
    paths = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    for file in paths:
        if not file.is_file():
            raise DataError(f"{file}: no such model file. Create it with hkd-export.")
    metadata_path = path.with_name(METADATA_FILE)
    return [*paths, metadata_path] if path.suffix == ".xml" and metadata_path.is_file() else paths


def hash_model_files(path: Path) -> str:
    """Return the SHA-256 of a model file, or of the digests of the files of an OpenVINO model.

    Args:
        path: Model file or directory.
    """
    digests = [file_sha256(file) for file in list_model_files(path)]
    return digests[0] if len(digests) == 1 else bytes_sha256("".join(digests).encode())


def read_openvino_metadata(folder: Path) -> dict[str, str]:
    """Read the metadata of an OpenVINO directory.

    Args:
        folder: Directory, with a `metadata.yaml` if hkd-export or Ultralytics wrote it.

    Returns:
        The same strings as in the metadata of an ONNX file. Empty without that file.

    Raises:
        DataError: The file is not a YAML mapping.
    """
    path = folder / METADATA_FILE
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}. Export the model again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a YAML mapping, got {type(content).__name__}. Export the model again.")
    return {str(key): str(value) for key, value in content.items()}


def count_openvino_parameters(path: Path) -> int:
    """Count the weights of an OpenVINO model: the elements of all constants of float or 8-bit types.

    Args:
        path: An .xml file or an OpenVINO directory.

    Returns:
        Number of elements.

    Raises:
        DataError: A file is missing.
    """
    root = ElementTree.parse(list_model_files(path)[0]).getroot()
    count = 0
    for layer in root.iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None and data.get("element_type") in WEIGHT_TYPES:
            count += prod(int(dim) for dim in data.get("shape", "").split(",") if dim.strip())
    return count


def create_core() -> Any:
    """Create an OpenVINO `Core` without changing the signal handling of the calling thread.

    Returns:
        The `Core`.

    Raises:
        UnavailableError: OpenVINO is missing.
    """
    core = import_package("openvino", "OpenVINO", "Run pip install 'hkd-det[openvino]'.").Core()
    # Workaround (OpenVINO 2026.4.1): the CPU plugin gives the thread that loads it another stack for signal handlers.
    # The destructor of the Core unmaps this stack and restores the previous one. If two Cores are destroyed in the
    # order of their creation, or a Core is destroyed in another thread, the restored stack no longer exists. The next
    # signal (Ctrl-C, or the end of a data loader process) then crashes the process or overwrites memory. Therefore a
    # short-lived thread loads the plugin.
    with ThreadPoolExecutor(1) as loader:
        loader.submit(core.get_versions, "CPU").result()
    return core


def read_model(path: Path) -> Any:
    """Read a model file with the OpenVINO front end of its type.

    Without a named front end, OpenVINO tries all of them, and the TensorFlow front end prints to the terminal.

    Args:
        path: An .onnx or .xml file.

    Returns:
        The OpenVINO `Model`. Its INT8 activations are unsigned.
    """
    manager = importlib.import_module("openvino.frontend").FrontEndManager()
    front_end = manager.load_by_framework("ir" if path.suffix == ".xml" else "onnx")
    model = front_end.convert(front_end.load(str(path)))
    if path.suffix == ".xml":
        model = _use_float32_ports(model)
    use_unsigned_activations(model)
    return model


def _use_float32_ports(model: Any) -> Any:
    """Convert float16 inputs and outputs of older .xml files to float32, as `Core.read_model` does."""
    openvino = importlib.import_module("openvino")
    half = openvino.Type.f16
    inputs = [index for index, port in enumerate(model.inputs) if port.element_type == half]
    outputs = [index for index, port in enumerate(model.outputs) if port.element_type == half]
    if not inputs and not outputs:
        return model
    processor = importlib.import_module("openvino.preprocess").PrePostProcessor(model)
    for index in inputs:
        processor.input(index).tensor().set_element_type(openvino.Type.f32)
    for index in outputs:
        processor.output(index).tensor().set_element_type(openvino.Type.f32)
    return processor.build()


def _compile_model(core: Any, path: Path, config: dict[str, str]) -> tuple[dict[str, str], Any]:
    """Return metadata and compiled model. The uncompiled model is released, with its weights."""
    with _convert_load_errors(path):
        model = read_model(path)
        return _read_rt_info(model, path), core.compile_model(model, "CPU", config)


@contextmanager
def _convert_load_errors(path: Path) -> Iterator[None]:
    """Convert the load errors of OpenVINO to a DataError. Their only common base class is Exception."""
    front_ends = importlib.import_module("openvino.frontend")
    load_errors = [getattr(front_ends, name) for name in OPENVINO_LOAD_ERRORS if hasattr(front_ends, name)]
    try:
        yield
    except (RuntimeError, UnicodeDecodeError, *load_errors) as error:  # UnicodeDecodeError: names that are not UTF-8
        version = importlib.import_module("openvino").__version__.partition("-")[0]
        raise DataError(
            f"{path}: OpenVINO {version} cannot load the file (truncated, not a model, or too new): "
            f"{_extract_error_reason(error)}. Export the model again."
        ) from None


def _read_rt_info(model: Any, path: Path) -> dict[str, str]:
    if path.suffix == ".xml":
        return read_openvino_metadata(path.parent)
    if not model.has_rt_info(["framework"]):
        return {}
    entries = _unwrap_ovany(model.get_rt_info(["framework"]))
    return {key: str(_unwrap_ovany(value)) for key, value in entries.items()}


def _unwrap_ovany(value: Any) -> Any:
    return getattr(value, "value", value)  # some values are wrapped in OVAny


def _check_inference_precision(compiled: Any, precision: Precision | None) -> None:
    expected = "bf16" if precision == "bf16" else "f32"
    actual = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if actual != expected:
        raise UnavailableError(f"OpenVINO: expected inference precision {expected}, got {actual} on this processor.")


def _extract_error_reason(error: Exception) -> str:
    """Return the first line of an OpenVINO message that is not a source location."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(IGNORED_MESSAGE_PREFIXES)]
    return reasons[0].removeprefix("-- ").removesuffix(" with a message:") if reasons else type(error).__name__


def _describe_port(port: Any, index: int) -> SimpleNamespace:
    dtype = port.element_type.get_type_name()
    shape = [dim.get_length() if dim.is_static else None for dim in port.partial_shape]
    return SimpleNamespace(name=_get_port_name(port, index), type=ORT_DTYPES.get(dtype, dtype), shape=shape)


def _get_port_name(port: Any, index: int) -> str:
    """Return the name of an input or output; some converters write none."""
    names = sorted(port.get_names())
    return str(names[0]) if names else f"output{index}"
