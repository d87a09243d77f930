"""Read opset, metadata and size of an ONNX file without the onnx package, which devices do not have."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from hkd_det.errors import DataError
from hkd_det.files import bytes_sha256

PRECISIONS = ("fp32", "fp16", "bf16", "int8")

# Field numbers of onnx.proto: ModelProto, OperatorSetIdProto, StringStringEntryProto, GraphProto, NodeProto,
# AttributeProto, TensorProto.
IR_VERSION, GRAPH, OPSET_IMPORT, METADATA_PROPS = 1, 7, 8, 14
DOMAIN, VERSION = 1, 2
KEY, VALUE = 1, 2
NODE, INITIALIZER = 1, 5
OP_TYPE, ATTRIBUTE = 4, 5
ATTRIBUTE_TENSOR = 5
DIMS, DATA_TYPE = 1, 2
WEIGHT_DATA_TYPES = {1, 2, 3, 10, 11, 16}  # float, uint8, int8, float16, double, bfloat16

T = TypeVar("T")


@dataclass(frozen=True)
class OnnxFile:
    """Content of an ONNX file.

    Attributes:
        path: The file.
        content: All bytes of the file.
        opset: Version of the default operator set.
        metadata: Entries of `metadata_props`.
        precision: fp32, fp16, bf16 or int8, as hkd-export wrote it.
    """

    path: Path
    content: bytes
    opset: int
    metadata: dict[str, str]
    precision: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, 64 hexadecimal digits."""
        return bytes_sha256(self.content)


def read_onnx_file(path: Path) -> OnnxFile:
    """Read an ONNX file and check that it is complete.

    The parser of TensorRT accepts arbitrary text as an empty graph, so the check happens here.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        DataError: If the file is missing, not an ONNX file, truncated, or has an unknown precision.
    """
    content, (opset, metadata) = _parse_file(path, lambda content: (content, _parse_model(content)))
    precision = metadata.get("hkd.precision", "fp32")
    if precision not in PRECISIONS:
        raise DataError(
            f"{path}: metadata hkd.precision: expected {', '.join(PRECISIONS)}, got {precision!r}. "
            "Export the model again."
        )
    return OnnxFile(path, content, opset, metadata, precision)


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of an ONNX file of any tool.

    Args:
        path: The file.

    Returns:
        Entries of `metadata_props`.

    Raises:
        DataError: The file is missing, not an ONNX file or truncated.
    """
    return _parse_file(path, lambda content: _parse_model(content)[1])


def count_parameters(path: Path) -> int:
    """Count the weights of an ONNX file: the elements of all constant tensors of float or 8-bit types.

    Args:
        path: The file.

    Returns:
        Number of elements.

    Raises:
        DataError: The file is missing, not an ONNX file or truncated.
    """
    return _parse_file(path, lambda content: sum(map(_count_elements, _iterate_constants(memoryview(content)))))


def _parse_file(path: Path, parse: Callable[[bytes], T]) -> T:
    if not path.is_file():
        raise DataError(f"{path}: no such model file. Create it with hkd-export.")
    try:
        return parse(path.read_bytes())
    except (ValueError, LookupError, TypeError):  # truncated, a missing field, or a field of another wire type
        raise DataError(f"{path}: not an ONNX file, or truncated. Create it with hkd-export.") from None


def _iterate_constants(model: memoryview) -> Iterator[memoryview]:
    """Yield each TensorProto of the initializers and of the nodes Constant."""
    for field_number, graph in _iterate_fields(model):
        if field_number != GRAPH:
            continue
        for graph_field, value in _iterate_fields(graph):
            if graph_field == INITIALIZER:
                yield value
            elif graph_field == NODE:
                node = list(_iterate_fields(value))
                if any(number == OP_TYPE and text == b"Constant" for number, text in node):
                    attributes = (_iterate_fields(text) for number, text in node if number == ATTRIBUTE)
                    yield from (text for fields in attributes for number, text in fields if number == ATTRIBUTE_TENSOR)


def _count_elements(tensor: memoryview) -> int:
    dims: list[int] = []
    data_type = 0
    for field_number, value in _iterate_fields(tensor):
        if field_number == DIMS:
            dims += [value] if isinstance(value, int) else _read_packed_varints(value)
        elif field_number == DATA_TYPE:
            data_type = value
    return prod(dims) if data_type in WEIGHT_DATA_TYPES else 0


def _read_packed_varints(data: memoryview) -> list[int]:
    values, offset = [], 0
    while offset < len(data):
        value, offset = _read_varint(data, offset)
        values.append(value)
    return values


def _parse_model(content: bytes) -> tuple[int, dict[str, str]]:
    """Return opset and metadata of a serialized ModelProto.

    Raise ValueError, LookupError or TypeError if the content is not a ModelProto.
    """
    opsets: dict[str, int] = {}
    metadata: dict[str, str] = {}
    field_numbers = set()
    for field_number, value in _iterate_fields(memoryview(content)):
        field_numbers.add(field_number)
        if field_number == OPSET_IMPORT:
            entry = dict(_iterate_fields(value))
            opsets[str(entry.get(DOMAIN, b""), "utf-8")] = int(entry[VERSION])
        elif field_number == METADATA_PROPS:
            entry = dict(_iterate_fields(value))
            metadata[str(entry[KEY], "utf-8")] = str(entry.get(VALUE, b""), "utf-8")
    if not {IR_VERSION, GRAPH} <= field_numbers or "" not in opsets:
        raise ValueError("a ModelProto has a version, a graph and a default opset")
    return opsets[""], metadata


def _iterate_fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield field number and value of a protocol buffer message: an int for a varint, otherwise bytes."""
    offset = 0
    while offset < len(data):
        key, offset = _read_varint(data, offset)
        wire_type = key & 7
        if wire_type == 0:
            value, offset = _read_varint(data, offset)
            yield key >> 3, value
            continue
        if wire_type == 2:
            size, offset = _read_varint(data, offset)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire_type}")
        if offset + size > len(data):
            raise ValueError("the message ends inside a field")
        yield key >> 3, data[offset : offset + size]
        offset += size


def _read_varint(data: memoryview, offset: int) -> tuple[int, int]:
    """Return the value of a varint and the offset behind it."""
    value, shift = 0, 0
    while True:
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if not byte & 0x80:
            return value, offset
        if shift > 63:
            raise ValueError("a varint has more than 64 bits")
