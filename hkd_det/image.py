"""What a JPEG file says of itself before it is decoded: how large it is, and whether all of it is there.

Whether a PNG file is all there, told before it is decoded.

A `Sample`: one picture on disk and the people known to be in it.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


JPEG_SOI, JPEG_EOI, JPEG_SOS = b"\xff\xd8", b"\xff\xd9", 0xDA


# Start of frame, of every kind of coding; C4, C8 and CC in their midst are tables.
JPEG_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


MAX_PIXELS_PER_BYTE = 512  # of each 8 x 8 pixels the mean alone takes a bit


def is_jpeg(raw: bytes) -> bool:
    """Whether it begins as a JPEG does."""
    return raw[:2] == JPEG_SOI


def parse_jpeg_size_hw(raw: bytes) -> tuple[int, int] | None:
    """(height, width) as the header has it, or None where it has none, or for another file."""
    if not is_jpeg(raw):
        return None
    for marker, at in _iterate_jpeg_segments(raw):
        if marker in JPEG_SOF_MARKERS:
            height, width = int.from_bytes(raw[at + 5 : at + 7], "big"), int.from_bytes(raw[at + 7 : at + 9], "big")
            return (height, width) if height and width else None
    return None


def is_truncated_jpeg(raw: bytes) -> bool:
    """OpenCV fills the missing part of a cut JPEG with grey and says nothing: look for the end mark ourselves.

    Behind the start of the picture proper: a thumbnail in the header has an end mark too, and cameras append
    films and second pictures. A size that the bytes can't fill is a false one, and could take gigabytes of grey.
    """
    if not is_jpeg(raw):
        return False
    height, width = parse_jpeg_size_hw(raw) or (0, 0)
    if height * width > MAX_PIXELS_PER_BYTE * len(raw):
        return True
    *_, (_, scan) = _iterate_jpeg_segments(raw)
    return raw.find(JPEG_EOI, scan) < 0


def _iterate_jpeg_segments(raw: bytes) -> Iterator[tuple[int, int]]:
    """The header's markers and where each begins, up to the first scan, and the place where the header ends."""
    at = 2
    while raw[at : at + 1] == b"\xff" and len(raw) > at + 1:
        marker = raw[at + 1]
        yield marker, at
        if marker == JPEG_SOS:
            return
        at += 1 if marker == 0xFF else 2 + int.from_bytes(raw[at + 2 : at + 4], "big")  # markers may be padded
    yield 0, at


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


PNG_END_CHUNK = b"IEND"


def is_truncated_png(raw: bytes) -> bool:
    """Whether a chunk claims more bytes than there are, or the last one is missing; False for another file.

    OpenCV reserves and clears what a chunk claims, up to 2 GiB, before it looks whether it is there.
    """
    if not raw.startswith(PNG_SIGNATURE):
        return False
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(raw):  # length, name, content, checksum
        if raw[at + 4 : at + 8] == PNG_END_CHUNK:
            return False
        at += 12 + int.from_bytes(raw[at : at + 4], "big")
    return True


REDUCED_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def read_image(path: Path, apply_exif: bool = False) -> NDArray[np.uint8]:
    """A picture file as (H, W, 3) uint8 RGB, as stored: boxes refer to the stored pixels.

    upright: turn it as its EXIF orientation says; for a photograph to look at, that has no boxes yet.
    Raises DataError, naming the file, if it is missing, truncated or not a picture.
    """
    return decode_image(read_image_bytes(path), path, apply_exif=apply_exif)


def read_image_bytes(path: Path) -> bytes:
    """A picture file's bytes. Raises DataError, naming the file, if it is missing, or a JPEG or PNG without its end."""
    try:
        packed = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture; check the data set's folder") from None
    if is_truncated_jpeg(packed) or is_truncated_png(packed):
        raise DataError(_format_unreadable(path))
    return packed


def decode_image(encoded: bytes, path: Path, apply_exif: bool = False, reduction: int = 1) -> NDArray[np.uint8]:
    """A picture file's bytes as `read_picture` gives them; `path` is what an error names.

    shrink: 1, 2, 4 or 8: every side divided by it and rounded up, so that pixel i covers the whole's pixels
    i * shrink to (i + 1) * shrink. A JPEG is decoded so at a fraction of the cost; use it for JPEG only, since
    OpenCV rounds other pictures' sides down.
    """
    flags = REDUCED_FLAGS[reduction] | (0 if apply_exif else cv2.IMREAD_IGNORE_ORIENTATION)
    picture = None
    # OpenCV answers a broken file with None, and an empty one or a broken size in its header with an exception.
    with suppress(cv2.error):
        picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    if picture is None:
        raise DataError(_format_unreadable(path))
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)  # not IMREAD_COLOR_RGB: OpenCV 4.10 has none


def _format_unreadable(path: Path) -> str:
    return f"{path}: not a readable picture (truncated, or no picture at all); replace or remove it"
