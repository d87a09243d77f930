"""OpenVINO backend for the CPU. It runs ONNX files and OpenVINO directories in float32 or bfloat16.

An OpenVINO directory, which this module also writes, contains model.xml, model.bin and metadata.yaml as Ultralytics
writes it.
"""

import ast
import importlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

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
from hkd_det.errors import DataError, first_error_line
from hkd_det.files import atomic_write_dir
from hkd_det.onnxrt.openvino import (
    DIRECTORY_FILES,
    METADATA_FILE,
    Precision,
    compile_openvino_model,
    list_model_files,
    read_model,
)

MODEL_FILE = DIRECTORY_FILES[0]
LITERAL_KEYS = ("stride", "batch", "imgsz", "names")  # metadata written as numbers, lists or mappings, not as text
# Called with the final and the temporary path of the directory. An exception prevents the final rename.
FolderCheck = Callable[[Path, Path], object]


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
