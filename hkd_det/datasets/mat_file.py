"""A MATLAB file (versions 5 to 7.2) as Python values, or one line about what is wrong with it.

After MathWorks' "MAT-File Format". scipy.io.loadmat knows more kinds of values, but one wrong byte can end the
whole process in it (https://github.com/scipy/scipy/pull/25349): no line for the user, no exit code.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError

HEADER_BYTES = 128
MAX_BYTES = 2**26  # of a file, and of what it unpacks to; the largest annotations have a few MiB
MAX_VALUES = 2**20  # in cells and structs; an empty one takes 8 bytes in the file, and hundreds here
MAX_DIMENSIONS = 32  # numpy's limit before version 2
# Types of elements, ...
NUMBER_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXT_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
INT32, UINT32, MATRIX, COMPRESSED = 5, 6, 14, 15
# ... and classes of arrays, which are made of elements.
CELL, STRUCT, CHAR, NUMERIC, COMPLEX_FLAG = 1, 2, 4, range(6, 16), 0x800


def read_mat(path: Path) -> dict[str, Any]:
    """Its variables by name.

    Numbers come as an array of the type they are stored in, often smaller than MATLAB's own: convert before
    reckoning. Logical values are 0 and 1. A text of one row is a str, one of several a list of str; a cell array an
    object array, a struct array an object array of dicts. What is sparse, complex, a function or an object is refused.
    Raises DataError, naming the file.
    """
    try:
        return _parse_variables(_read_bytes(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, expected an annotation file") from None
    except RecursionError:
        raise DataError(f"{path}: not a readable MATLAB file (nested too deeply)") from None
    except (ValueError, zlib.error) as error:
        raise DataError(f"{path}: not a readable MATLAB file ({error})") from None


def to_float_array(value: Any) -> NDArray[np.float64]:
    """A value of `read_mat` that has to be an array of numbers, in double precision; ValueError if it is not."""
    if not isinstance(value, np.ndarray) or value.dtype == object:
        raise ValueError(f"{type(value).__name__} where numbers should be")
    return value.astype(np.float64)


def to_text(value: Any) -> str:
    """A value of `read_mat` that has to be one line of text; ValueError if it is not."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{type(value).__name__} where a line of text should be")
    return value


def _read_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    return raw


def _parse_variables(raw: bytes) -> dict[str, Any]:
    orders = {b"IM": "<", b"MI": ">"}
    if len(raw) < HEADER_BYTES or raw[126:HEADER_BYTES] not in orders:
        raise ValueError("its header is not that of version 5")
    order = orders[raw[126:HEADER_BYTES]]
    if struct.unpack_from(order + "H", raw, 124)[0] >> 8 == 2:
        raise ValueError("version 7.3; save it in MATLAB with -v7")
    budget = iter(range(MAX_VALUES))
    elements, unpacked, variables = _ElementReader(memoryview(raw)[HEADER_BYTES:], order, budget), 0, {}
    while elements.num_bytes_left:
        kind, content = elements.read_element()
        if kind == COMPRESSED:
            content = memoryview(_decompress(content, MAX_BYTES - unpacked))
            unpacked += len(content)
            kind, content = _ElementReader(content, order, budget).read_element()
        if kind != MATRIX:
            raise ValueError(f"an element of type {kind} where a variable should be")
        name, value = _parse_matrix(content, order, budget)
        variables[name] = value
    return variables


def _decompress(content: memoryview, max_bytes: int) -> bytes:
    """Not zlib.decompress, which would unpack a few bytes to whatever they claim."""
    stream = zlib.decompressobj()
    unpacked = stream.decompress(content, max_bytes + 1)
    if len(unpacked) > max_bytes:
        raise ValueError(f"it unpacks to more than {MAX_BYTES >> 20} MiB")
    if not stream.eof:
        raise ValueError("it ends too early")
    return unpacked


class _ElementReader:
    """Elements (type, size, content) that lie one behind the other. budget: runs out after the last value allowed."""

    def __init__(self, raw: memoryview, byte_order: str, budget: Iterator[int]) -> None:
        self.raw, self.byte_order, self.budget, self.offset = raw, byte_order, budget, 0

    @property
    def num_bytes_left(self) -> int:
        """Bytes not yet taken."""
        return max(0, len(self.raw) - self.offset)

    def read_element(self) -> tuple[int, memoryview]:
        """Type and content of the next element."""
        if self.num_bytes_left < 8:
            raise ValueError("it ends too early")
        first, second = struct.unpack_from(self.byte_order + "II", self.raw, self.offset)
        # Up to four bytes lie in the second word; type and size then share the first.
        small = first >> 16 > 0
        kind, size = (first & 0xFFFF, first >> 16) if small else (first, second)
        start = self.offset + (4 if small else 8)
        if size > (4 if small else len(self.raw) - start):
            raise ValueError("it ends too early")
        padding = 0 if kind == COMPRESSED else -size % 8
        self.offset = self.offset + 8 if small else start + size + padding
        return kind, self.raw[start : start + size]

    def read_integers(self, element_type: int) -> list[int]:
        """The next element, which has to hold whole numbers of that type."""
        found, content = self.read_element()
        if found != element_type or len(content) % 4:
            raise ValueError(f"an element of type {found} where one of {element_type} should be")
        return list(
            struct.unpack(f"{self.byte_order}{len(content) // 4}{'i' if element_type == INT32 else 'I'}", content)
        )

    def read_matrices(self, count: int) -> list[Any]:
        """The values of the next `count` elements, which have to be matrices."""
        if count * 8 > self.num_bytes_left:
            raise ValueError("it ends too early")
        return [self.read_matrix() for _ in range(count)]

    def read_matrix(self) -> Any:
        kind, content = self.read_element()
        if kind != MATRIX:
            raise ValueError(f"an element of type {kind} where a matrix should be")
        if next(self.budget, None) is None:
            raise ValueError(f"more than {MAX_VALUES} values")
        return _parse_matrix(content, self.byte_order, self.budget)[1] if content else np.zeros((0, 0))


def _parse_matrix(content: memoryview, byte_order: str, budget: Iterator[int]) -> tuple[str, Any]:
    """Name and value of a matrix."""
    elements = _ElementReader(content, byte_order, budget)
    flags = elements.read_integers(UINT32)
    shape = elements.read_integers(INT32)
    name = str(elements.read_element()[1], "latin-1")
    if not name.isprintable():
        raise ValueError("a variable whose name is none")
    if not flags or not 2 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 0:
        raise ValueError(f"variable {name[:63]!r} has no shape")
    return name, _parse_value(elements, flags[0], shape)


def _parse_value(reader: _ElementReader, flags: int, shape: list[int]) -> Any:
    kind = flags & 0xFF
    if kind in NUMERIC and not flags & COMPLEX_FLAG:
        return _parse_numbers(reader, shape)
    if kind == CHAR:
        return _parse_text(reader, shape)
    if kind == CELL:
        return _make_object_array(reader.read_matrices(math.prod(shape)), shape)
    if kind == STRUCT:
        return _make_object_array(_parse_structs(reader, math.prod(shape)), shape)
    raise ValueError(f"an array of class {kind}, sparse or complex; expected real numbers, text, cells or structs")


def _parse_numbers(reader: _ElementReader, shape: list[int]) -> Any:
    kind, content = reader.read_element()
    if kind not in NUMBER_DTYPES:
        raise ValueError(f"an element of type {kind} where numbers should be")
    stored = np.dtype(reader.byte_order + NUMBER_DTYPES[kind])
    if len(content) != stored.itemsize * math.prod(shape):
        raise ValueError(f"{len(content)} bytes of numbers for the shape {tuple(shape)}")
    # MATLAB counts down the columns. A copy, or a small array would keep the whole file in memory.
    return np.frombuffer(content, stored).reshape(shape, order="F").astype(stored.newbyteorder("="))


def _parse_text(reader: _ElementReader, shape: list[int]) -> str | list[str]:
    kind, content = reader.read_element()
    if kind not in TEXT_ENCODINGS:
        raise ValueError(f"an element of type {kind} where text should be")
    wide = TEXT_ENCODINGS[kind] in ("utf-16", "utf-32")
    letters = str(content, TEXT_ENCODINGS[kind] + ("" if not wide else "-le" if reader.byte_order == "<" else "-be"))
    rows = shape[0]
    if rows < 2:
        return letters
    if len(letters) != math.prod(shape):
        raise ValueError(f"{len(letters)} letters for the shape {tuple(shape)}")
    return [letters[row::rows] for row in range(rows if letters else 0)]


def _parse_structs(reader: _ElementReader, count: int) -> list[dict[str, Any]]:
    lengths = reader.read_integers(INT32)
    names = bytes(reader.read_element()[1])
    if len(lengths) != 1 or lengths[0] < 1 or len(names) % lengths[0]:
        raise ValueError("a struct whose fields have no names")
    fields = [names[at : at + lengths[0]].split(b"\0")[0].decode("latin-1") for at in range(0, len(names), lengths[0])]
    if count > 1 and not fields:
        raise ValueError(f"{count} structs without fields")
    values, width = reader.read_matrices(count * len(fields)), len(fields)
    return [dict(zip(fields, values[at * width : (at + 1) * width], strict=True)) for at in range(count)]


def _make_object_array(values: list[Any], shape: list[int]) -> Any:
    array = np.empty(len(values), object)
    for index, value in enumerate(values):  # array[:] = values would look into the values for more dimensions
        array[index] = value
    return array.reshape(shape, order="F")
