"""The FP32 file that a smaller one is made of."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkd_deploy.model_metadata import ModelMetadata
from hkd_det.errors import DataError, UsageError, import_package
from hkd_det.files import bytes_sha256

SUPPORTED_OPSETS = range(13, 21)  # scales per channel came with 13; ONNX Runtime's quantiser stops before 21


REDUCED_TYPES = ("FLOAT16", "BFLOAT16", "INT8", "UINT8")  # of weights: a file that has any is no FP32 file


@dataclass(frozen=True, eq=False)
class Fp32Model:
    """An FP32 file as hkd-export wrote it.

    model: the onnx.ModelProto; every node has a name of its own. sha256: 64 hexadecimal digits, of the file.
    """

    path: Path
    model: Any
    model_metadata: ModelMetadata
    sha256: str

    def get_metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return {entry.key: entry.value for entry in self.model.metadata_props}


def read_fp32_model(path: Path) -> Fp32Model:
    """Read an FP32 file of hkd-export.

    Raises UnavailableError without the onnx package, DataError for what is no ONNX file, no file of hkd-export, not
    FP32 any more, or of an opset that is too old or too new, UsageError for a graph that cannot be judged.
    """
    onnx = import_onnx()
    if not path.is_file():
        raise DataError(f"{path}: no such model file; hkd-export writes one")
    packed = path.read_bytes()
    model = parse_onnx_model(onnx, packed, path)
    source = Fp32Model(
        path, model, ModelMetadata.from_metadata(_read_metadata(model), path), bytes_sha256(packed)
    )
    _check_is_fp32(onnx, source)
    _check_opset(source)
    if source.model_metadata.raw or source.model_metadata.preprocess != "uint8":
        flag = "--raw" if source.model_metadata.raw else "--no-preprocess"
        raise UsageError(f"{path}: exported with {flag}: nothing here can run and judge it; export it again without")
    _name_nodes(model)
    return source


def import_onnx() -> Any:
    """The onnx package; UnavailableError where it is missing."""
    return import_package("onnx", "onnx", "--precision needs it: pip install 'hkd-det[quant]'")


def parse_onnx_model(onnx: Any, content: bytes, path: Path) -> Any:
    """The onnx.ModelProto in the bytes of the file at `path`. Raises DataError if they are none."""
    decode_error = importlib.import_module("google.protobuf.message").DecodeError
    try:
        model = onnx.load_model_from_string(content)
    except decode_error:
        model = None
    # An empty file, and many a text, is a valid message that says nothing; a damaged text comes as bytes.
    if model is None or not model.graph.node or not all(isinstance(text, str) for text in _iterate_strings(model)):
        raise DataError(f"{path}: not an ONNX file, or a truncated one; hkd-export writes one")
    return model


def _iterate_strings(model: Any) -> Iterator[str | bytes]:
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)
    for node in model.graph.node:
        yield from (node.name, node.op_type, *node.input, *node.output)


def _read_metadata(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _check_is_fp32(onnx: Any, source: Fp32Model) -> None:
    marks = {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger", "QLinearMatMul"}
    types = {onnx.TensorProto.DataType.Name(weight.data_type) for weight in source.model.graph.initializer}
    small = sorted(types.intersection(REDUCED_TYPES))
    if small or any(node.op_type in marks for node in source.model.graph.node):
        known = source.get_metadata().get("hkd.precision", small[0].lower() if small else "int8")
        raise DataError(f"{source.path}: is {known} already; start from the FP32 file that hkd-export wrote")


def _check_opset(source: Fp32Model) -> None:
    (opset,) = [entry.version for entry in source.model.opset_import if entry.domain in ("", "ai.onnx")] or [0]
    if opset not in SUPPORTED_OPSETS:
        raise DataError(
            f"{source.path}: opset {opset}, and --precision takes {SUPPORTED_OPSETS[0]} to {SUPPORTED_OPSETS[-1]}; "
            "export it again with hkd-export, which writes 17"
        )


def _name_nodes(model: Any) -> None:
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        taken.add(node.name)
