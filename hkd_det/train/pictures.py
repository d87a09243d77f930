"""Pictures as training reads them: JPEGs hardly larger than a view can use, decoded no larger than this view needs.

Decoding is what loading costs. A JPEG decodes at a half, a quarter or an eighth of its size for less; a PNG has to
be unpacked whole (a full-size street scene: 40 to 55 ms, ten times what is done with it then). So whatever is no
JPEG, or one far too large, is shrunk and packed as a JPEG once, and kept where all workers find it. It
goes through that JPEG where there is no room to keep it, too: what training sees depends on the picture alone,
never on who loaded what before.
"""

import os
import struct
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.jpeg import jpeg_size_hw
from hkd_det.datasets.sample import decode_picture, read_packed
from hkd_det.train.augment import resized

QUALITY = 95  # 42 dB to the shrunk street scene: far below what the jitter of the light does
FAR_TOO_LARGE = 2.0  # a JPEG's sides against what a view can use; below it the file itself decodes fast enough
HEADER = struct.Struct("<4I")  # in front of a kept JPEG: its height and width, and its source's
Size = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Decoded:
    """A picture (H, W, 3) uint8 RGB, and how many of its pixels make one of the file's: across and down."""

    picture: NDArray[np.uint8]
    scale_xy: tuple[float, float]


@dataclass(frozen=True)
class Packed:
    """A JPEG's bytes, its (height, width), and that of the file it was made from, or is."""

    jpeg: bytes
    size_hw: tuple[int, int]
    source_hw: tuple[int, int]


class Kept(Protocol):
    """Where packed pictures are kept: a dict, or a `SharedFolder` for several workers."""

    def get(self, index: int, /) -> bytes | None:
        """The bytes kept under the index, if any."""

    def __setitem__(self, index: int, raw: bytes, /) -> None: ...

    def clear(self) -> None:
        """Keep nothing."""


class SharedFolder:
    """Bytes in files, one each, for all processes that know the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, index: int) -> bytes | None:
        """The bytes kept under the index by whichever process, if any."""
        with suppress(FileNotFoundError):
            return self._file(index).read_bytes()
        return None

    def __setitem__(self, index: int, raw: bytes) -> None:
        aside = self.folder / f"{index}.{os.getpid()}"
        with suppress(OSError):  # the disk is full, or the folder gone with the run: then it isn't kept
            aside.write_bytes(raw)
            aside.replace(self._file(index))  # another worker reads it whole or not at all

    def clear(self) -> None:
        """Keep nothing."""
        for file in self.folder.iterdir():
            file.unlink()

    def _file(self, index: int) -> Path:
        return self.folder / f"{index}.packed"


class TrainingPictures:
    """The pictures at `paths`, for frames of at most `largest_hw` (height, width).

    What had to be packed is put into `kept`, until this process has put `room_bytes` there. upright: indices of those
    to be turned as their EXIF orientation says; the others' boxes refer to the stored pixels.
    """

    def __init__(
        self, paths: Sequence[Path], largest_hw: Size, kept: Kept, room_bytes: int, upright: Container[int] = ()
    ) -> None:
        self.paths, self.largest_hw, self.upright = paths, largest_hw, upright
        self.kept, self.room_bytes = kept, room_bytes

    def read(self, index: int, frame_hw: Size) -> Decoded:
        """The picture, as large as it is when fitted into `frame_hw`, or larger, unless the file is smaller.

        Raises DataError, naming the file, if it can't be read.
        """
        packed = self._packed(index)
        shrink = _shrink(packed.size_hw, frame_hw)
        picture = decode_picture(packed.jpeg, self.paths[index], index in self.upright, shrink)
        down, across = (ours / theirs / shrink for ours, theirs in zip(packed.size_hw, packed.source_hw, strict=True))
        return Decoded(picture, (across, down))

    def _packed(self, index: int) -> Packed:
        known = self.kept.get(index)
        if known is not None:
            return _unpacked(known)
        path = self.paths[index]
        raw = read_packed(path)
        size_hw = jpeg_size_hw(raw)
        if size_hw is not None and _fit(size_hw, self.largest_hw) * FAR_TOO_LARGE >= 1:
            return Packed(raw, size_hw, size_hw)
        packed = _pack(decode_picture(raw, path, index in self.upright), self.largest_hw)
        put = HEADER.pack(*packed.size_hw, *packed.source_hw) + packed.jpeg
        if len(put) <= self.room_bytes:
            self.kept[index] = put
            self.room_bytes -= len(put)
        return packed


def _pack(picture_rgb: NDArray[np.uint8], largest_hw: Size) -> Packed:
    source_hw = picture_rgb.shape[:2]
    fit = min(1.0, _fit(source_hw, largest_hw))
    height, width = (max(1, round(side * fit)) for side in source_hw)
    bgr = cv2.cvtColor(resized(picture_rgb, (height, width)), cv2.COLOR_RGB2BGR)
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return Packed(jpeg.tobytes(), (height, width), source_hw)


def _unpacked(raw: bytes) -> Packed:
    height, width, source_height, source_width = HEADER.unpack_from(raw)
    return Packed(raw[HEADER.size :], (height, width), (source_height, source_width))


def _fit(size_hw: Size, frame_hw: Size) -> float:
    """Frame pixels per picture pixel when the whole picture is fitted into the frame."""
    return min(frame_hw[0] / size_hw[0], frame_hw[1] / size_hw[1])


def _shrink(size_hw: Size, frame_hw: Size) -> int:
    """By how much a JPEG can be shrunk in decoding without becoming smaller than it is in the frame."""
    return next((shrink for shrink in (8, 4, 2) if _fit(size_hw, frame_hw) * shrink <= 1), 1)
