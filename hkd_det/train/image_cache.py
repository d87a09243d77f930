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

from hkd_det.image import decode_image, parse_jpeg_size_hw, read_image_bytes
from hkd_det.train.augment import resize

JPEG_QUALITY = 95  # 42 dB to the shrunk street scene: far below what the jitter of the light does


RECOMPRESS_RATIO = 2.0  # a JPEG's sides against what a view can use; below it the file itself decodes fast enough


CACHE_HEADER = struct.Struct("<4I")  # in front of a kept JPEG: its height and width, and its source's


SizeHW = tuple[float, float]


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A picture (H, W, 3) uint8 RGB, and how many of its pixels make one of the file's: across and down."""

    image: NDArray[np.uint8]
    scale_xy: tuple[float, float]


@dataclass(frozen=True)
class EncodedImage:
    """A JPEG's bytes, its (height, width), and that of the file it was made from, or is."""

    jpeg: bytes
    size_hw: tuple[int, int]
    source_hw: tuple[int, int]


class ByteCache(Protocol):
    """Where packed pictures are kept: a dict, or a `SharedFolder` for several workers."""

    def get(self, index: int, /) -> bytes | None:
        """The bytes kept under the index, if any."""

    def __setitem__(self, index: int, raw: bytes, /) -> None: ...

    def clear(self) -> None:
        """Keep nothing."""


class DirectoryCache:
    """Bytes in files, one each, for all processes that know the folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, index: int) -> bytes | None:
        """The bytes kept under the index by whichever process, if any."""
        with suppress(FileNotFoundError):
            return self._entry_path(index).read_bytes()
        return None

    def __setitem__(self, index: int, raw: bytes) -> None:
        aside = self.directory / f"{index}.{os.getpid()}"
        with suppress(OSError):  # the disk is full, or the folder gone with the run: then it isn't kept
            aside.write_bytes(raw)
            aside.replace(self._entry_path(index))  # another worker reads it whole or not at all

    def clear(self) -> None:
        """Keep nothing."""
        for file in self.directory.iterdir():
            file.unlink()

    def _entry_path(self, index: int) -> Path:
        return self.directory / f"{index}.packed"


class CachedImages:
    """The pictures at `paths`, for frames of at most `largest_hw` (height, width).

    What had to be packed is put into `kept`, until this process has put `room_bytes` there. upright: indices of those
    to be turned as their EXIF orientation says; the others' boxes refer to the stored pixels.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        max_hw: SizeHW,
        cache: ByteCache,
        capacity_bytes: int,
        exif_indices: Container[int] = (),
    ) -> None:
        self.paths, self.max_hw, self.exif_indices = paths, max_hw, exif_indices
        self.cache, self.capacity_bytes = cache, capacity_bytes

    def read(self, index: int, frame_hw: SizeHW) -> DecodedImage:
        """The picture, as large as it is when fitted into `frame_hw`, or larger, unless the file is smaller.

        Raises DataError, naming the file, if it can't be read.
        """
        packed = self._load_encoded(index)
        shrink = _select_reduction(packed.size_hw, frame_hw)
        picture = decode_image(packed.jpeg, self.paths[index], index in self.exif_indices, shrink)
        down, across = (ours / theirs / shrink for ours, theirs in zip(packed.size_hw, packed.source_hw, strict=True))
        return DecodedImage(picture, (across, down))

    def _load_encoded(self, index: int) -> EncodedImage:
        known = self.cache.get(index)
        if known is not None:
            return _parse_cache_entry(known)
        path = self.paths[index]
        raw = read_image_bytes(path)
        size_hw = parse_jpeg_size_hw(raw)
        if size_hw is not None and _compute_fit_scale(size_hw, self.max_hw) * RECOMPRESS_RATIO >= 1:
            return EncodedImage(raw, size_hw, size_hw)
        packed = _encode_jpeg(decode_image(raw, path, index in self.exif_indices), self.max_hw)
        put = CACHE_HEADER.pack(*packed.size_hw, *packed.source_hw) + packed.jpeg
        if len(put) <= self.capacity_bytes:
            self.cache[index] = put
            self.capacity_bytes -= len(put)
        return packed


def _encode_jpeg(image_rgb: NDArray[np.uint8], max_hw: SizeHW) -> EncodedImage:
    source_hw = image_rgb.shape[:2]
    fit = min(1.0, _compute_fit_scale(source_hw, max_hw))
    height, width = (max(1, round(side * fit)) for side in source_hw)
    bgr = cv2.cvtColor(resize(image_rgb, (height, width)), cv2.COLOR_RGB2BGR)
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return EncodedImage(jpeg.tobytes(), (height, width), source_hw)


def _parse_cache_entry(raw: bytes) -> EncodedImage:
    height, width, source_height, source_width = CACHE_HEADER.unpack_from(raw)
    return EncodedImage(raw[CACHE_HEADER.size :], (height, width), (source_height, source_width))


def _compute_fit_scale(size_hw: SizeHW, frame_hw: SizeHW) -> float:
    """Frame pixels per picture pixel when the whole picture is fitted into the frame."""
    return min(frame_hw[0] / size_hw[0], frame_hw[1] / size_hw[1])


def _select_reduction(size_hw: SizeHW, frame_hw: SizeHW) -> int:
    """By how much a JPEG can be shrunk in decoding without becoming smaller than it is in the frame."""
    return next((shrink for shrink in (8, 4, 2) if _compute_fit_scale(size_hw, frame_hw) * shrink <= 1), 1)
