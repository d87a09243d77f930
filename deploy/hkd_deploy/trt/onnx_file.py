"""Read opset and metadata of an ONNX file without the onnx package, which devices do not have."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkd_det.errors import DataError
from hkd_det.files import bytes_sha256

PRECISIONS = ("fp32", "fp16", "bf16", "int8")

# Field numbers of onnx.proto: ModelProto, OperatorSetIdProto, StringStringEntryProto.
IR_VERSION, GRAPH, OPSET_IMPORT, METADATA_PROPS = 1, 7, 8, 14
DOMAIN, VERSION = 1, 2
KEY, VALUE = 1, 2


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
    if not path.is_file():
        raise DataError(f"{path}: no such model file. Create it with hkd-export.")
    content = path.read_bytes()
    try:
        opset, metadata = _parse_model(content)
    except (ValueError, LookupError, TypeError):  # truncated, a missing field, or a field of another wire type
        raise DataError(f"{path}: not an ONNX file, or truncated. Create it with hkd-export.") from None
    precision = metadata.get("hkd.precision", "fp32")
    if precision not in PRECISIONS:
        raise DataError(
            f"{path}: metadata hkd.precision: expected {', '.join(PRECISIONS)}, got {precision!r}. "
            "Export the model again."
        )
    return OnnxFile(path, content, opset, metadata, precision)


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
