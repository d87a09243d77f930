"""Image reading, and integrity checks of JPEG and PNG files before decoding."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
REDUCED_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

JPEG_SOI, JPEG_EOI, JPEG_SOS, JPEG_APP1 = b"\xff\xd8", b"\xff\xd9", 0xDA, 0xE1
EXIF_SIGNATURE, EXIF_ORIENTATION_TAG = b"Exif\0\0", 0x0112
# Start-of-frame markers of all codings. C4, C8 and CC are other segments.
JPEG_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
MAX_PIXELS_PER_BYTE = 512  # a JPEG needs at least one bit per 8 x 8 block

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END_CHUNK = b"IEND"


def read_image(path: Path, apply_exif: bool = False) -> NDArray[np.uint8]:
    """Read an image file.

    Args:
        path: Image file.
        apply_exif: Rotate the image by its EXIF orientation. Annotated boxes refer to the stored pixels,
            so use this only for images without annotations.

    Returns:
        array[H, W, 3]: RGB, uint8.

    Raises:
        DataError: The file is missing, truncated or not an image.
    """
    return decode_image(read_image_bytes(path), path, apply_exif=apply_exif)


def read_image_bytes(path: Path) -> bytes:
    """Read the encoded bytes of an image file.

    Args:
        path: Image file.

    Returns:
        The complete content of the file.

    Raises:
        DataError: The file is missing, or is a truncated JPEG or PNG.
    """
    try:
        encoded = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such image. Check the directory of the dataset.") from None
    if is_truncated_jpeg(encoded) or is_truncated_png(encoded):
        raise DataError(_format_unreadable(path))
    return encoded


def decode_image(encoded: bytes, path: Path, apply_exif: bool = False, reduction: int = 1) -> NDArray[np.uint8]:
    """Decode the bytes of an image file.

    Args:
        encoded: Content of the file.
        path: File name for error messages.
        apply_exif: Rotate the image by its EXIF orientation.
        reduction: 1, 2, 4 or 8. Divides both sides and rounds up, so pixel i covers the source pixels
            i * reduction to (i + 1) * reduction. Use it only for JPEG, where it saves most of the decoding
            time; for other formats OpenCV rounds down.

    Returns:
        array[H, W, 3]: RGB, uint8.

    Raises:
        DataError: The bytes are not a readable image.
    """
    flags = REDUCED_FLAGS[reduction] | (0 if apply_exif else cv2.IMREAD_IGNORE_ORIENTATION)
    image = None
    # OpenCV returns None for a damaged file. It raises for an empty file or an invalid size in the header.
    with suppress(cv2.error):
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    if image is None:
        raise DataError(_format_unreadable(path))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # OpenCV 4.10 does not have IMREAD_COLOR_RGB


def is_jpeg(raw: bytes) -> bool:
    """Return whether the bytes begin like a JPEG file.

    Args:
        raw: Content of a file.
    """
    return raw[:2] == JPEG_SOI


def parse_jpeg_size_hw(raw: bytes) -> tuple[int, int] | None:
    """Read the image size from the header of a JPEG file.

    Args:
        raw: Content of the file, at least its header.

    Returns:
        Height and width in pixels, or None if the header has no valid size or the file is not a JPEG.
    """
    if not is_jpeg(raw):
        return None
    for marker, offset in _iterate_jpeg_segments(raw):
        if marker in JPEG_SOF_MARKERS:
            height = int.from_bytes(raw[offset + 5 : offset + 7], "big")
            width = int.from_bytes(raw[offset + 7 : offset + 9], "big")
            return (height, width) if height and width else None
    return None


def parse_exif_orientation(raw: bytes) -> int | None:
    """Read the EXIF orientation of a JPEG file.

    Args:
        raw: Content of the file, at least its header.

    Returns:
        1 (upright) to 8, or None if the file has no valid orientation or is not a JPEG.
    """
    if not is_jpeg(raw):
        return None
    for marker, offset in _iterate_jpeg_segments(raw):
        if marker == JPEG_APP1 and raw[offset + 4 : offset + 10] == EXIF_SIGNATURE:
            end = offset + 2 + int.from_bytes(raw[offset + 2 : offset + 4], "big")
            return _parse_tiff_orientation(raw[offset + 10 : end])
    return None


def _parse_tiff_orientation(tiff: bytes) -> int | None:
    """Read the orientation from the first directory of a TIFF structure."""
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    start = int.from_bytes(tiff[4:8], order)
    for number in range(int.from_bytes(tiff[start : start + 2], order)):
        entry = tiff[start + 2 + 12 * number : start + 14 + 12 * number]
        if len(entry) < 12:
            return None
        if int.from_bytes(entry[:2], order) == EXIF_ORIENTATION_TAG:
            value = int.from_bytes(entry[8:10], order)
            return value if 1 <= value <= 8 else None
    return None


def is_truncated_jpeg(raw: bytes) -> bool:
    """Return whether a JPEG file is incomplete; False for other files.

    OpenCV fills the missing part of a truncated JPEG with gray and reports no error. This function searches the
    end marker after the header, because thumbnails in the header contain an end marker too. A size that the
    bytes cannot contain also counts as truncated: decoding it could allocate gigabytes.

    Args:
        raw: Content of a file.
    """
    if not is_jpeg(raw):
        return False
    height, width = parse_jpeg_size_hw(raw) or (0, 0)
    if height * width > MAX_PIXELS_PER_BYTE * len(raw):
        return True
    *_, (_, header_end) = _iterate_jpeg_segments(raw)
    return raw.find(JPEG_EOI, header_end) < 0


def is_truncated_png(raw: bytes) -> bool:
    """Return whether a PNG file is incomplete; False for other files.

    A PNG is incomplete if a chunk is longer than the file or the end chunk is missing. OpenCV allocates the
    stated length of a chunk, up to 2 GiB, before it checks the length.

    Args:
        raw: Content of a file.
    """
    if not raw.startswith(PNG_SIGNATURE):
        return False
    offset = len(PNG_SIGNATURE)
    while offset + 12 <= len(raw):  # length, name, content, checksum
        if raw[offset + 4 : offset + 8] == PNG_END_CHUNK:
            return False
        offset += 12 + int.from_bytes(raw[offset : offset + 4], "big")
    return True


def _iterate_jpeg_segments(raw: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and offset of each header segment up to the first scan, or (0, end of the header)."""
    offset = 2
    while raw[offset : offset + 1] == b"\xff" and len(raw) > offset + 1:
        marker = raw[offset + 1]
        yield marker, offset
        if marker == JPEG_SOS:
            return
        # Markers can be padded with 0xFF bytes.
        offset += 1 if marker == 0xFF else 2 + int.from_bytes(raw[offset + 2 : offset + 4], "big")
    yield 0, offset


def _format_unreadable(path: Path) -> str:
    return f"{path}: not a readable image (truncated, or not an image file). Replace or remove it."
