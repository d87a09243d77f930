"""Norpix `.seq` films, in which Caltech's pictures come, as Piotr's toolbox reads them (seqReaderPlugin.m).

A header of 1024 bytes, then frame behind frame. Uncompressed ones all take the same room; of the others each begins
with its size, and ends with its time and 2 or 10 bytes of nothing. Little-endian throughout.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import cv2
import imagesize
import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.png import is_truncated_png
from hkd_det.errors import DataError

HEADER_BYTES, TIME_BYTES = 1024, 6
NEWEST_VERSION = 4  # from 5 on frames begin elsewhere, and the toolbox does not know it
LARGEST_PIXELS = 2**26
RAW, JPEG, PNG = "raw", "jpg", "png"
CODECS = {100: RAW, 200: RAW, 101: RAW, 102: JPEG, 201: JPEG, 103: JPEG, 1: PNG, 2: PNG}
MOSAICS = (101, 103)  # one value a pixel: blue, green / green, red
MAGIC = {JPEG: b"\xff\xd8", PNG: b"\x89P"}


@dataclass(frozen=True)
class Header:
    """codec: its number in the file. frames: 0 if the file does not say. room: bytes an uncompressed frame takes."""

    size_hw: tuple[int, int]
    channels: int
    codec: int
    frames: int
    frame_bytes: int
    room: int
    fps: float

    @property
    def kind(self) -> str:
        """RAW, JPEG or PNG."""
        return CODECS[self.codec]


class SeqFilm:
    """An open film: `len(film)` frames, any of them at any time.

    times: [N] float64, seconds since 1970, or since whatever the writer took for zero; the last is NaN where the film
    ends right behind its picture.
    fps: of the first times, as the header's is often wrong; 0 where neither tells.
    """

    def __init__(self, path: Path, file: BinaryIO, header: Header) -> None:
        self.path, self.header, self._file = path, header, file
        self.size_hw = header.size_hw
        self._starts, self._sizes = _index(path, file, header)
        self.times = np.array([self._time(index) for index in range(len(self))], np.float64)
        self.fps = _fps(self.times, header.fps)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def as_jpeg(self) -> bool:
        """Is what `stored` gives a JPEG file that shows the frame?"""
        return self.header.kind == JPEG and self.header.codec not in MOSAICS

    def stored(self, index: int) -> bytes:
        """A frame as the file has it: a JPEG or PNG file, or pixels row by row, BGR."""
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        raw = _read(self._file, self._starts[index], self._sizes[index])
        if self.header.kind == JPEG and not (raw.startswith(MAGIC[JPEG]) and raw.endswith(b"\xff\xd9")):
            raise DataError(f"{self.path}: frame {index} is no whole JPEG")
        return raw

    def frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB; frame 0 is the first. Raises DataError for a frame that cannot be decoded."""
        raw, mosaic = self.stored(index), self.header.codec in MOSAICS
        if self.header.kind == RAW:
            channels = () if self.header.channels == 1 else (self.header.channels,)
            picture = np.frombuffer(raw, np.uint8).reshape(*self.size_hw, *channels)
        else:
            picture = self._decoded(raw, index, cv2.IMREAD_GRAYSCALE if mosaic else cv2.IMREAD_COLOR)
        if mosaic:
            return cv2.cvtColor(picture, cv2.COLOR_BayerBGGR2RGB)
        return cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB if picture.ndim == 2 else cv2.COLOR_BGR2RGB)

    def _decoded(self, raw: bytes, index: int, flag: int) -> NDArray[np.uint8]:
        """(H, W) or (H, W, 3) BGR. Its size is looked at first: a false one could take gigabytes."""
        picture = None
        with suppress(cv2.error, ValueError, struct.error):
            if imagesize.get(BytesIO(raw)) == self.size_hw[::-1] and not is_truncated_png(raw):
                picture = cv2.imdecode(np.frombuffer(raw, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        if picture is None:
            height, width = self.size_hw
            raise DataError(f"{self.path}: frame {index} is no picture of {width} x {height}")
        return picture

    def _time(self, index: int) -> float:
        self._file.seek(self._starts[index] + self._sizes[index])
        raw = self._file.read(TIME_BYTES)
        if len(raw) < TIME_BYTES:
            return float("nan")
        seconds, milliseconds = struct.unpack("<IH", raw)
        return float(seconds + milliseconds / 1000)


@contextmanager
def open_seq(path: Path) -> Iterator[SeqFilm]:
    """A film, closed at the end of the `with` block.

    Raises DataError, naming the file, for what is no film, and for one that is cut off: it says how many frames of it
    are whole.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such film") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, expected a .seq film") from None
    with file:
        yield SeqFilm(path, file, _header(file.read(HEADER_BYTES), path))


def _header(raw: bytes, path: Path) -> Header:
    if len(raw) < HEADER_BYTES or raw[:24] != b"\xed\xfe\0\0" + "Norpix seq".encode("utf-16-le"):
        raise DataError(f"{path}: not a .seq film (no Norpix header); get it again")
    version, size = struct.unpack_from("<iI", raw, 28)
    width, height, depth, used_depth, frame_bytes, codec, frames, origin, room = struct.unpack_from("<9I", raw, 548)
    fps = struct.unpack_from("<d", raw, 584)[0]
    if version > NEWEST_VERSION or size != HEADER_BYTES or origin != 0:
        raise DataError(
            f"{path}: .seq version {version}, header of {size} bytes, origin {origin}; "
            f"read are versions up to {NEWEST_VERSION} with {HEADER_BYTES} and 0"
        )
    if codec not in CODECS:
        raise DataError(f"{path}: .seq codec {codec}; read are {', '.join(map(str, CODECS))}")
    if not 0 < width * height <= LARGEST_PIXELS or used_depth != 8:
        raise DataError(f"{path}: a film of {width} x {height} pixels, {used_depth} bits each, cannot be read")
    header = Header(
        (height, width), depth // 8, codec, frames, frame_bytes, room, fps if 0 < fps < float("inf") else 0.0
    )
    if header.kind == RAW:
        _check_raw(header, path)
    return header


def _check_raw(header: Header, path: Path) -> None:
    height, width = header.size_hw
    wanted = (1,) if header.codec in MOSAICS else (1, 3)
    if header.channels not in wanted or header.frame_bytes != height * width * header.channels:
        raise DataError(
            f"{path}: {width} x {height} pixels of {header.channels} bytes do not make {header.frame_bytes} bytes"
        )
    if header.room < header.frame_bytes + TIME_BYTES or header.frames == 0:
        raise DataError(f"{path}: {header.frames} uncompressed frames of {header.room} bytes with their times")


def _index(path: Path, file: BinaryIO, header: Header) -> tuple[list[int], list[int]]:
    """Where each frame's bytes begin, and how many they are."""
    end = file.seek(0, 2)
    if header.kind == RAW:
        whole = max(0, end - HEADER_BYTES - header.frame_bytes + header.room) // header.room
        if whole < header.frames:
            raise _cut_off(path, whole, header.frames, end)
        starts = [HEADER_BYTES + index * header.room for index in range(header.frames)]
        return starts, [header.frame_bytes] * header.frames
    starts, sizes = [], []
    at, extra = HEADER_BYTES, TIME_BYTES + 2
    while len(starts) < header.frames if header.frames else at < end:
        prefix = _read(file, at, 6) if at + 6 <= end else b""
        size = int.from_bytes(prefix[:4], "little")
        if prefix[4:] != MAGIC[header.kind] or not 6 <= size <= end - at:
            raise _cut_off(path, len(starts), header.frames, at)
        starts.append(at + 4)
        sizes.append(size - 4)
        at += size + extra
        if len(starts) == 1 and at + 4 <= end and _read(file, at, 4) == bytes(4):  # as the toolbox finds it out
            extra, at = extra + 8, at + 8
    return starts, sizes


def _cut_off(path: Path, whole: int, frames: int, at: int) -> DataError:
    of = f" of {frames}" if frames else ""
    return DataError(f"{path}: {whole}{of} frames are whole: it is cut off, or damaged at byte {at}; get it again")


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    raw = file.read(count)
    if len(raw) < count:
        raise DataError(f"{file.name}: ends at byte {at + len(raw)}, before {at + count}")
    return raw


def _fps(times: NDArray[np.float64], written: float) -> float:
    """Of the usual steps among the first hundred times, as the toolbox has it."""
    steps = np.diff(times[:100])
    steps = steps[np.isfinite(steps)]
    usual = steps[np.abs(steps - np.median(steps)) < 0.005] if len(steps) else steps
    return float(1 / usual.mean()) if len(usual) and usual.mean() > 0 else written
