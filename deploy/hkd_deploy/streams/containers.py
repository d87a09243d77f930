"""Structure of video files: how much of a file is there, without decoding. Formats: AVI, MP4, MOV, MKV, WebM."""

import mmap
from pathlib import Path
from typing import BinaryIO

from hkd_det.image_header import find_boxes, iterate_boxes

AVI, MP4, MATROSKA = "AVI", "MP4", "Matroska"
NO_BOX = (0, 0)
MIN_HIDDEN_S = 0.5
MP4_BOX_TYPES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
EBML_SIGNATURE = b"\x1a\x45\xdf\xa3"
SEGMENT_ID, CLUSTER_ID = 0x18538067, 0x1F43B675  # elements whose content is walked


def identify_container(path: Path) -> str:
    """Return the container format of a video file.

    Args:
        path: Video file.

    Returns:
        `AVI`, `MP4` (MOV too), `MATROSKA` (WebM too), or an empty string for others.
    """
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        start = file.read(12)
    if start.startswith(b"RIFF"):
        return AVI
    if start.startswith(EBML_SIGNATURE):
        return MATROSKA
    return MP4 if start[4:8] in MP4_BOX_TYPES else ""


def measure_intact_ratio(path: Path) -> float:
    """Measure which part of a video file is there and has a valid structure.

    Args:
        path: Video file.

    Returns:
        Intact bytes divided by the bytes that the container states, 0 to 1. 1 for other formats, and for containers
        that do not state a length.
    """
    container, size = identify_container(path), path.stat().st_size
    with path.open("rb") as file:
        if container == AVI:
            intact, stated = _walk_riff(file, size)
        elif container == MP4:
            intact, stated = size, _find_boxes_end(file, size)
        elif container == MATROSKA:
            intact, stated = _walk_ebml(file, size)
        else:
            return 1.0
    return min(1.0, intact / max(stated, 1))


def has_hidden_frames(path: Path) -> bool:
    """Return whether the edit list of an MP4 file hides more than half a second of its video track.

    Programs that trim a video without encoding keep the frames from the previous key frame on, and hide them.

    Args:
        path: Video file; False for other formats than MP4 and MOV.
    """
    if identify_container(path) != MP4:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        movie = find_boxes(raw, 0, len(raw)).get(b"moov", NO_BOX)
        movie_scale, _ = _read_clock(raw, find_boxes(raw, *movie).get(b"mvhd", NO_BOX))
        for kind, start, end in iterate_boxes(raw, *movie):
            track = find_boxes(raw, start, end) if kind == b"trak" else {}
            media = find_boxes(raw, *track.get(b"mdia", NO_BOX))
            handler = media.get(b"hdlr", NO_BOX)[0]
            edits = find_boxes(raw, *track.get(b"edts", NO_BOX)).get(b"elst")
            if edits and raw[handler + 8 : handler + 12] == b"vide":
                scale, duration = _read_clock(raw, media.get(b"mdhd", NO_BOX))
                return _sum_edits(raw, *edits) / movie_scale < duration / scale - MIN_HIDDEN_S
    return False


def _read_clock(raw: mmap.mmap, box: tuple[int, int]) -> tuple[int, int]:
    """Return ticks per second and the duration in ticks of a movie or media header."""
    start, (offset, num_bytes) = box[0], ((20, 8) if raw[box[0]] == 1 else (12, 4))
    scale = int.from_bytes(raw[start + offset : start + offset + 4], "big")
    return max(1, scale), int.from_bytes(raw[start + offset + 4 : start + offset + 4 + num_bytes], "big")


def _sum_edits(raw: mmap.mmap, start: int, end: int) -> int:
    """Return the duration of an edit list in ticks of the movie."""
    num_bytes = 8 if raw[start] == 1 else 4
    starts = range(start + 8, end, 2 * num_bytes + 4)
    return sum(int.from_bytes(raw[offset : offset + num_bytes], "big") for offset in starts)


def _find_boxes_end(file: BinaryIO, size: int) -> int:
    """Return the end of the last top-level box of an MP4 file. It is beyond the end of a truncated file."""
    offset = 0
    while offset + 8 <= size:
        file.seek(offset)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0: the box ends with the file
            return size
        offset += length
    return offset


def _walk_riff(file: BinaryIO, size: int) -> tuple[int, int]:
    """Return the end of the last valid chunk of an AVI file, and the end of the file as it states."""
    offset = stated = 0
    while offset + 8 <= size:
        file.seek(offset)
        header = file.read(8)
        kind, length = header[:4], int.from_bytes(header[4:], "little")
        end = offset + 8 + length + length % 2
        if kind == b"RIFF":  # a large AVI consists of several
            stated = max(stated, end)
        elif not all(32 <= byte < 127 for byte in kind) or (kind != b"LIST" and end > size):
            break
        offset = offset + 12 if kind in (b"RIFF", b"LIST") else end
    return min(offset, size), max(size, stated)


def _walk_ebml(file: BinaryIO, size: int) -> tuple[int, int]:
    """Return the end of the last valid element of a Matroska file, and the end of the file as it states."""
    offset, stated = 0, size
    while offset < size:
        file.seek(offset)
        header = file.read(12)
        id_bytes = 9 - header[0].bit_length()
        if id_bytes > 4 or len(header) <= id_bytes:  # zeros, or other data that is not an element
            break
        element_id = int.from_bytes(header[:id_bytes], "big")
        length_bytes = 9 - header[id_bytes].bit_length()
        start = offset + id_bytes + length_bytes
        mask = (1 << 7 * length_bytes) - 1
        length = int.from_bytes(header[id_bytes : id_bytes + length_bytes], "big") & mask
        if element_id in (SEGMENT_ID, CLUSTER_ID):
            if length != mask:  # all bits set: the length is unknown
                stated = max(stated, start + length)
            offset = start
        elif start + length > size:
            break
        else:
            offset = start + length
    return offset, stated
