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
LARGEST_BYTES = 2**26  # of a file, and of what it unpacks to; the largest annotations have a few MiB
MOST_VALUES = 2**20  # in cells and structs; an empty one takes 8 bytes in the file, and hundreds here
MOST_DIMENSIONS = 32  # numpy's limit before version 2
# Types of elements, ...
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
INT32, UINT32, MATRIX, COMPRESSED = 5, 6, 14, 15
# ... and classes of arrays, which are made of elements.
CELL, STRUCT, TEXT, NUMERIC, COMPLEX = 1, 2, 4, range(6, 16), 0x800


def read_mat(path: Path) -> dict[str, Any]:
    """Its variables by name.

    Numbers come as an array of the type they are stored in, often smaller than MATLAB's own: convert before
    reckoning. Logical values are 0 and 1. A text of one row is a str, one of several a list of str; a cell array an
    object array, a struct array an object array of dicts. What is sparse, complex, a function or an object is refused.
    Raises DataError, naming the file.
    """
    try:
        return _variables(_raw(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, expected an annotation file") from None
    except RecursionError:
        raise DataError(f"{path}: not a readable MATLAB file (nested too deeply)") from None
    except (ValueError, zlib.error) as error:
        raise DataError(f"{path}: not a readable MATLAB file ({error})") from None


def numbers(value: Any) -> NDArray[np.float64]:
    """A value of `read_mat` that has to be an array of numbers, in double precision; ValueError if it is not."""
    if not isinstance(value, np.ndarray) or value.dtype == object:
        raise ValueError(f"{type(value).__name__} where numbers should be")
    return value.astype(np.float64)


def text(value: Any) -> str:
    """A value of `read_mat` that has to be one line of text; ValueError if it is not."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{type(value).__name__} where a line of text should be")
    return value


def _raw(path: Path) -> bytes:
    with path.open("rb") as file:
        raw = file.read(LARGEST_BYTES + 1)
    if len(raw) > LARGEST_BYTES:
        raise ValueError(f"larger than {LARGEST_BYTES >> 20} MiB")
    return raw


def _variables(raw: bytes) -> dict[str, Any]:
    orders = {b"IM": "<", b"MI": ">"}
    if len(raw) < HEADER_BYTES or raw[126:HEADER_BYTES] not in orders:
        raise ValueError("its header is not that of version 5")
    order = orders[raw[126:HEADER_BYTES]]
    if struct.unpack_from(order + "H", raw, 124)[0] >> 8 == 2:
        raise ValueError("version 7.3; save it in MATLAB with -v7")
    budget = iter(range(MOST_VALUES))
    elements, unpacked, variables = _Elements(memoryview(raw)[HEADER_BYTES:], order, budget), 0, {}
    while elements.left:
        kind, content = elements.take()
        if kind == COMPRESSED:
            content = memoryview(_decompressed(content, LARGEST_BYTES - unpacked))
            unpacked += len(content)
            kind, content = _Elements(content, order, budget).take()
        if kind != MATRIX:
            raise ValueError(f"an element of type {kind} where a variable should be")
        name, value = _named(content, order, budget)
        variables[name] = value
    return variables


def _decompressed(content: memoryview, most: int) -> bytes:
    """Not zlib.decompress, which would unpack a few bytes to whatever they claim."""
    stream = zlib.decompressobj()
    unpacked = stream.decompress(content, most + 1)
    if len(unpacked) > most:
        raise ValueError(f"it unpacks to more than {LARGEST_BYTES >> 20} MiB")
    if not stream.eof:
        raise ValueError("it ends too early")
    return unpacked


class _Elements:
    """Elements (type, size, content) that lie one behind the other. budget: runs out after the last value allowed."""

    def __init__(self, raw: memoryview, order: str, budget: Iterator[int]) -> None:
        self.raw, self.order, self.budget, self.at = raw, order, budget, 0

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return max(0, len(self.raw) - self.at)

    def take(self) -> tuple[int, memoryview]:
        """Type and content of the next element."""
        if self.left < 8:
            raise ValueError("it ends too early")
        first, second = struct.unpack_from(self.order + "II", self.raw, self.at)
        # Up to four bytes lie in the second word; type and size then share the first.
        small = first >> 16 > 0
        kind, size = (first & 0xFFFF, first >> 16) if small else (first, second)
        start = self.at + (4 if small else 8)
        if size > (4 if small else len(self.raw) - start):
            raise ValueError("it ends too early")
        padding = 0 if kind == COMPRESSED else -size % 8
        self.at = self.at + 8 if small else start + size + padding
        return kind, self.raw[start : start + size]

    def integers(self, kind: int) -> list[int]:
        """The next element, which has to hold whole numbers of that type."""
        found, content = self.take()
        if found != kind or len(content) % 4:
            raise ValueError(f"an element of type {found} where one of {kind} should be")
        return list(struct.unpack(f"{self.order}{len(content) // 4}{'i' if kind == INT32 else 'I'}", content))

    def matrices(self, count: int) -> list[Any]:
        """The values of the next `count` elements, which have to be matrices."""
        if count * 8 > self.left:
            raise ValueError("it ends too early")
        return [self.matrix() for _ in range(count)]

    def matrix(self) -> Any:
        kind, content = self.take()
        if kind != MATRIX:
            raise ValueError(f"an element of type {kind} where a matrix should be")
        if next(self.budget, None) is None:
            raise ValueError(f"more than {MOST_VALUES} values")
        return _named(content, self.order, self.budget)[1] if content else np.zeros((0, 0))


def _named(content: memoryview, order: str, budget: Iterator[int]) -> tuple[str, Any]:
    """Name and value of a matrix."""
    elements = _Elements(content, order, budget)
    flags = elements.integers(UINT32)
    shape = elements.integers(INT32)
    name = str(elements.take()[1], "latin-1")
    if not name.isprintable():
        raise ValueError("a variable whose name is none")
    if not flags or not 2 <= len(shape) <= MOST_DIMENSIONS or min(shape) < 0:
        raise ValueError(f"variable {name[:63]!r} has no shape")
    return name, _value(elements, flags[0], shape)


def _value(elements: _Elements, flags: int, shape: list[int]) -> Any:
    kind = flags & 0xFF
    if kind in NUMERIC and not flags & COMPLEX:
        return _numbers(elements, shape)
    if kind == TEXT:
        return _text(elements, shape)
    if kind == CELL:
        return _objects(elements.matrices(math.prod(shape)), shape)
    if kind == STRUCT:
        return _objects(_structs(elements, math.prod(shape)), shape)
    raise ValueError(f"an array of class {kind}, sparse or complex; expected real numbers, text, cells or structs")


def _numbers(elements: _Elements, shape: list[int]) -> Any:
    kind, content = elements.take()
    if kind not in NUMBERS:
        raise ValueError(f"an element of type {kind} where numbers should be")
    stored = np.dtype(elements.order + NUMBERS[kind])
    if len(content) != stored.itemsize * math.prod(shape):
        raise ValueError(f"{len(content)} bytes of numbers for the shape {tuple(shape)}")
    # MATLAB counts down the columns. A copy, or a small array would keep the whole file in memory.
    return np.frombuffer(content, stored).reshape(shape, order="F").astype(stored.newbyteorder("="))


def _text(elements: _Elements, shape: list[int]) -> str | list[str]:
    kind, content = elements.take()
    if kind not in TEXTS:
        raise ValueError(f"an element of type {kind} where text should be")
    wide = TEXTS[kind] in ("utf-16", "utf-32")
    letters = str(content, TEXTS[kind] + ("" if not wide else "-le" if elements.order == "<" else "-be"))
    rows = shape[0]
    if rows < 2:
        return letters
    if len(letters) != math.prod(shape):
        raise ValueError(f"{len(letters)} letters for the shape {tuple(shape)}")
    return [letters[row::rows] for row in range(rows if letters else 0)]


def _structs(elements: _Elements, count: int) -> list[dict[str, Any]]:
    lengths = elements.integers(INT32)
    names = bytes(elements.take()[1])
    if len(lengths) != 1 or lengths[0] < 1 or len(names) % lengths[0]:
        raise ValueError("a struct whose fields have no names")
    fields = [names[at : at + lengths[0]].split(b"\0")[0].decode("latin-1") for at in range(0, len(names), lengths[0])]
    if count > 1 and not fields:
        raise ValueError(f"{count} structs without fields")
    values, width = elements.matrices(count * len(fields)), len(fields)
    return [dict(zip(fields, values[at * width : (at + 1) * width], strict=True)) for at in range(count)]


def _objects(values: list[Any], shape: list[int]) -> Any:
    array = np.empty(len(values), object)
    for index, value in enumerate(values):  # array[:] = values would look into the values for more dimensions
        array[index] = value
    return array.reshape(shape, order="F")
