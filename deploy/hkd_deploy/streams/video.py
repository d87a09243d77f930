"""Video files: all frames with their times in the file.

The times come from the container, because phones, screen recorders, browsers and network recorders write variable frame
rates. The frame count of many containers is an estimate (duration times rate), so a video counts as damaged only if
the file is shorter than its container states, or if stored frames cannot be decoded. The structure of AVI, MP4, MOV,
MKV and WebM files is read without decoding.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from hkd_deploy.streams.sources import Frame, FrameSource, limit_gap, sanitize_fps, wait_forever
from hkd_det.errors import DataError
from hkd_det.image_header import find_boxes, iterate_boxes

DEFAULT_FPS = 25.0  # for a video without times and without a frame rate
MAX_VARIABLE_FPS = 60.0  # display rate of a video with a variable rate
NUM_SCANNED_FRAMES = 3000  # stored frames whose times determine the frame rate
CONSTANT_RATIO = 0.9  # part of the intervals that agree with a constant rate
INTERVAL_TOLERANCE_S = 0.0015  # containers round times to milliseconds
MAX_MISSING_RATIO = 0.05
MAX_HIDDEN_S = 1.0  # the edit list of a trimmed MP4 hides the frames between a key frame and the start
CODEC_NAMES = {"av01": "AV1", "hevc": "H.265", "hvc1": "H.265", "hev1": "H.265", "vvc1": "H.266", "avc1": "H.264"}
AVI, MP4, MATROSKA = "AVI", "MP4", "Matroska"
NO_BOX = (0, 0)
MIN_HIDDEN_S = 0.5
MP4_BOX_TYPES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
EBML_SIGNATURE = b"\x1a\x45\xdf\xa3"
SEGMENT_ID, CLUSTER_ID = 0x18538067, 0x1F43B675  # elements whose content is walked


class VideoSource(FrameSource):
    """A video file.

    Args:
        path: The video.

    Raises:
        DataError: OpenCV cannot read the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise DataError(f"{path}: not a readable video (wrong format or truncated). Try to play it with ffplay.")
        self._container = identify_container(path)
        stated_fps = self._capture.get(cv2.CAP_PROP_FPS)
        times_s = [] if self._container == AVI else list(islice(_iterate_stored_times(path), NUM_SCANNED_FRAMES + 1))
        self._stated_count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        num_frames = len(times_s) if 0 < len(times_s) <= NUM_SCANNED_FRAMES else self._stated_count
        fps = estimate_fps(times_s[:NUM_SCANNED_FRAMES], stated_fps)
        super().__init__(str(path), is_live=False, fps=fps, num_frames=num_frames or None)

    def iterate_frames(self, on_idle: Callable[[], bool] = wait_forever) -> Iterator[Frame]:  # noqa: ARG002 - not live
        """Iterate over the frames.

        Args:
            on_idle: No effect.

        Yields:
            The frames, with their position in the video as timestamp. Long gaps are shortened by `limit_gap`.

        Raises:
            DataError: The file is truncated, more than 5 % of its frames cannot be decoded, or there is no frame.
        """
        step_s = 1 / (self.fps or DEFAULT_FPS)
        index, position_s, timestamp_s = 0, 0.0, 0.0
        while True:
            has_frame, image_bgr = self._capture.read()
            if not has_frame:
                break
            previous_s, position_s = position_s, self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
            if self._container == AVI:  # a constant rate; OpenCV reports wrong times of B-frames
                timestamp_s = index * step_s
            elif index:
                timestamp_s += limit_gap(position_s - previous_s, step_s)
            yield Frame(cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False), timestamp_s)
            index += 1
        self._check_complete(index)

    def close(self) -> None:
        """Close the file."""
        self._capture.release()

    def _check_complete(self, num_decoded: int) -> None:
        if num_decoded == 0:
            codec = _format_codec(self._capture)
            raise DataError(
                f"{self.name}: no frame can be decoded. The codec is {codec}, which OpenCV {cv2.__version__} may not "
                f"support. Convert the video: ffmpeg -i {self._path.name} -c:v libx264 out.mp4."
            )
        if self._stated_count and num_decoded >= self._stated_count * (1 - MAX_MISSING_RATIO):
            return
        num_expected = self._stated_count
        if self._container != MP4 or has_hidden_frames(self._path):  # the stated count is an estimate
            num_expected = sum(1 for _ in _iterate_stored_times(self._path))
        max_missing = num_expected * MAX_MISSING_RATIO
        if self._container == MP4 and num_expected != self._stated_count:
            max_missing = max(max_missing, MAX_HIDDEN_S * (self.fps or DEFAULT_FPS))
        is_undecodable = num_expected - num_decoded > max_missing
        if is_undecodable or measure_intact_ratio(self._path) < 1 - MAX_MISSING_RATIO:
            expected = max(self._stated_count, num_expected)
            frames = f"{num_decoded} of {expected}" if expected > num_decoded else f"{num_decoded}"
            raise DataError(f"{self.name}: truncated or damaged after {frames} frames. Copy the video again.")


def estimate_fps(times_s: Sequence[float], stated_fps: float) -> float | None:
    """Estimate the frame rate of a video.

    Args:
        times_s: Times of stored frames in any order, seconds. Can be empty.
        stated_fps: Frame rate that the container states: the rate, its mean, or the clock of the times.

    Returns:
        The stated rate if the times agree with it. Otherwise the rate of the shortest intervals, at most 60. None if
        unknown.
    """
    fps = sanitize_fps(stated_fps)
    intervals = np.diff(np.unique(np.array(times_s)))
    if len(intervals) < 2:
        return fps
    if fps:
        tolerance_s = max(INTERVAL_TOLERANCE_S, 0.1 / fps)
        if np.mean(np.abs(intervals - 1 / fps) <= tolerance_s) >= CONSTANT_RATIO:
            return fps
    return round(min(MAX_VARIABLE_FPS, 1 / float(np.percentile(intervals, 10))), 2)


def _iterate_stored_times(path: Path) -> Iterator[float]:
    """Yield the time of each stored frame in seconds, in the order of the file, without decoding."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        if path.is_file() and capture.set(cv2.CAP_PROP_FORMAT, -1):  # -1: return encoded frames
            while capture.grab():
                yield capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
    finally:
        capture.release()


def _format_codec(capture: cv2.VideoCapture) -> str:
    code = int(capture.get(cv2.CAP_PROP_FOURCC)) & 0xFFFFFFFF
    text = code.to_bytes(4, "little").decode("latin-1")
    return CODEC_NAMES.get(text.lower(), text if text.isprintable() else f"0x{code:08x}")


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
