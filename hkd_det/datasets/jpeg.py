"""What a JPEG file says of itself before it is decoded: how large it is, and whether all of it is there."""

from collections.abc import Iterator

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
