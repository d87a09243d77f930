"""Fixtures of the tests of streams.

`write_matroska`, `write_mp4`: write small videos with given times, which OpenCV cannot write.
`accept_connections`: serves the connections of a server, each in a thread.
"""

import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest

UNKNOWN_SIZE = b"\x01" + b"\xff" * 7


def make_element(element_id: str, content: bytes, size: bytes | None = None) -> bytes:
    """Return an EBML element; `size` replaces the size field."""
    return bytes.fromhex(element_id) + (size or (len(content) | 1 << 56).to_bytes(8, "big")) + content


def make_frame(level: int) -> bytes:
    return cv2.imencode(".jpg", np.full((48, 64, 3), level, np.uint8))[1].tobytes()


def make_matroska(times_s: Sequence[float], duration_s: float | None, codec: str, is_live: bool, fps: float) -> bytes:
    """Return an MKV file of Motion JPEG in which frame n has level 2 n. A live file states no sizes."""
    video = make_element("b0", b"\x40") + make_element("ba", b"\x30")
    track = make_element("d7", b"\x01") + make_element("73c5", b"\x01") + make_element("83", b"\x01")
    track += make_element("86", codec.encode()) + make_element("e0", video)
    if fps:
        track += make_element("23e383", round(1e9 / fps).to_bytes(4, "big"))
    info = make_element("2ad7b1", (10**6).to_bytes(3, "big"))
    if duration_s is not None:
        info += make_element("4489", struct.pack(">d", 1e3 * duration_s))
    clusters = b""
    for number, time_s in enumerate(times_s):  # one cluster per frame, because a block has 16 bits for its time
        data = make_frame(2 * number) if codec == "V_MJPEG" else bytes(50)
        block = make_element("e7", round(1e3 * time_s).to_bytes(8, "big")) + make_element("a3", b"\x81\0\0\x80" + data)
        clusters += make_element("1f43b675", block, UNKNOWN_SIZE if is_live else None)
    segment = make_element("1549a966", info) + make_element("1654ae6b", make_element("ae", track)) + clusters
    header = make_element("1a45dfa3", make_element("4282", b"matroska"))
    return header + make_element("18538067", segment, UNKNOWN_SIZE if is_live else None)


@pytest.fixture
def write_matroska(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes an MKV file with given times and returns its path."""

    def write(
        times_s: Sequence[float],
        name: str = "video.mkv",
        duration_s: float | None = None,
        codec: str = "V_MJPEG",
        is_live: bool = False,
        fps: float = 0.0,
    ) -> Path:
        path = tmp_path / name
        path.write_bytes(make_matroska(times_s, duration_s, codec, is_live, fps))
        return path

    return write


@pytest.fixture
def write_mp4(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes an MP4 file with given durations of its frames, in ms."""

    def write(durations_ms: Sequence[int], name: str = "video.mp4") -> Path:
        path = tmp_path / name
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), 1000, (64, 48))
        for number in range(len(durations_ms)):
            writer.write(np.full((48, 64, 3), 2 * number, np.uint8))
        writer.release()
        raw, total_ms = path.read_bytes(), sum(durations_ms)
        scale = int.from_bytes(raw[(offset := raw.index(b"mdhd") + 16) : offset + 4], "big")
        raw = overwrite(raw, b"mdhd", 20, total_ms * scale // 1000)
        raw = overwrite(raw, b"elst", 12, total_ms)  # the clock of the movie counts milliseconds
        entries = b"".join(struct.pack(">II", 1, duration * scale // 1000) for duration in durations_ms)
        table = struct.pack(">I4sII", 16 + len(entries), b"stts", 0, len(durations_ms)) + entries
        path.write_bytes(replace_box(raw, b"stts", table))
        return path

    return write


def overwrite(raw: bytes, name: bytes, offset: int, value: int) -> bytes:
    """Replace a number of 32 bits in a box, at an offset from its name."""
    start = raw.index(name) + offset
    return raw[:start] + value.to_bytes(4, "big") + raw[start + 4 :]


def replace_box(raw: bytes, name: bytes, box: bytes) -> bytes:
    """Replace a box of the movie box, which is the last box of the file, and adapt the sizes of its parents."""
    start = raw.index(name) - 4
    old_size = int.from_bytes(raw[start : start + 4], "big")
    changed = bytearray(raw[:start] + box + raw[start + old_size :])
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        offset = changed.index(parent) - 4
        size = int.from_bytes(changed[offset : offset + 4], "big") + len(box) - old_size
        changed[offset : offset + 4] = size.to_bytes(4, "big")
    return bytes(changed)


@pytest.fixture
def accept_connections() -> Callable[[socket.socket, Callable[[socket.socket], object]], None]:
    """Function `accept_connections(server, serve)` that calls `serve(connection)` in a thread for each connection.

    A connection is closed when `serve` returns or the client is gone. The thread ends when the server is closed.
    """

    def serve_one(connection: socket.socket, serve: Callable[[socket.socket], object]) -> None:
        with connection, suppress(OSError):
            serve(connection)

    def accept(server: socket.socket, serve: Callable[[socket.socket], object]) -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                threading.Thread(target=serve_one, args=(connection, serve), daemon=True).start()

    def start(server: socket.socket, serve: Callable[[socket.socket], object]) -> None:
        threading.Thread(target=accept, args=(server, serve), daemon=True).start()

    return start
