"""The ONNX file an engine is made of: what it says of itself, read without the onnx package, which no device has."""

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
    """An ONNX file, read whole.

    opset: of the standard operators. precision: fp32, fp16, bf16 or int8, as hkd-export made it.
    sha256: 64 hexadecimal digits, of the file.
    """

    path: Path
    content: bytes
    opset: int
    metadata: dict[str, str]
    precision: str

    @property
    def sha256(self) -> str:
        """Of the file, 64 hexadecimal digits."""
        return bytes_sha256(self.content)


def read_onnx_file(path: Path) -> OnnxFile:
    """Read an ONNX file. Raises DataError for what is none.

    TensorRT's own parser takes any text for an empty graph, and any opset for one it knows.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such model file; hkd-export writes one")
    content = path.read_bytes()
    try:
        opset, metadata = _parse_model(content)
    except (ValueError, LookupError, TypeError):  # ends too early, lacks a field, or has another kind of field there
        raise DataError(f"{path}: not an ONNX file, or a truncated one") from None
    precision = metadata.get("hkd.precision", "fp32")
    if precision not in PRECISIONS:
        raise DataError(f"{path}: metadata hkd.precision is {precision!r}, known are {', '.join(PRECISIONS)}")
    return OnnxFile(path, content, opset, metadata, precision)


def _parse_model(content: bytes) -> tuple[int, dict[str, str]]:
    """(opset, metadata) of a serialised ModelProto. Raises ValueError, LookupError or TypeError if it can't be one."""
    opsets: dict[str, int] = {}
    metadata: dict[str, str] = {}
    seen = set()
    for field, value in _iterate_fields(memoryview(content)):
        seen.add(field)
        if field == OPSET_IMPORT:
            entry = dict(_iterate_fields(value))
            opsets[str(entry.get(DOMAIN, b""), "utf-8")] = int(entry[VERSION])
        elif field == METADATA_PROPS:
            entry = dict(_iterate_fields(value))
            metadata[str(entry[KEY], "utf-8")] = str(entry.get(VALUE, b""), "utf-8")
    if not {IR_VERSION, GRAPH} <= seen or "" not in opsets:
        raise ValueError("a ModelProto has a version, a graph and an opset")
    return opsets[""], metadata


def _iterate_fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer: an int for a varint, else the bytes."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _read_varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("ends inside a field")
        yield key >> 3, data[at : at + size]
        at += size


def _read_varint(data: memoryview, offset: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if not byte & 0x80:
            return value, offset
        if shift > 63:
            raise ValueError("a varint of more than 64 bits")
