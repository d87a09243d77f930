"""Images as training reads them: JPEGs close to the training size, decoded at the smallest sufficient resolution.

Decoding dominates the loading time. A JPEG decodes faster at a half, a quarter or an eighth of its size. A PNG must be
decoded whole: a full-size street scene takes 40 to 55 ms, ten times as long as all augmentations. Files that are not
JPEG, and JPEGs that are far too large, are therefore reduced and encoded as JPEG once, and shared by all workers.
An image that does not fit into the cache goes through the same JPEG. So a training image depends on its file alone,
and never on the state of the cache.
"""

import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.image import decode_image, read_image_bytes
from hkd_det.image_header import parse_image_header
from hkd_det.letterbox import resize

JPEG_QUALITY = 95  # 42 dB PSNR on a reduced street scene: far less than the color jitter changes
RECOMPRESS_RATIO = 2.0  # JPEGs up to this ratio above the maximum useful size are read from the file itself
CACHE_HEADER = struct.Struct("<4I")  # in front of a cached JPEG: its height and width, and those of its source

SizeHW = tuple[float, float]


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A decoded image and its scale.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        scale_xy: Pixels of `image` per pixel of the file, horizontal and vertical.
    """

    image: NDArray[np.uint8]
    scale_xy: tuple[float, float]


@dataclass(frozen=True)
class EncodedImage:
    """An image as JPEG bytes.

    Attributes:
        jpeg: The JPEG file's bytes.
        size_hw: Height and width of the upright JPEG, pixels.
        source_hw: Height and width of the upright image that it was made from, pixels.
    """

    jpeg: bytes
    size_hw: tuple[int, int]
    source_hw: tuple[int, int]


class ByteCache(Protocol):
    """A cache of bytes by image index: a `dict`, or a `DirectoryCache` for several workers."""

    def get(self, index: int, /) -> bytes | None:
        """Return the entry of an index, or None.

        Args:
            index: Index of the image.
        """

    def __setitem__(self, index: int, raw: bytes, /) -> None: ...

    def clear(self) -> None:
        """Remove all entries."""


class DirectoryCache:
    """A cache in a directory, one file per entry, shared by all processes that know the directory.

    Args:
        directory: An existing directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, index: int) -> bytes | None:
        """Return the entry of an index, written by any process, or None.

        Args:
            index: Index of the image.

        Returns:
            The bytes, or None if there is no entry.
        """
        with suppress(FileNotFoundError):
            return self._entry_path(index).read_bytes()
        return None

    def __setitem__(self, index: int, raw: bytes) -> None:
        temp_path = self.directory / f"{index}.{os.getpid()}"
        with suppress(OSError):  # a full disk, or a directory that was removed with the run: the entry is not stored
            temp_path.write_bytes(raw)
            temp_path.replace(self._entry_path(index))  # other workers never read a partial entry

    def clear(self) -> None:
        """Remove all entries."""
        for file in self.directory.iterdir():
            file.unlink()

    def _entry_path(self, index: int) -> Path:
        return self.directory / f"{index}.bin"


class CachedImages:
    """Training images, read through a cache of reduced JPEGs.

    Args:
        paths: Image files.
        max_hw: Largest useful height and width, pixels: images are never requested larger.
        cache: Where re-encoded images are stored.
        capacity_bytes: Bytes that this process may add to the cache.
    """

    def __init__(self, paths: Sequence[Path], max_hw: SizeHW, cache: ByteCache, capacity_bytes: int) -> None:
        self.paths, self.max_hw = paths, max_hw
        self.cache, self.capacity_bytes = cache, capacity_bytes

    def read(self, index: int, frame_hw: SizeHW) -> DecodedImage:
        """Decode an image that is at least as large as if it were fitted into `frame_hw`.

        A smaller file is not enlarged.

        Args:
            index: Index into `paths`.
            frame_hw: Height and width that the image will be fitted into, pixels.

        Returns:
            The image and its scale.

        Raises:
            DataError: The file cannot be read. The message names it.
        """
        encoded = self._load_encoded(index)
        reduction = _select_reduction(encoded.size_hw, frame_hw)
        image = decode_image(encoded.jpeg, self.paths[index], reduction)
        scale_y, scale_x = (
            jpeg_side / source_side / reduction
            for jpeg_side, source_side in zip(encoded.size_hw, encoded.source_hw, strict=True)
        )
        return DecodedImage(image, (scale_x, scale_y))

    def _load_encoded(self, index: int) -> EncodedImage:
        entry = self.cache.get(index)
        if entry is not None:
            return _parse_cache_entry(entry)
        path = self.paths[index]
        raw = read_image_bytes(path)
        header = parse_image_header(raw)
        jpeg_hw = header.size_hw if header and header.format == "JPEG" else None
        if jpeg_hw and _compute_fit_scale(jpeg_hw, self.max_hw) * RECOMPRESS_RATIO >= 1:
            return EncodedImage(raw, jpeg_hw, jpeg_hw)
        encoded = _encode_jpeg(decode_image(raw, path), self.max_hw)
        entry = CACHE_HEADER.pack(*encoded.size_hw, *encoded.source_hw) + encoded.jpeg
        if len(entry) <= self.capacity_bytes:
            self.cache[index] = entry
            self.capacity_bytes -= len(entry)
        return encoded


def _encode_jpeg(image_rgb: NDArray[np.uint8], max_hw: SizeHW) -> EncodedImage:
    source_hw = image_rgb.shape[:2]
    scale = min(1.0, _compute_fit_scale(source_hw, max_hw))
    height, width = (max(1, round(side * scale)) for side in source_hw)
    bgr = cv2.cvtColor(resize(image_rgb, (height, width)), cv2.COLOR_RGB2BGR)
    _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return EncodedImage(jpeg.tobytes(), (height, width), source_hw)


def _parse_cache_entry(raw: bytes) -> EncodedImage:
    height, width, source_height, source_width = CACHE_HEADER.unpack_from(raw)
    return EncodedImage(raw[CACHE_HEADER.size :], (height, width), (source_height, source_width))


def _compute_fit_scale(size_hw: SizeHW, frame_hw: SizeHW) -> float:
    """Return the scale at which a whole image of `size_hw` fits into `frame_hw`."""
    return min(frame_hw[0] / size_hw[0], frame_hw[1] / size_hw[1])


def _select_reduction(size_hw: SizeHW, frame_hw: SizeHW) -> int:
    """Return the largest JPEG reduction (8, 4, 2 or 1) that keeps the image as large as in the frame."""
    return next((factor for factor in (8, 4, 2) if _compute_fit_scale(size_hw, frame_hw) * factor <= 1), 1)
