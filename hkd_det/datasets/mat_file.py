"""MATLAB files (versions 5 to 7.2) as Python values, with strict validation.

The implementation follows MathWorks, "MAT-File Format". scipy.io.loadmat supports more types, but one wrong byte can
crash the process (https://github.com/scipy/scipy/pull/25349), without a message for the user.
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
from hkd_det.files import read_content

HEADER_BYTES = 128
MAX_BYTES = 2**26  # file size and decompressed size; the largest annotations have a few MiB
MAX_VALUES = 2**20  # elements of cells and structs; an empty one needs 8 bytes in the file, but hundreds in memory
MAX_DIMENSIONS = 32  # limit of NumPy before version 2
# Data types of elements.
NUMBER_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXT_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
INT32, UINT32, MATRIX, COMPRESSED = 5, 6, 14, 15
# Classes of arrays; an array consists of elements.
CELL, STRUCT, CHAR, NUMERIC, COMPLEX_FLAG = 1, 2, 4, range(6, 16), 0x800


def read_mat(path: Path) -> dict[str, Any]:
    """Read the variables of a MATLAB file.

    Numbers become arrays of the stored type, which is often smaller than the MATLAB type: convert them before
    computing. Logical values are 0 and 1. A text of one row becomes a str, several rows a list of str. A cell array
    becomes an object array, a struct array an object array of dicts. Sparse and complex arrays, functions and
    objects are not supported.

    Args:
        path: MATLAB file.

    Returns:
        Values by variable name.

    Raises:
        DataError: The file is missing or invalid. The message names the file.
    """
    try:
        return _parse_variables(_read_bytes(path))
    except RecursionError:
        raise DataError(f"{path}: expected a readable MATLAB file, got one that is nested too deeply.") from None
    except (ValueError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable MATLAB file ({error}).") from None


def to_float_array(value: Any) -> NDArray[np.float64]:
    """Convert a value of `read_mat` to a float64 array.

    Args:
        value: Value that must be an array of numbers.

    Returns:
        array, float64: The same shape as `value`.

    Raises:
        ValueError: The value is not an array of numbers.
    """
    if not isinstance(value, np.ndarray) or value.dtype == object:
        raise ValueError(f"expected numbers, got {type(value).__name__}")
    return value.astype(np.float64)


def to_text(value: Any) -> str:
    """Return a value of `read_mat` that must be one line of text.

    Args:
        value: Value of any type.

    Raises:
        ValueError: The value is not a printable string.
    """
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"expected a line of text, got {type(value).__name__}")
    return value


def _read_bytes(path: Path) -> bytes:
    raw = read_content(path, "a MATLAB file", max_bytes=MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    return raw


def _parse_variables(raw: bytes) -> dict[str, Any]:
    orders = {b"IM": "<", b"MI": ">"}
    if len(raw) < HEADER_BYTES or raw[126:HEADER_BYTES] not in orders:
        raise ValueError("the header is not that of version 5")
    order = orders[raw[126:HEADER_BYTES]]
    if struct.unpack_from(order + "H", raw, 124)[0] >> 8 == 2:
        raise ValueError("version 7.3 is not supported, save it in MATLAB with -v7")
    budget = iter(range(MAX_VALUES))
    elements = _ElementReader(memoryview(raw)[HEADER_BYTES:], order, budget)
    decompressed, variables = 0, {}
    while elements.num_bytes_left:
        element_type, content = elements.read_element()
        if element_type == COMPRESSED:
            content = memoryview(_decompress(content, MAX_BYTES - decompressed))
            decompressed += len(content)
            element_type, content = _ElementReader(content, order, budget).read_element()
        if element_type != MATRIX:
            raise ValueError(f"expected a variable, got an element of type {element_type}")
        name, value = _parse_matrix(content, order, budget)
        variables[name] = value
    return variables


def _decompress(content: memoryview, max_bytes: int) -> bytes:
    """Decompress with a size limit. zlib.decompress has none: a few bytes can expand to gigabytes."""
    stream = zlib.decompressobj()
    decompressed = stream.decompress(content, max_bytes + 1)
    if len(decompressed) > max_bytes:
        raise ValueError(f"the decompressed size is above {MAX_BYTES >> 20} MiB")
    if not stream.eof:
        raise ValueError("truncated")
    return decompressed


class _ElementReader:
    """Reads consecutive elements (type, size, content).

    Args:
        raw: Bytes of the elements.
        byte_order: "<" or ">".
        budget: Iterator that ends after `MAX_VALUES` values.
    """

    def __init__(self, raw: memoryview, byte_order: str, budget: Iterator[int]) -> None:
        self.raw, self.byte_order, self.budget, self.offset = raw, byte_order, budget, 0

    @property
    def num_bytes_left(self) -> int:
        """Number of remaining bytes."""
        return max(0, len(self.raw) - self.offset)

    def read_element(self) -> tuple[int, memoryview]:
        """Return type and content of the next element."""
        if self.num_bytes_left < 8:
            raise ValueError("truncated")
        first, second = struct.unpack_from(self.byte_order + "II", self.raw, self.offset)
        # Content of up to four bytes is in the second word. Type and size then share the first word.
        is_small = first >> 16 > 0
        element_type, size = (first & 0xFFFF, first >> 16) if is_small else (first, second)
        start = self.offset + (4 if is_small else 8)
        if size > (4 if is_small else len(self.raw) - start):
            raise ValueError("truncated")
        padding = 0 if element_type == COMPRESSED else -size % 8
        self.offset = self.offset + 8 if is_small else start + size + padding
        return element_type, self.raw[start : start + size]

    def read_integers(self, element_type: int) -> list[int]:
        """Return the next element, which must contain integers of the given type."""
        actual_type, content = self.read_element()
        if actual_type != element_type or len(content) % 4:
            raise ValueError(f"expected an element of type {element_type}, got {actual_type}")
        code = "i" if element_type == INT32 else "I"
        return list(struct.unpack(f"{self.byte_order}{len(content) // 4}{code}", content))

    def read_matrices(self, count: int) -> list[Any]:
        """Return the values of the next `count` elements, which must be matrices."""
        if count * 8 > self.num_bytes_left:
            raise ValueError("truncated")
        return [self.read_matrix() for _ in range(count)]

    def read_matrix(self) -> Any:
        """Return the value of the next element, which must be a matrix."""
        element_type, content = self.read_element()
        if element_type != MATRIX:
            raise ValueError(f"expected a matrix, got an element of type {element_type}")
        if next(self.budget, None) is None:
            raise ValueError(f"more than {MAX_VALUES} values")
        return _parse_matrix(content, self.byte_order, self.budget)[1] if content else np.zeros((0, 0))


def _parse_matrix(content: memoryview, byte_order: str, budget: Iterator[int]) -> tuple[str, Any]:
    """Return name and value of a matrix."""
    elements = _ElementReader(content, byte_order, budget)
    flags = elements.read_integers(UINT32)
    shape = elements.read_integers(INT32)
    name = str(elements.read_element()[1], "latin-1")
    if not name.isprintable():
        raise ValueError("the name of a variable is not printable")
    if not flags or not 2 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 0:
        raise ValueError(f"variable {name[:63]!r} has an invalid shape")
    return name, _parse_value(elements, flags[0], shape)


def _parse_value(reader: _ElementReader, flags: int, shape: list[int]) -> Any:
    array_class = flags & 0xFF
    if array_class in NUMERIC and not flags & COMPLEX_FLAG:
        return _parse_numbers(reader, shape)
    if array_class == CHAR:
        return _parse_text(reader, shape)
    if array_class == CELL:
        return _make_object_array(reader.read_matrices(math.prod(shape)), shape)
    if array_class == STRUCT:
        return _make_object_array(_parse_structs(reader, math.prod(shape)), shape)
    raise ValueError(
        f"expected real numbers, text, cells or structs, got a sparse or complex array or one of class {array_class}"
    )


def _parse_numbers(reader: _ElementReader, shape: list[int]) -> Any:
    element_type, content = reader.read_element()
    if element_type not in NUMBER_DTYPES:
        raise ValueError(f"expected numbers, got an element of type {element_type}")
    dtype = np.dtype(reader.byte_order + NUMBER_DTYPES[element_type])
    if len(content) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{len(content)} bytes of numbers do not match the shape {tuple(shape)}")
    # MATLAB uses column-major order. Copy the data: a view would keep the whole file in memory.
    return np.frombuffer(content, dtype).reshape(shape, order="F").astype(dtype.newbyteorder("="))


def _parse_text(reader: _ElementReader, shape: list[int]) -> str | list[str]:
    element_type, content = reader.read_element()
    if element_type not in TEXT_ENCODINGS:
        raise ValueError(f"expected text, got an element of type {element_type}")
    encoding = TEXT_ENCODINGS[element_type]
    if encoding in ("utf-16", "utf-32"):
        encoding += "-le" if reader.byte_order == "<" else "-be"
    characters = str(content, encoding)
    num_rows = shape[0]
    if num_rows < 2:
        return characters
    if len(characters) != math.prod(shape):
        raise ValueError(f"{len(characters)} characters do not match the shape {tuple(shape)}")
    return [characters[row::num_rows] for row in range(num_rows if characters else 0)]


def _parse_structs(reader: _ElementReader, count: int) -> list[dict[str, Any]]:
    lengths = reader.read_integers(INT32)
    names = bytes(reader.read_element()[1])
    if len(lengths) != 1 or lengths[0] < 1 or len(names) % lengths[0]:
        raise ValueError("the fields of a struct have no names")
    length = lengths[0]
    fields = [names[start : start + length].split(b"\0")[0].decode("latin-1") for start in range(0, len(names), length)]
    if count > 1 and not fields:
        raise ValueError(f"{count} structs without fields")
    values, width = reader.read_matrices(count * len(fields)), len(fields)
    return [dict(zip(fields, values[row * width : (row + 1) * width], strict=True)) for row in range(count)]


def _make_object_array(values: list[Any], shape: list[int]) -> Any:
    array = np.empty(len(values), object)
    for index, value in enumerate(values):  # array[:] = values would convert nested values to more dimensions
        array[index] = value
    return array.reshape(shape, order="F")
