"""Size and orientation of an image file, from its header: JPEG, PNG, WebP, TIFF, BMP, GIF, PNM, JPEG 2000, AVIF, HEIC.

One parser serves training, check, bench and demo, so the size of an image does not depend on the versions of other
packages. It never decodes pixels.
"""

import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

ByteOrder = Literal["little", "big"]
Buffer = bytes | mmap.mmap
SizeHW = tuple[int, int]

JPEG_SOI, JPEG_EOI, JPEG_SOS, JPEG_APP1 = b"\xff\xd8", b"\xff\xd9", 0xDA, 0xE1
# Start-of-frame markers of all codings. C4, C8 and CC are other segments.
JPEG_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PNG_SIGNATURE, PNG_END_CHUNK = b"\x89PNG\r\n\x1a\n", b"IEND"
JPEG2000_SIGNATURE, JPEG2000_SIZE = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"  # start of codestream, then its size marker
HEIF_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC"}
PNM_HEADER = re.compile(rb"P[1-6](?:\s+|#[^\n]*\n)+(\d{1,9})(?:\s+|#[^\n]*\n)+(\d{1,9})\s")

EXIF_SIGNATURE = b"Exif\0\0"
TIFF_WIDTH, TIFF_HEIGHT, TIFF_ORIENTATION = 0x0100, 0x0101, 0x0112
UPRIGHT = 1
# EXIF orientation by quarter turns counter-clockwise (irot) and mirror axis (imir; None: no mirror) of HEIF.
HEIF_ORIENTATIONS = {
    (0, None): 1, (0, 0): 4, (0, 1): 2, (1, None): 8, (1, 0): 5, (1, 1): 7,
    (2, None): 3, (2, 0): 2, (2, 1): 4, (3, None): 6, (3, 0): 7, (3, 1): 5,
}  # fmt: skip


@dataclass(frozen=True)
class ImageHeader:
    """Header of an image file.

    Attributes:
        format: Name of the file format, such as JPEG.
        stored_hw: Height and width of the stored pixels.
        orientation: EXIF orientation, 1 (upright) to 8. The orientation properties of HEIF are converted to it.
    """

    format: str
    stored_hw: SizeHW
    orientation: int = UPRIGHT

    @property
    def size_hw(self) -> SizeHW:
        """Height and width of the upright image in pixels."""
        return (self.stored_hw[1], self.stored_hw[0]) if self.orientation >= 5 else self.stored_hw


def parse_image_header(raw: Buffer) -> ImageHeader | None:
    """Parse the header of an image file.

    Args:
        raw: Content of the file, or a memory map of it. Some formats have the orientation at the end of the file.

    Returns:
        The header, or None if the format is unknown or the header has no valid size.
    """
    for prefix, parse in PARSERS:
        if raw[: len(prefix)] == prefix:
            header = parse(raw)
            return header if header and min(header.stored_hw) > 0 else None
    return None


def _parse_jpeg(raw: Buffer) -> ImageHeader | None:
    orientation, size_hw = UPRIGHT, None
    for marker, offset in _iterate_jpeg_segments(raw):
        if marker in JPEG_SOF_MARKERS and size_hw is None:
            size_hw = _read_int(raw, offset + 5, 2), _read_int(raw, offset + 7, 2)
        elif marker == JPEG_APP1 and raw[offset + 4 : offset + 10] == EXIF_SIGNATURE:
            end = offset + 2 + _read_int(raw, offset + 2, 2)
            orientation = _parse_exif(raw[offset + 4 : end])
    return ImageHeader("JPEG", size_hw, orientation) if size_hw else None


def _iterate_jpeg_segments(raw: Buffer) -> Iterator[tuple[int, int]]:
    """Yield marker and offset of each header segment up to the first scan."""
    offset = 2
    while raw[offset : offset + 1] == b"\xff" and len(raw) > offset + 1:
        marker = raw[offset + 1]
        yield marker, offset
        if marker == JPEG_SOS:
            return
        # Markers can be padded with 0xFF bytes.
        offset += 1 if marker == 0xFF else 2 + _read_int(raw, offset + 2, 2)


def is_truncated_jpeg(raw: bytes) -> bool:
    """Return whether a JPEG file has no end marker after its first scan; False for other files.

    Header segments can contain a thumbnail with an end marker. In the data of a scan, 0xFF is followed by 0 or by a
    restart marker, and bytes after the end marker are allowed.

    Args:
        raw: Content of a file.
    """
    if not raw.startswith(JPEG_SOI):
        return False
    scans = [offset for marker, offset in _iterate_jpeg_segments(raw) if marker == JPEG_SOS]
    return not scans or raw.find(JPEG_EOI, scans[0]) < 0


def _parse_png(raw: Buffer) -> ImageHeader:
    orientation = UPRIGHT
    for name, start, end in iterate_png_chunks(raw):
        if name == b"eXIf":
            orientation = _parse_exif(raw[start:end])
    return ImageHeader("PNG", (_read_int(raw, 20, 4), _read_int(raw, 16, 4)), orientation)


def iterate_png_chunks(raw: Buffer) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of the content of each complete PNG chunk, up to the end chunk.

    Args:
        raw: Content of a PNG file.
    """
    offset = len(PNG_SIGNATURE)
    while offset + 12 <= len(raw):  # length, name, content, checksum
        name, end = raw[offset + 4 : offset + 8], offset + 8 + _read_int(raw, offset, 4)
        if end + 4 > len(raw):
            return
        yield name, offset + 8, end
        if name == PNG_END_CHUNK:
            return
        offset = end + 4


def is_truncated_png(raw: bytes) -> bool:
    """Return whether a PNG file is incomplete; False for other files.

    A PNG is incomplete if a chunk is longer than the file or the end chunk is missing. OpenCV allocates the
    stated length of a chunk, up to 2 GiB, before it checks the length.

    Args:
        raw: Content of a file.
    """
    if not raw.startswith(PNG_SIGNATURE):
        return False
    return all(name != PNG_END_CHUNK for name, _, _ in iterate_png_chunks(raw))


def _parse_webp(raw: Buffer) -> ImageHeader | None:
    size_hw, orientation, offset = None, UPRIGHT, 12
    while offset + 8 <= len(raw):
        name, length = raw[offset : offset + 4], _read_int(raw, offset + 4, 4, "little")
        start = offset + 8
        if name == b"VP8X":
            size_hw = _read_int(raw, start + 7, 3, "little") + 1, _read_int(raw, start + 4, 3, "little") + 1
        elif name == b"VP8L" and size_hw is None:
            bits = _read_int(raw, start + 1, 4, "little")
            size_hw = (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
        elif name == b"VP8 " and size_hw is None:
            size_hw = _read_int(raw, start + 8, 2, "little") & 0x3FFF, _read_int(raw, start + 6, 2, "little") & 0x3FFF
        elif name == b"EXIF":
            orientation = _parse_exif(raw[start : start + length])
        offset = start + length + length % 2
    return ImageHeader("WebP", size_hw, orientation) if raw[8:12] == b"WEBP" and size_hw else None


def _parse_exif(block: bytes) -> int:
    """Return the orientation of an EXIF block: a TIFF structure, in some files after the signature of JPEG."""
    orientation = _parse_tiff_tags(block.removeprefix(EXIF_SIGNATURE)).get(TIFF_ORIENTATION, UPRIGHT)
    return orientation if 1 <= orientation <= 8 else UPRIGHT


def _parse_tiff(raw: Buffer) -> ImageHeader:
    tags = _parse_tiff_tags(raw)
    orientation = tags.get(TIFF_ORIENTATION, UPRIGHT)
    size_hw = tags.get(TIFF_HEIGHT, 0), tags.get(TIFF_WIDTH, 0)
    return ImageHeader("TIFF", size_hw, orientation if 1 <= orientation <= 8 else UPRIGHT)


def _parse_tiff_tags(raw: Buffer) -> dict[int, int]:
    """Return the single integers of the first directory of a TIFF or BigTIFF structure, by tag."""
    order: ByteOrder = "little" if raw[:2] == b"II" else "big"
    is_big = _read_int(raw, 2, 2, order) == 43
    count_bytes, entry_bytes, value_offset = (8, 20, 12) if is_big else (2, 12, 8)
    start = _read_int(raw, 8, 8, order) if is_big else _read_int(raw, 4, 4, order)
    tags: dict[int, int] = {}
    for index in range(_read_int(raw, start, count_bytes, order)):
        offset = start + count_bytes + entry_bytes * index
        if offset + entry_bytes > len(raw):
            break
        value_bytes = {3: 2, 4: 4, 16: 8}.get(_read_int(raw, offset + 2, 2, order), 0)  # SHORT, LONG, LONG8
        if value_bytes:
            tags[_read_int(raw, offset, 2, order)] = _read_int(raw, offset + value_offset, value_bytes, order)
    return tags


def _parse_gif(raw: Buffer) -> ImageHeader:
    return ImageHeader("GIF", (_read_int(raw, 8, 2, "little"), _read_int(raw, 6, 2, "little")))


def _parse_bmp(raw: Buffer) -> ImageHeader:
    if _read_int(raw, 14, 4, "little") == 12:  # the header of OS/2
        return ImageHeader("BMP", (_read_int(raw, 20, 2, "little"), _read_int(raw, 18, 2, "little")))
    height = int.from_bytes(raw[22:26], "little", signed=True)  # negative: the first row is the top row
    return ImageHeader("BMP", (abs(height), _read_int(raw, 18, 4, "little")))


def _parse_pnm(raw: Buffer) -> ImageHeader | None:
    match = PNM_HEADER.match(raw[:4096])
    return ImageHeader("PNM", (int(match[2]), int(match[1]))) if match else None


def _parse_jpeg2000(raw: Buffer) -> ImageHeader | None:
    """Read the size of the codestream, which the decoder uses; the size in the file header can differ."""
    offset = raw.find(JPEG2000_SIZE)
    if offset < 0:
        return None
    x2, y2, x1, y1 = (_read_int(raw, offset + 8 + 4 * index, 4) for index in range(4))
    return ImageHeader("JPEG 2000", (y2 - y1, x2 - x1))


def _parse_heif(raw: Buffer) -> ImageHeader | None:
    """Read the properties of the primary image of an AVIF or HEIC file (ISO 23008-12)."""
    name = HEIF_BRANDS.get(raw[8:12])
    boxes = find_boxes(raw, 0, len(raw))
    if name is None or raw[4:8] != b"ftyp" or b"meta" not in boxes:
        return None
    if b"avif" in raw[16 : boxes[b"ftyp"][1]]:  # the main brand can be mif1
        name = "AVIF"
    start, end = boxes[b"meta"]
    meta = find_boxes(raw, start + 4, end)
    properties = find_boxes(raw, *meta.get(b"iprp", (0, 0)))
    if not {b"ipco", b"ipma"} <= properties.keys() or b"pitm" not in meta:
        return None
    pitm = meta[b"pitm"][0]
    primary = _read_int(raw, pitm + 4, 4 if _read_int(raw, pitm, 1) else 2)
    size_hw, turns, axis = None, 0, None
    all_properties = list(iterate_boxes(raw, *properties[b"ipco"]))
    for index in _list_heif_properties(raw, *properties[b"ipma"], primary):
        kind, content = all_properties[index - 1][:2] if 0 < index <= len(all_properties) else (b"", 0)
        if kind == b"ispe":
            size_hw = _read_int(raw, content + 8, 4), _read_int(raw, content + 4, 4)
        elif kind == b"irot":
            turns = _read_int(raw, content, 1) & 3
        elif kind == b"imir":
            axis = _read_int(raw, content, 1) & 1
    return ImageHeader(name, size_hw, HEIF_ORIENTATIONS[turns, axis]) if size_hw else None


def _list_heif_properties(raw: Buffer, start: int, end: int, item: int) -> list[int]:
    """Return the 1-based indices of the properties of an item, from an `ipma` box."""
    id_bytes, index_bytes = (4 if _read_int(raw, start, 1) else 2), (2 if _read_int(raw, start + 3, 1) & 1 else 1)
    offset = start + 8
    while offset + id_bytes < end:
        item_id, count = _read_int(raw, offset, id_bytes), raw[offset + id_bytes]
        offset += id_bytes + 1
        if item_id == item:
            mask = (1 << (8 * index_bytes - 1)) - 1  # the highest bit marks an essential property
            return [_read_int(raw, offset + index_bytes * n, index_bytes) & mask for n in range(count)]
        offset += index_bytes * count
    return []


def find_boxes(raw: Buffer, start: int, end: int) -> dict[bytes, tuple[int, int]]:
    """Return start and end of the content of each box, by type.

    Args:
        raw: File in the ISO base media file format.
        start: Start of the boxes.
        end: End of the boxes.
    """
    return {kind: (content, box_end) for kind, content, box_end in iterate_boxes(raw, start, end)}


def iterate_boxes(raw: Buffer, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of the content of each complete box of the ISO base media file format.

    Args:
        raw: File.
        start: Start of the boxes.
        end: End of the boxes.
    """
    while start + 8 <= min(end, len(raw)):
        length, header = _read_int(raw, start, 4), 8
        if length == 1:
            length, header = _read_int(raw, start + 8, 8), 16
        box_end = end if length == 0 else start + length
        if box_end > end or box_end < start + header:
            return
        yield raw[start + 4 : start + 8], start + header, box_end
        start = box_end


def _read_int(raw: Buffer, offset: int, num_bytes: int, order: ByteOrder = "big") -> int:
    return int.from_bytes(raw[offset : offset + num_bytes], order)


PARSERS: tuple[tuple[bytes, Callable[[Buffer], ImageHeader | None]], ...] = (
    (JPEG_SOI, _parse_jpeg),
    (PNG_SIGNATURE, _parse_png),
    (b"RIFF", _parse_webp),
    (b"II*\0", _parse_tiff),
    (b"MM\0*", _parse_tiff),
    (b"II+\0", _parse_tiff),
    (b"MM\0+", _parse_tiff),
    (b"GIF8", _parse_gif),
    (b"BM", _parse_bmp),
    (b"P", _parse_pnm),
    (JPEG2000_SIGNATURE, _parse_jpeg2000),
    (JPEG2000_SIZE, _parse_jpeg2000),
    (b"\0\0\0", _parse_heif),
)
