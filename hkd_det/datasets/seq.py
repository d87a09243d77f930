"""Norpix `.seq` videos, as seqReaderPlugin.m of Piotr's toolbox reads them. Caltech Pedestrian uses this format.

After a header of 1024 bytes the frames follow each other. Uncompressed frames have a constant stride. A compressed
frame begins with its size and ends with its timestamp and 2 or 10 unused bytes. All numbers are little-endian.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError
from hkd_det.image import is_truncated_png
from hkd_det.image_header import JPEG_EOI, JPEG_SOI, parse_image_header

HEADER_BYTES, TIME_BYTES = 1024, 6
MAX_VERSION = 4  # later versions have another layout, which the toolbox does not support
MAX_PIXELS = 2**26
RAW, JPEG, PNG = "raw", "jpg", "png"
CODECS = {100: RAW, 200: RAW, 101: RAW, 102: JPEG, 201: JPEG, 103: JPEG, 1: PNG, 2: PNG}
BAYER_CODECS = (101, 103)  # one value per pixel: blue, green / green, red
MAGIC = {JPEG: JPEG_SOI, PNG: b"\x89P"}


@dataclass(frozen=True)
class SeqHeader:
    """Header of a `.seq` video.

    Attributes:
        size_hw: Frame height and width in pixels.
        channels: Values per pixel.
        codec: Codec number of the file, a key of `CODECS`.
        num_frames: Number of frames; 0 if the header does not contain it.
        frame_bytes: Bytes of an uncompressed frame.
        frame_stride_bytes: Distance of uncompressed frames in bytes.
    """

    size_hw: tuple[int, int]
    channels: int
    codec: int
    num_frames: int
    frame_bytes: int
    frame_stride_bytes: int

    @property
    def encoding(self) -> str:
        """RAW, JPEG or PNG."""
        return CODECS[self.codec]


class SeqVideo:
    """An open `.seq` video with random access to its `len(video)` frames.

    Attributes:
        path: Video file.
        header: Header of the file.
        size_hw: Frame height and width in pixels.

    Args:
        path: Video file, for error messages.
        file: The open file. The caller closes it.
        header: Header of the file.

    Raises:
        DataError: The file is truncated.
    """

    def __init__(self, path: Path, file: BinaryIO, header: SeqHeader) -> None:
        self.path, self.header, self._file = path, header, file
        self.size_hw = header.size_hw
        self._offsets, self._sizes = _index_frames(path, file, header)

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def is_jpeg(self) -> bool:
        """Whether `read_raw` returns JPEG files that show the frames."""
        return self.header.encoding == JPEG and self.header.codec not in BAYER_CODECS

    def read_raw(self, index: int) -> bytes:
        """Read the stored bytes of a frame.

        Args:
            index: 0-based frame number.

        Returns:
            A JPEG or PNG file, or BGR pixels in row order.

        Raises:
            IndexError: There is no such frame.
            DataError: The frame is incomplete.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        raw = _read_at(self._file, self._offsets[index], self._sizes[index])
        if self.header.encoding == JPEG and not (raw.startswith(JPEG_SOI) and raw.endswith(JPEG_EOI)):
            raise DataError(f"{self.path}: frame {index} is not a complete JPEG. Download the video again.")
        return raw

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """Read and decode a frame.

        Args:
            index: 0-based frame number.

        Returns:
            array[H, W, 3]: RGB, uint8.

        Raises:
            IndexError: There is no such frame.
            DataError: The frame cannot be decoded.
        """
        raw, is_bayer = self.read_raw(index), self.header.codec in BAYER_CODECS
        if self.header.encoding == RAW:
            channels = () if self.header.channels == 1 else (self.header.channels,)
            image = np.frombuffer(raw, np.uint8).reshape(*self.size_hw, *channels)
        else:
            image = self._decode(raw, index, cv2.IMREAD_GRAYSCALE if is_bayer else cv2.IMREAD_COLOR)
        if is_bayer:
            return cv2.cvtColor(image, cv2.COLOR_BayerBGGR2RGB)
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)

    def _decode(self, raw: bytes, index: int, flag: int) -> NDArray[np.uint8]:
        """Decode to [H, W] or [H, W, 3] BGR. Check the size first: decoding a wrong one could allocate gigabytes."""
        header, image = parse_image_header(raw), None
        with suppress(cv2.error):
            if header and header.stored_hw == self.size_hw and not is_truncated_png(raw):
                image = cv2.imdecode(np.frombuffer(raw, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            height, width = self.size_hw
            raise DataError(f"{self.path}: frame {index} is not an image of {width} x {height}. Download it again.")
        return image


@contextmanager
def open_seq(path: Path) -> Iterator[SeqVideo]:
    """Open a `.seq` video. The file is closed at the end of the `with` block.

    Args:
        path: Video file.

    Yields:
        The open video.

    Raises:
        DataError: The file is missing, is not a `.seq` video, or is truncated. The message of a truncated
            file contains the number of complete frames.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such video. Check the path.") from None
    except IsADirectoryError:
        raise DataError(f"{path}: expected a .seq video, got a directory.") from None
    with file:
        yield SeqVideo(path, file, _parse_header(file.read(HEADER_BYTES), path))


def _parse_header(raw: bytes, path: Path) -> SeqHeader:
    if len(raw) < HEADER_BYTES or raw[:24] != b"\xed\xfe\0\0" + "Norpix seq".encode("utf-16-le"):
        raise DataError(f"{path}: not a .seq video (no Norpix header). Download it again.")
    version, header_bytes = struct.unpack_from("<iI", raw, 28)
    width, height, depth, used_depth, frame_bytes, codec, num_frames, origin, stride = struct.unpack_from(
        "<9I", raw, 548
    )
    if version > MAX_VERSION or header_bytes != HEADER_BYTES or origin != 0:
        raise DataError(
            f"{path}: .seq version {version}, header of {header_bytes} bytes, origin {origin} are not "
            f"supported. Expected a version up to {MAX_VERSION}, a header of {HEADER_BYTES} bytes and origin 0."
        )
    if codec not in CODECS:
        raise DataError(f"{path}: .seq codec {codec} is not supported. Expected one of {', '.join(map(str, CODECS))}.")
    if not 0 < width * height <= MAX_PIXELS or used_depth != 8:
        raise DataError(
            f"{path}: expected 8 bits per pixel and at most {MAX_PIXELS:,} pixels, got {used_depth} bits and "
            f"{width} x {height} pixels."
        )
    header = SeqHeader((height, width), depth // 8, codec, num_frames, frame_bytes, stride)
    if header.encoding == RAW:
        _check_raw(header, path)
    return header


def _check_raw(header: SeqHeader, path: Path) -> None:
    height, width = header.size_hw
    valid_channels = (1,) if header.codec in BAYER_CODECS else (1, 3)
    if header.channels not in valid_channels or header.frame_bytes != height * width * header.channels:
        raise DataError(
            f"{path}: {width} x {height} pixels of {header.channels} bytes do not match frames of "
            f"{header.frame_bytes} bytes. Download the video again."
        )
    if header.frame_stride_bytes < header.frame_bytes + TIME_BYTES or header.num_frames == 0:
        raise DataError(
            f"{path}: invalid number or stride of frames: {header.num_frames} uncompressed frames of "
            f"{header.frame_stride_bytes} bytes with their timestamps. Download the video again."
        )


def _index_frames(path: Path, file: BinaryIO, header: SeqHeader) -> tuple[list[int], list[int]]:
    """Return offset and size of the bytes of each frame."""
    end = file.seek(0, 2)
    if header.encoding == RAW:
        stride = header.frame_stride_bytes
        num_complete = max(0, end - HEADER_BYTES - header.frame_bytes + stride) // stride
        if num_complete < header.num_frames:
            raise _make_truncated_error(path, num_complete, header.num_frames, end)
        offsets = [HEADER_BYTES + index * stride for index in range(header.num_frames)]
        return offsets, [header.frame_bytes] * header.num_frames
    offsets, sizes = [], []
    position, extra = HEADER_BYTES, TIME_BYTES + 2
    while len(offsets) < header.num_frames if header.num_frames else position < end:
        prefix = _read_at(file, position, 6) if position + 6 <= end else b""
        size = int.from_bytes(prefix[:4], "little")
        if prefix[4:] != MAGIC[header.encoding] or not 6 <= size <= end - position:
            raise _make_truncated_error(path, len(offsets), header.num_frames, position)
        offsets.append(position + 4)
        sizes.append(size - 4)
        position += size + extra
        # The toolbox detects 8 more unused bytes in the same way.
        if len(offsets) == 1 and position + 4 <= end and _read_at(file, position, 4) == bytes(4):
            extra, position = extra + 8, position + 8
    return offsets, sizes


def _make_truncated_error(path: Path, num_complete: int, num_frames: int, offset: int) -> DataError:
    of_total = f" of {num_frames}" if num_frames else ""
    return DataError(
        f"{path}: truncated or damaged at byte {offset}; {num_complete}{of_total} frames are complete. "
        "Download it again."
    )


def _read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    raw = file.read(count)
    if len(raw) < count:
        raise DataError(f"{file.name}: ends at byte {offset + len(raw)}, before {offset + count}. Download it again.")
    return raw
