"""H.264 in fragmented MP4 files that remain playable after SIGKILL, power loss and a full disk.

A fragment has half a second and is written to the disk before the next one begins. A cut file ends with its last
complete fragment. The muxer of FFmpeg writes to memory; this module writes complete fragments to the file, so that an
error of the disk can be undone.
"""

import os
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import UnavailableError, import_package

INSTALL_HINT = "--record requires it. Run pip install 'hkd-det[live]'."
ENCODER = "libx264"
TIME_BASE = Fraction(1, 1000)  # times are milliseconds
KEY_INTERVAL_MS = 1000
FRAGMENT_US = 500_000
TEMP_PREFIX = "."  # of the name of a file without a fragment
# empty_moov, delay_moov: the header precedes the first fragment and takes the parameters of the codec from it.
MUXER_OPTIONS = {"movflags": "empty_moov+delay_moov+default_base_moof", "frag_duration": str(FRAGMENT_US)}
# zerolatency: one packet for each frame, without B-frames. g: key frames are set by time, not by number of frames.
ENCODER_OPTIONS = {"preset": "superfast", "tune": "zerolatency", "crf": "26", "g": "100000", "forced-idr": "1"}
SMPTE170M, LIMITED_RANGE = 6, 1  # the matrix of OpenCV's conversion; players assume another one for large images


class EncodedFrame(NamedTuple):
    """One encoded frame.

    Attributes:
        data: H.264 in Annex B format. A key frame contains the parameter sets.
        time_ms: Presentation time, milliseconds.
        is_key: True if decoding can begin with this frame.
    """

    data: bytes
    time_ms: int
    is_key: bool


class H264Encoder:
    """Encodes the frames of one camera with at least one key frame per second.

    Args:
        size_hw: Height and width of the frames, pixels. An odd last row or column is cut off.

    Raises:
        UnavailableError: PyAV is not installed or has no encoder.
    """

    def __init__(self, size_hw: tuple[int, int]) -> None:
        self._av = import_package("av", "PyAV", INSTALL_HINT)
        self.size_hw = size_hw
        try:
            self._context: Any = self._av.CodecContext.create(ENCODER, "w")
        except self._av.codec.codec.UnknownCodecError:
            hint = "Install the wheel of PyPI (pip install --force-reinstall av)."
            raise UnavailableError(f"PyAV: built without the H.264 encoder {ENCODER}. {hint}") from None
        self._context.height, self._context.width = (side - side % 2 for side in size_hw)
        self._context.pix_fmt, self._context.time_base = "yuv420p", TIME_BASE
        self._context.colorspace, self._context.color_range = SMPTE170M, LIMITED_RANGE
        self._context.thread_count = 1
        self._context.options = ENCODER_OPTIONS
        self._key_ms: int | None = None

    def encode(self, image_rgb: NDArray[np.uint8], time_ms: int, force_key: bool = False) -> EncodedFrame:
        """Encode a frame.

        Args:
            image_rgb (uint8[H, W, 3]): RGB.
            time_ms: Presentation time, milliseconds; larger than that of the previous frame.
            force_key: True to encode a key frame.

        Returns:
            The encoded frame.
        """
        is_key = force_key or self._key_ms is None or time_ms - self._key_ms >= KEY_INTERVAL_MS
        even = image_rgb[: self._context.height, : self._context.width]
        frame = self._av.VideoFrame.from_ndarray(cv2.cvtColor(even, cv2.COLOR_RGB2YUV_I420), format="yuv420p")
        frame.pts, frame.time_base = time_ms, TIME_BASE
        types = self._av.video.frame.PictureType
        frame.pict_type = types.I if is_key else types.NONE
        (packet,) = self._context.encode(frame)
        if is_key:
            self._key_ms = time_ms
        return EncodedFrame(bytes(packet), time_ms, is_key)


class FragmentedMp4:
    """One file. It appears with its first fragment. After an error of the disk it ends with its last complete one.

    Args:
        path: The file, which does not exist yet.
        size_hw: Height and width of the frames, pixels.

    Attributes:
        path: The file.
        start_ms: Time of the first frame, milliseconds. None before it.
        num_bytes: Size of the file.
        num_pending: Number of frames that are not in the file yet.

    Raises:
        OSError: The file cannot be created.
    """

    def __init__(self, path: Path, size_hw: tuple[int, int]) -> None:
        self._av = import_package("av", "PyAV", INSTALL_HINT)
        self.path = path
        self.start_ms: int | None = None
        self.num_bytes = self.num_pending = 0
        self._interval_ms = 1
        self._last_ms = 0
        self._temp_path = path.with_name(f"{TEMP_PREFIX}{path.name}")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        self._file = os.open(self._temp_path, flags, 0o644)
        self._muxed = _MemoryFile()
        self._container: Any = self._av.open(self._muxed, "w", format="mp4", options=MUXER_OPTIONS)
        height, width = (side - side % 2 for side in size_hw)
        self._stream: Any = self._container.add_mux_stream("h264", width=width, height=height)
        self._stream.time_base = TIME_BASE

    def write(self, frame: EncodedFrame) -> None:
        """Append a frame. Fragments that this completes are on the disk when the call returns.

        Args:
            frame: The frame. The first one must be a key frame.

        Raises:
            OSError: The disk is full or fails. The file has been closed.
        """
        if self.start_ms is None:
            self.start_ms = frame.time_ms
        else:
            self._interval_ms = max(1, frame.time_ms - self._last_ms)
        packet = self._av.Packet(frame.data)
        packet.stream, packet.time_base = self._stream, TIME_BASE
        packet.pts = packet.dts = frame.time_ms - self.start_ms
        packet.duration = self._interval_ms  # replaced by the true one when the next frame arrives
        packet.is_keyframe = frame.is_key
        self._last_ms = frame.time_ms
        self._container.mux_one(packet)
        self.num_pending += 1
        if self._muxed.data:
            self._store()
            self.num_pending = 1  # the muxer holds the newest frame

    def close(self) -> None:
        """Write the last fragment and close the file.

        Raises:
            OSError: The disk is full or fails. The file has been closed.
        """
        self._container.close()
        self._store()
        self.num_pending = 0
        os.close(self._file)

    def _store(self) -> None:
        """Write the complete fragments. After an error, cut the file behind the last one that is on the disk."""
        data, is_first = memoryview(bytes(self._muxed.data)), self.num_bytes == 0
        self._muxed.data.clear()
        try:
            offset = 0
            while offset < len(data):
                offset += os.write(self._file, data[offset:])
            getattr(os, "fdatasync", os.fsync)(self._file)
            if is_first:
                self._temp_path.rename(self.path)
                _sync_directory(self.path.parent)
        except OSError:
            self._cut()
            raise
        self.num_bytes += len(data)

    def _cut(self) -> None:
        try:
            if self.num_bytes == 0:
                for path in (self._temp_path, self.path):
                    path.unlink(missing_ok=True)
            else:
                os.truncate(self._file, self.num_bytes)
        finally:
            os.close(self._file)


def cut_incomplete_fragment(path: Path) -> int:
    """Remove a fragment at the end of a file that was cut in the middle of a write, as by a loss of power.

    Players read up to it, but some refuse a file with an incomplete header of a fragment (box `moof`).

    Args:
        path: The file.

    Returns:
        The number of removed bytes.

    Raises:
        OSError: The file cannot be read or written.
    """
    size, offset, complete = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while header := file.read(8):
            num_bytes, kind = struct.unpack(">I4s", header) if len(header) == 8 else (8, b"")
            offset += max(8, num_bytes)
            if offset > size:
                break
            if kind != b"moof":
                complete = offset
            file.seek(offset)
    if complete < size:
        os.truncate(path, complete)
    return size - complete


class _MemoryFile:
    """File object that the muxer writes to. It cannot seek, so the muxer writes fragments once."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        """Append data. Return its size."""
        self.data += data
        return len(data)


def _sync_directory(directory: Path) -> None:
    """Store the name of a new file, which fdatasync of the file does not."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
