"""OpenVINO backend for the CPU. It runs ONNX files and OpenVINO directories in float32 or bfloat16.

An OpenVINO directory, which this module also writes, contains model.xml, model.bin and metadata.yaml as Ultralytics
writes it.
"""

import ast
import importlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from hkd_deploy.backends.base import (
    OUTPUT_DTYPES,
    Backend,
    PerformanceHint,
    RuntimeOutputs,
    make_closed_error,
    validate_io,
)
from hkd_deploy.model_metadata import make_tensor_info
from hkd_det.config import check_range
from hkd_det.errors import DataError, UnavailableError, UsageError, first_error_line, import_package
from hkd_det.files import atomic_write_dir

Precision = Literal["bf16"]
UINT8_ZERO_POINT = 128  # of the activations of INT8 models
PERFORMANCE_HINTS = ("latency", "throughput")
MODEL_FILE, METADATA_FILE = "model.xml", "metadata.yaml"
DIRECTORY_FILES = (MODEL_FILE, "model.bin", METADATA_FILE)
LITERAL_KEYS = ("stride", "batch", "imgsz", "names")  # metadata written as numbers, lists or mappings, not as text
# Called with the final and the temporary path of the directory. An exception prevents the final rename.
FolderCheck = Callable[[Path, Path], object]
OPENVINO_LOAD_ERRORS = (
    "GeneralFailure", "InitializationFailure", "NotImplementedFailure", "OpConversionFailure", "OpValidationFailure",
)  # fmt: skip
IGNORED_MESSAGE_PREFIXES = (
    "Check '", "Errors during", "Exception from ", "FrontEnd API failed", "Model wasn't fully converted",
    "While validating",
)  # fmt: skip


class OpenVinoBackend(Backend):
    """A compiled OpenVINO model. Several threads may call `run`; each uses its own inference request.

    Args:
        path: The ONNX file, .xml file or OpenVINO directory.
        metadata: Metadata strings of the file.
        compiled: The `CompiledModel`.

    Attributes:
        device: Always cpu.
        batch: Fixed batch size. None if the batch dimension is free.
        input_hw: Fixed (height, width) of the input, pixels. None if the size is free.
        num_requests: Number of concurrent calls that use the processor fully.
    """

    def __init__(self, path: Path, metadata: dict[str, str], compiled: Any) -> None:
        self.path = path
        self.device = "cpu"
        self.metadata = metadata
        inputs, outputs = (
            [
                make_tensor_info(
                    port.get_any_name(),
                    port.element_type.get_type_name(),
                    (dim.get_length() if dim.is_static else None for dim in port.partial_shape),
                )
                for port in ports
            ]
            for ports in (compiled.inputs, compiled.outputs)
        )
        self.batch, self.input_hw = validate_io(path, metadata, inputs, outputs)
        self.num_requests: int = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._compiled: Any | None = compiled
        self._idle_requests: deque[Any] = deque()  # a request serves one thread at a time

    def run(self, images: NDArray[np.uint8]) -> RuntimeOutputs:
        """Run inference on a batch. See `Backend.run`."""
        compiled = self._compiled
        if compiled is None:
            raise make_closed_error(self.path)
        try:
            request = self._idle_requests.pop()
        except IndexError:
            request = compiled.create_infer_request()
        try:
            request.infer({"images": images}, share_inputs=True)
            # Copy: the request owns the memory and overwrites it in the next call.
            boxes, scores, count = (request.get_tensor(name).data.copy() for name in OUTPUT_DTYPES)
        finally:
            self._idle_requests.append(request)
        return boxes, scores, count

    def close(self) -> None:
        """Release the memory of the model."""
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
    """Open a model with OpenVINO.

    Args:
        path: An ONNX file, a directory of `hkd-export --openvino` or the .xml file in it.
        device: Must be cpu.
        threads: Number of CPU threads. None for the default of OpenVINO.
        precision: bf16 for bfloat16. None for float32, although OpenVINO prefers bfloat16 on processors that have it.
        performance_hint: `latency` minimizes the time of one call. `throughput` runs `num_requests` calls at the same
            time, each of them slower.

    Yields:
        The opened model.

    Raises:
        UsageError: An argument is invalid.
        DataError: The file is not a model of `hkd-export`.
        UnavailableError: OpenVINO is missing, or the processor does not support bfloat16.
    """
    metadata, compiled = compile_openvino_model(path, device, threads, precision, performance_hint)
    with closing(OpenVinoBackend(path, metadata, compiled)) as backend:
        yield backend


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
    paths = [path, path.with_suffix(".bin"), path.with_name(METADATA_FILE)] if path.suffix == ".xml" else [path]
    for file in paths:
        if not file.is_file():
            raise DataError(f"{file}: no such model file. Create it with hkd-export.")
    return paths


def read_openvino_metadata(folder: Path) -> dict[str, str]:
    """Read the metadata of an OpenVINO directory.

    Args:
        folder: Directory with a `metadata.yaml`.

    Returns:
        The same strings as in the metadata of an ONNX file.

    Raises:
        DataError: The file is not a YAML mapping.
    """
    path = folder / METADATA_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML: {' '.join(str(error).split())}. Export the model again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a YAML mapping, got {type(content).__name__}. Export the model again.")
    return {str(key): str(value) for key, value in content.items()}


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
    use_unsigned_activations(model)
    return model


def export_openvino(onnx_path: Path, folder: Path | None = None, check: FolderCheck | None = None) -> Path:
    """Write an OpenVINO directory and print its size.

    Args:
        onnx_path: ONNX file of hkd-export.
        folder: Directory to write, NAME_openvino next to NAME.onnx by default.
        check: Check of the directory before it is renamed to `folder`.

    Returns:
        The directory.

    Raises:
        DataError: See `write_openvino_directory`.
    """
    folder = folder or onnx_path.with_name(f"{onnx_path.stem}_openvino")
    write_openvino_directory(onnx_path, folder, check)
    size_mib = sum(file.stat().st_size for file in list_model_files(folder)) / 2**20
    print(f"{folder}: OpenVINO model of {onnx_path}, {size_mib:.1f} MiB, weights unchanged")
    return folder


def write_openvino_directory(onnx_path: Path, folder: Path, check: FolderCheck | None = None) -> None:
    """Write an OpenVINO directory with the weights of an ONNX file unchanged.

    Args:
        onnx_path: ONNX file of hkd-export.
        folder: Directory to write. It is replaced if it contains an OpenVINO model and nothing else.
        check: Check of the directory before it is renamed to `folder`.

    Raises:
        DataError: If OpenVINO cannot read the file, `folder` contains other files, or the disk is full.
    """
    _check_replaceable(folder)
    with open_openvino(onnx_path) as runtime:
        metadata = runtime.metadata
    with atomic_write_dir(folder) as temp_dir:
        model = read_model(onnx_path)
        try:
            importlib.import_module("openvino").save_model(model, temp_dir / MODEL_FILE, compress_to_fp16=False)
        except RuntimeError as error:  # a full disk gives "basic_ios::clear: iostream error"
            reason = first_error_line(error)
            raise DataError(f"{folder}: OpenVINO cannot write it: {reason}. Check the free disk space.") from None
        text = yaml.safe_dump({key: _parse_literal(key, value) for key, value in metadata.items()}, sort_keys=False)
        (temp_dir / METADATA_FILE).write_text(text, encoding="utf-8")
        with open_openvino(temp_dir):  # check that OpenVINO can read the written files
            pass
        if check:
            check(folder, temp_dir)


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


def _check_replaceable(folder: Path) -> None:
    """Raise DataError if `folder` is a file, or contains anything except an OpenVINO model."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: expected a directory, got a file. Set --output to a directory.")
    if folder.is_dir():
        other_files = sorted(file.name for file in folder.iterdir() if file.name not in DIRECTORY_FILES)
        if other_files:
            raise DataError(
                f"{folder}: contains {other_files[0]}, which is not part of an OpenVINO model. "
                "Set --output to another directory."
            )


def _parse_literal(key: str, value: str) -> Any:
    try:
        return ast.literal_eval(value) if key in LITERAL_KEYS else value
    except (ValueError, SyntaxError):
        return value  # "dynamic" of the key batch


def use_unsigned_activations(model: Any) -> int:
    """Replace int8 activations by uint8 with a zero point that is larger by 128. The values stay the same.

    hkd-export quantizes activations to int8 with zero point 0, because TensorRT requires it. The CPU plugin of OpenVINO
    2026.4.1 computes wrong values for a convolution behind a concatenation of int8 activations on processors with AVX2
    only. uint8 with zero point 128 has the same values, and the plugin is right.

    An activation is FakeQuantize, Convert to int8, Convert to float32, Subtract of the zero point (omitted by other
    tools), and Multiply with the scale.

    Args:
        model: OpenVINO `Model`. It is changed.

    Returns:
        Number of changed activations.
    """
    openvino = import_package("openvino", "OpenVINO", "Run pip install 'hkd-det[openvino]'.")
    ops = import_package("openvino.opset13", "OpenVINO", "Run pip install 'hkd-det[openvino]'.")
    num_changed = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convert" or node.get_output_element_type(0) != openvino.Type.i8:
            continue
        quantize = node.input_value(0).get_node()
        back_nodes = [target.get_node() for target in node.output(0).get_target_inputs()]
        if quantize.get_type_name() != "FakeQuantize" or {one.get_type_name() for one in back_nodes} != {"Convert"}:
            continue
        inputs = [quantize.input_value(index) for index in range(5)]
        ranges = [ops.constant(value.get_node().get_data() + np.float32(UINT8_ZERO_POINT)) for value in inputs[3:]]
        levels = quantize.get_attributes()["levels"]
        unsigned = ops.convert(ops.fake_quantize(*inputs[:3], *ranges, levels), "u8")
        for back in back_nodes:
            _replace_dequantization(ops, back, ops.convert(unsigned, "f32"))
        num_changed += 1
    model.validate_nodes_and_infer_types()
    return num_changed


def _replace_dequantization(ops: Any, back: Any, unsigned: Any) -> None:
    """Connect the users of a Convert to float32 to the unsigned values, less their zero point."""
    for target in list(back.output(0).get_target_inputs()):
        zero_point, outputs = np.float32(UINT8_ZERO_POINT), [target]
        user = target.get_node()
        if (
            user.get_type_name() == "Subtract"
            and (offset := _read_constant(user.input_value(1).get_node())) is not None
        ):
            zero_point, outputs = offset + zero_point, list(user.output(0).get_target_inputs())
        shifted = ops.subtract(unsigned, ops.constant(zero_point))
        for output in outputs:
            output.replace_source_output(shifted.output(0))


def _read_constant(node: Any) -> Any:
    """Return the value of a constant, or of one behind a Convert, as float32. None for other nodes."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_data().astype(np.float32) if node.get_type_name() == "Constant" else None
