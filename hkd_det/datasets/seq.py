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

from hkd_det.errors import DataError
from hkd_det.image import is_truncated_png

HEADER_BYTES, TIME_BYTES = 1024, 6
MAX_VERSION = 4  # from 5 on frames begin elsewhere, and the toolbox does not know it
MAX_PIXELS = 2**26
RAW, JPEG, PNG = "raw", "jpg", "png"
CODECS = {100: RAW, 200: RAW, 101: RAW, 102: JPEG, 201: JPEG, 103: JPEG, 1: PNG, 2: PNG}
BAYER_CODECS = (101, 103)  # one value a pixel: blue, green / green, red
MAGIC = {JPEG: b"\xff\xd8", PNG: b"\x89P"}


@dataclass(frozen=True)
class SeqHeader:
    """codec: its number in the file. frames: 0 if the file does not say. room: bytes an uncompressed frame takes."""

    size_hw: tuple[int, int]
    channels: int
    codec: int
    num_frames: int
    frame_bytes: int
    frame_stride_bytes: int
    fps: float

    @property
    def encoding(self) -> str:
        """RAW, JPEG or PNG."""
        return CODECS[self.codec]


class SeqVideo:
    """An open film: `len(film)` frames, any of them at any time.

    times: [N] float64, seconds since 1970, or since whatever the writer took for zero; the last is NaN where the film
    ends right behind its picture.
    fps: of the first times, as the header's is often wrong; 0 where neither tells.
    """

    def __init__(self, path: Path, file: BinaryIO, header: SeqHeader) -> None:
        self.path, self.header, self._file = path, header, file
        self.size_hw = header.size_hw
        self._starts, self._sizes = _index_frames(path, file, header)
        self.timestamps_s = np.array([self._read_timestamp(index) for index in range(len(self))], np.float64)
        self.fps = _estimate_fps(self.timestamps_s, header.fps)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def is_jpeg(self) -> bool:
        """Is what `stored` gives a JPEG file that shows the frame?"""
        return self.header.encoding == JPEG and self.header.codec not in BAYER_CODECS

    def read_raw(self, index: int) -> bytes:
        """A frame as the file has it: a JPEG or PNG file, or pixels row by row, BGR."""
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        raw = _read_at(self._file, self._starts[index], self._sizes[index])
        if self.header.encoding == JPEG and not (raw.startswith(MAGIC[JPEG]) and raw.endswith(b"\xff\xd9")):
            raise DataError(f"{self.path}: frame {index} is no whole JPEG")
        return raw

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB; frame 0 is the first. Raises DataError for a frame that cannot be decoded."""
        raw, mosaic = self.read_raw(index), self.header.codec in BAYER_CODECS
        if self.header.encoding == RAW:
            channels = () if self.header.channels == 1 else (self.header.channels,)
            picture = np.frombuffer(raw, np.uint8).reshape(*self.size_hw, *channels)
        else:
            picture = self._decode(raw, index, cv2.IMREAD_GRAYSCALE if mosaic else cv2.IMREAD_COLOR)
        if mosaic:
            return cv2.cvtColor(picture, cv2.COLOR_BayerBGGR2RGB)
        return cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB if picture.ndim == 2 else cv2.COLOR_BGR2RGB)

    def _decode(self, raw: bytes, index: int, flag: int) -> NDArray[np.uint8]:
        """(H, W) or (H, W, 3) BGR. Its size is looked at first: a false one could take gigabytes."""
        picture = None
        with suppress(cv2.error, ValueError, struct.error):
            if imagesize.get(BytesIO(raw)) == self.size_hw[::-1] and not is_truncated_png(raw):
                picture = cv2.imdecode(np.frombuffer(raw, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        if picture is None:
            height, width = self.size_hw
            raise DataError(f"{self.path}: frame {index} is no picture of {width} x {height}")
        return picture

    def _read_timestamp(self, index: int) -> float:
        self._file.seek(self._starts[index] + self._sizes[index])
        raw = self._file.read(TIME_BYTES)
        if len(raw) < TIME_BYTES:
            return float("nan")
        seconds, milliseconds = struct.unpack("<IH", raw)
        return float(seconds + milliseconds / 1000)


@contextmanager
def open_seq(path: Path) -> Iterator[SeqVideo]:
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
        yield SeqVideo(path, file, _parse_header(file.read(HEADER_BYTES), path))


def _parse_header(raw: bytes, path: Path) -> SeqHeader:
    if len(raw) < HEADER_BYTES or raw[:24] != b"\xed\xfe\0\0" + "Norpix seq".encode("utf-16-le"):
        raise DataError(f"{path}: not a .seq film (no Norpix header); get it again")
    version, size = struct.unpack_from("<iI", raw, 28)
    width, height, depth, used_depth, frame_bytes, codec, frames, origin, room = struct.unpack_from("<9I", raw, 548)
    fps = struct.unpack_from("<d", raw, 584)[0]
    if version > MAX_VERSION or size != HEADER_BYTES or origin != 0:
        raise DataError(
            f"{path}: .seq version {version}, header of {size} bytes, origin {origin}; "
            f"read are versions up to {MAX_VERSION} with {HEADER_BYTES} and 0"
        )
    if codec not in CODECS:
        raise DataError(f"{path}: .seq codec {codec}; read are {', '.join(map(str, CODECS))}")
    if not 0 < width * height <= MAX_PIXELS or used_depth != 8:
        raise DataError(f"{path}: a film of {width} x {height} pixels, {used_depth} bits each, cannot be read")
    header = SeqHeader(
        (height, width), depth // 8, codec, frames, frame_bytes, room, fps if 0 < fps < float("inf") else 0.0
    )
    if header.encoding == RAW:
        _check_raw(header, path)
    return header


def _check_raw(header: SeqHeader, path: Path) -> None:
    height, width = header.size_hw
    wanted = (1,) if header.codec in BAYER_CODECS else (1, 3)
    if header.channels not in wanted or header.frame_bytes != height * width * header.channels:
        raise DataError(
            f"{path}: {width} x {height} pixels of {header.channels} bytes do not make {header.frame_bytes} bytes"
        )
    if header.frame_stride_bytes < header.frame_bytes + TIME_BYTES or header.num_frames == 0:
        raise DataError(
            f"{path}: {header.num_frames} uncompressed frames of {header.frame_stride_bytes} bytes with their times"
        )


def _index_frames(path: Path, file: BinaryIO, header: SeqHeader) -> tuple[list[int], list[int]]:
    """Where each frame's bytes begin, and how many they are."""
    end = file.seek(0, 2)
    if header.encoding == RAW:
        whole = max(0, end - HEADER_BYTES - header.frame_bytes + header.frame_stride_bytes) // header.frame_stride_bytes
        if whole < header.num_frames:
            raise _make_truncated_error(path, whole, header.num_frames, end)
        starts = [HEADER_BYTES + index * header.frame_stride_bytes for index in range(header.num_frames)]
        return starts, [header.frame_bytes] * header.num_frames
    starts, sizes = [], []
    at, extra = HEADER_BYTES, TIME_BYTES + 2
    while len(starts) < header.num_frames if header.num_frames else at < end:
        prefix = _read_at(file, at, 6) if at + 6 <= end else b""
        size = int.from_bytes(prefix[:4], "little")
        if prefix[4:] != MAGIC[header.encoding] or not 6 <= size <= end - at:
            raise _make_truncated_error(path, len(starts), header.num_frames, at)
        starts.append(at + 4)
        sizes.append(size - 4)
        at += size + extra
        if len(starts) == 1 and at + 4 <= end and _read_at(file, at, 4) == bytes(4):  # as the toolbox finds it out
            extra, at = extra + 8, at + 8
    return starts, sizes


def _make_truncated_error(path: Path, num_complete: int, num_frames: int, offset: int) -> DataError:
    of = f" of {num_frames}" if num_frames else ""
    return DataError(
        f"{path}: {num_complete}{of} frames are whole: it is cut off, or damaged at byte {offset}; get it again"
    )


def _read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    raw = file.read(count)
    if len(raw) < count:
        raise DataError(f"{file.name}: ends at byte {offset + len(raw)}, before {offset + count}")
    return raw


def _estimate_fps(timestamps_s: NDArray[np.float64], header_fps: float) -> float:
    """Of the usual steps among the first hundred times, as the toolbox has it."""
    steps = np.diff(timestamps_s[:100])
    steps = steps[np.isfinite(steps)]
    usual = steps[np.abs(steps - np.median(steps)) < 0.005] if len(steps) else steps
    return float(1 / usual.mean()) if len(usual) and usual.mean() > 0 else header_fps
