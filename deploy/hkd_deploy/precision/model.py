"""FP32 model files: reading, checks, running on samples, inner values, and writing of the converted file."""

import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.base import INPUT_NAME
from hkd_deploy.external import is_external_model, open_external_detector
from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.pipeline import open_detector
from hkd_det.console import iterate_with_progress
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, HkdError, UsageError, first_error_line, import_package
from hkd_det.files import bytes_sha256
from hkd_det.image import read_image
from hkd_det.letterbox import Letterbox
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.onnxrt.detector import OnnxDetector, open_onnx_detector
from hkd_det.onnxrt.recognition import CONFIG_KEY, make_config_metadata
from hkd_det.onnxrt.session import open_session
from hkd_det.structures import Detections, Sample

# Opset 13 introduced scales per channel. The quantizer of ONNX Runtime supports opsets below 21.
SUPPORTED_OPSETS = range(13, 21)
CONVERTED_OPSET = 17  # of files of other tools with another opset; that of hkd-export
MIN_IR_VERSION = 8  # of opset 17
REDUCED_TYPES = ("FLOAT16", "BFLOAT16", "INT8", "UINT8")  # weight types that an FP32 file does not have
QUANTIZED_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger", "QLinearMatMul"}
)

T = TypeVar("T")
ModelInput = NDArray[Any] | Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Fp32Model:
    """An FP32 model that hkd-export or another tool wrote.

    Attributes:
        path: The ONNX file.
        model: onnx.ModelProto in which every node has a unique name. That of another tool contains its configuration.
        model_metadata: Parsed metadata of the file.
        sha256: SHA-256 of the file, 64 hexadecimal digits.
        external: The opened detector of another tool; None for a file of hkd-export.
    """

    path: Path
    model: Any
    model_metadata: ModelMetadata
    sha256: str
    external: OnnxDetector | None = None

    def make_inputs(self, image_rgb: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Prepare an image as the detector does.

        Args:
            image_rgb (uint8 array[H, W, 3]): RGB.

        Returns:
            Input name to a batch of one.
        """
        if self.external is None:
            return {INPUT_NAME: make_network_input(self.model_metadata, image_rgb)}
        return self.external.make_feeds(self.external.preprocess([image_rgb])[1])

    def get_metadata(self) -> dict[str, str]:
        """Return all metadata entries of the file."""
        return _read_metadata(self.model)


def import_onnx() -> Any:
    """Return the onnx package.

    Raises:
        UnavailableError: If the package is not installed.
    """
    return import_package("onnx", "onnx", "--precision requires it. Run pip install 'hkd-det[quant]'.")


def make_progress_bar(iterable: Iterable[T], desc: str, unit: str, total: int | None = None) -> Iterable[T]:
    """Return the iterable with a progress bar that disappears at the end, or with a line per minute.

    Args:
        iterable: Items to iterate over.
        desc: Name of the operation.
        unit: Name of one item.
        total: Number of items, required for an iterable without a length.
    """
    count = len(iterable) if total is None and isinstance(iterable, Sized) else total or 0
    return iterate_with_progress(iterable, count, desc, unit)


def read_fp32_model(path: Path, model_config: Path | None = None) -> Fp32Model:
    """Read an FP32 file that hkd-export or another tool wrote.

    Args:
        path: The ONNX file.
        model_config: YAML file or name of the configuration of a file of another tool (default: see
            `load_model_config`).

    Returns:
        The model, with a unique name for every node.

    Raises:
        UnavailableError: If the onnx package is not installed.
        DataError: If the file is missing, without a model configuration, not FP32, or has an unsupported opset.
        UsageError: If the graph was exported with `--raw` or `--no-preprocess`, so that it cannot be evaluated.
    """
    onnx = import_onnx()
    if not path.is_file():
        raise DataError(f"{path}: no such model file. Create it with hkd-export best.pt.")
    content = path.read_bytes()
    model = parse_onnx_model(onnx, content, path)
    if model_config or is_external_model(path):
        return _read_external_model(onnx, path, model, bytes_sha256(content), model_config)
    metadata = ModelMetadata.from_metadata(_read_metadata(model), path)
    source = Fp32Model(path, model, metadata, bytes_sha256(content))
    _check_is_fp32(onnx, source)
    _check_opset(source)
    if metadata.raw or metadata.preprocess != "uint8":
        flag = "--raw" if metadata.raw else "--no-preprocess"
        raise UsageError(f"{path}: exported with {flag}; --precision cannot evaluate it. Export it without {flag}.")
    _name_nodes(model)
    return source


def _read_external_model(onnx: Any, path: Path, model: Any, sha256: str, model_config: Path | None) -> Fp32Model:
    """Read a file of another tool, convert its opset, and store its configuration in the metadata."""
    with open_external_detector(path, model_config=model_config) as detector:
        metadata = detector.metadata
    external = open_onnx_detector(path, config_path=model_config)
    source = Fp32Model(path, model, metadata, sha256, external)
    _check_is_fp32(onnx, source)
    converted = _convert_opset(onnx, source)
    entries = {**_read_metadata(model), CONFIG_KEY: make_config_metadata(external.config)}
    onnx.helper.set_model_props(converted, entries)
    _name_nodes(converted)
    return replace(source, model=converted)


def _convert_opset(onnx: Any, source: Fp32Model) -> Any:
    """Return the model in a supported opset; most older files have opset 11."""
    if _read_opset(source.model) in SUPPORTED_OPSETS:
        return source.model
    try:
        converted = onnx.version_converter.convert_version(source.model, CONVERTED_OPSET)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise DataError(
            f"{source.path}: its opset {_read_opset(source.model)} cannot be converted to {CONVERTED_OPSET}: "
            f"{first_error_line(error)}. Export the model with opset {CONVERTED_OPSET}."
        ) from None
    # The converter lists the weights as inputs, as IR version 3 required.
    weights = {tensor.name for tensor in converted.graph.initializer}
    inputs = [value for value in converted.graph.input if value.name not in weights]
    del converted.graph.input[:]
    converted.graph.input.extend(inputs)
    converted.ir_version = max(converted.ir_version, MIN_IR_VERSION)
    return converted


def parse_onnx_model(onnx: Any, content: bytes, path: Path) -> Any:
    """Parse the content of an ONNX file.

    Args:
        onnx: The onnx package.
        content: Bytes of the file.
        path: The file, for the error message.

    Returns:
        The onnx.ModelProto.

    Raises:
        DataError: If the content is not an ONNX model.
    """
    decode_error = importlib.import_module("google.protobuf.message").DecodeError
    try:
        model = onnx.load_model_from_string(content)
    except decode_error:
        model = None
    # Protobuf parses an empty file and many text files as a message without nodes; invalid UTF-8 becomes bytes.
    if model is None or not model.graph.node or not all(isinstance(text, str) for text in _iterate_strings(model)):
        raise DataError(f"{path}: not an ONNX file, or truncated. Create it with hkd-export best.pt.")
    return model


def run_model(
    model: Any, names: Sequence[str], inputs: Iterable[ModelInput]
) -> Iterable[dict[str, NDArray[np.float32]]]:
    """Run a model on ONNX Runtime and return values from inside its graph.

    Args:
        model: onnx.ModelProto. It is not modified.
        names: Names of the values to return.
        inputs: Batches in the shape and dtype of the only input, or mappings from input names to arrays.

    Yields:
        Value name to array, for each batch.
    """
    onnx = import_onnx()
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    outputs = {value.name for value in extended.graph.output}
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    with TemporaryDirectory(prefix="hkd-precision-") as temp_dir:
        path = Path(temp_dir) / "extended.onnx"
        onnx.save(extended, path)
        session = open_session(path)
        first_name = session.get_inputs()[0].name
        for batch in inputs:
            feeds = dict(batch) if isinstance(batch, Mapping) else {first_name: batch}
            yield dict(zip(names, session.run(list(names), feeds), strict=True))


def make_network_input(metadata: ModelMetadata, image_rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Letterbox an image to the input size of a model. Graphs with a dynamic size accept this size as well.

    Args:
        metadata: Metadata of the model.
        image_rgb (uint8 array[H, W, 3]): RGB.

    Returns:
        batch (uint8 array[1, h, w, 3]): RGB.
    """
    return Letterbox((image_rgb.shape[0], image_rgb.shape[1]), metadata.imgsz_hw).apply(image_rgb)[None]


def save_model(
    source: Fp32Model,
    model: Any,
    path: Path,
    precision: str,
    quantization: dict[str, Any],
    precision_report: dict[str, Any],
) -> None:
    """Write a converted model with the metadata of its source and four additional entries.

    Args:
        source: The FP32 model that was converted.
        model: onnx.ModelProto to write.
        path: File to write.
        precision: fp16, bf16 or int8, written as hkd.precision.
        quantization: INT8 settings, written as JSON to hkd.quantization; empty for fp16 and bf16.
        precision_report: Accuracy and latency, written as JSON to hkd.precision_report.
    """
    onnx = import_onnx()
    metadata = {
        **source.get_metadata(),
        "hkd.precision": precision,
        "hkd.quantization": json.dumps(quantization),
        "hkd.precision_report": json.dumps(precision_report),
        "hkd.source_sha256": source.sha256,
    }
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def _iterate_strings(model: Any) -> Iterator[str | bytes]:
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)
    for node in model.graph.node:
        yield from (node.name, node.op_type, *node.input, *node.output)


def _read_metadata(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _check_is_fp32(onnx: Any, source: Fp32Model) -> None:
    types = {onnx.TensorProto.DataType.Name(weight.data_type) for weight in source.model.graph.initializer}
    reduced = sorted(types.intersection(REDUCED_TYPES))
    if reduced or any(node.op_type in QUANTIZED_OPS for node in source.model.graph.node):
        precision = source.get_metadata().get("hkd.precision", reduced[0].lower() if reduced else "int8")
        raise DataError(
            f"{source.path}: expected an FP32 file, got {precision}. Pass the FP32 file that it was converted from."
        )


def _read_opset(model: Any) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _check_opset(source: Fp32Model) -> None:
    opset = _read_opset(source.model)
    if opset not in SUPPORTED_OPSETS:
        raise DataError(
            f"{source.path}: --precision supports opsets {SUPPORTED_OPSETS[0]} to {SUPPORTED_OPSETS[-1]}, got {opset}. "
            "Export the weights again; hkd-export writes opset 17."
        )


def _name_nodes(model: Any) -> None:
    names: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in names:
            node.name = f"{node.op_type}_{index}"
        names.add(node.name)


def load_eval_samples(data: str) -> list[Sample]:
    """Load the val split of a dataset.

    Args:
        data: Dataset name or data YAML.

    Returns:
        All samples of the split.

    Raises:
        DataError: If the split has no person of the setup Reasonable.
        HkdError: If the dataset cannot be read.
    """
    try:
        samples = load_dataset(data, "val")
    except HkdError as error:
        raise type(error)(f"evaluation images: {first_error_line(error)}. Set --data to another dataset.") from error
    if not evaluate_detections(samples, [], [REASONABLE])[REASONABLE.name].num_gt:
        raise DataError(f"{data}: the val split has no person of at least 50 px. Set --data to another dataset.")
    return samples


def select_evenly(items: Sequence[T], count: int) -> list[T]:
    """Return items at even distances, including the first and the last.

    Args:
        items: Items to select from.
        count: Number of items. All items are returned if there are fewer.
    """
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in indices]


def predict_samples(
    path: Path, device: str, backend: str, samples: Sequence[Sample], desc: str, model_config: Path | None = None
) -> list[Detections]:
    """Run a model file on samples.

    Args:
        path: Model file or OpenVINO directory.
        device: cpu, cuda or cuda:N.
        backend: Runtime name.
        samples: Images to read.
        desc: Label of the progress bar.
        model_config: YAML file or name of the configuration of a file of another tool.

    Returns:
        Detections of each sample, in image pixels.
    """
    with open_detector(path, device, backend=backend, model_config=model_config) as detector:
        return [detector(read_image(sample.path)) for sample in make_progress_bar(samples, desc, "image")]


def get_eval_backend(device: str) -> str:
    """Return the runtime for accuracy measurements: OpenVINO if installed, because it executes INT8, or ONNX Runtime.

    Args:
        device: cpu, cuda or cuda:N.
    """
    return list_onnx_backends(device)[-1]


def list_onnx_backends(device: str) -> list[str]:
    """Return the installed runtimes that run an ONNX file on a device without building an engine.

    Args:
        device: cpu, cuda or cuda:N.
    """
    has_openvino = device == "cpu" and importlib.util.find_spec("openvino") is not None
    return ["onnxruntime", *(["openvino"] if has_openvino else [])]
