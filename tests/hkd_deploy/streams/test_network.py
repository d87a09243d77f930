"""Network cameras through PyAV: a real H.264 stream (MPEG-TS over TCP) on this machine."""

import io
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice

import numpy as np
import pytest

from hkd_deploy.streams import open_source
from hkd_deploy.streams.failures import add_password_hint
from hkd_deploy.streams.live import ReconnectPolicy
from hkd_det.errors import UnavailableError

av = pytest.importorskip("av")
FPS = 20
AcceptConnections = Callable[[socket.socket, Callable[[socket.socket], object]], None]  # of conftest.py
POLICY = ReconnectPolicy(open_timeout_s=5, read_timeout_s=2, retry_s=0.05)


class Sink(io.RawIOBase):
    """Passes what the muxer writes to a function."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]  # a buffer in typeshed
        self._send(bytes(data))
        return len(data)


class StreamCamera:
    """Sends H.264 to each client. Image n has gray level 20 + 4 n in its middle; `made_s` has the times."""

    def __init__(self, accept_connections: AcceptConnections) -> None:
        self.size_wh, self.is_off, self.hangs = (96, 64), False, False
        self.made_s: dict[int, float] = {}
        self._number = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        accept_connections(self._server, self._serve)

    def close(self) -> None:
        self.is_off = True
        self._server.close()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(av.FFmpegError):
            container = av.open(Sink(connection.sendall), "w", format="mpegts", options={"flush_packets": "1"})
            size_wh = self.size_wh
            stream = container.add_stream("libx264", rate=FPS, options={"tune": "zerolatency", "g": "5"})
            stream.width, stream.height, stream.pix_fmt = *size_wh, "yuv420p"
            while not self.is_off and size_wh == self.size_wh:
                if not self.hangs:
                    self._number = (self._number + 1) % 50
                    self.made_s[self._number] = time.monotonic()
                    image = np.full((size_wh[1], size_wh[0], 3), 20 + 4 * self._number, np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                time.sleep(1 / FPS)


@pytest.fixture
def stream_camera(accept_connections: AcceptConnections) -> Iterator[StreamCamera]:
    camera = StreamCamera(accept_connections)
    yield camera
    camera.close()


def read_number(image_rgb: np.ndarray) -> int:
    return round((int(image_rgb[image_rgb.shape[0] // 2, image_rgb.shape[1] // 2, 0]) - 20) / 4)


@pytest.mark.slow
def test_stream_returns_new_images_without_delay(stream_camera: StreamCamera) -> None:
    with open_source(stream_camera.address, POLICY) as source:
        frames = list(islice(source, 20))
        now_s = time.monotonic()
    numbers = [read_number(frame.image_rgb) for frame in frames]
    assert frames[0].image_rgb.shape == (64, 96, 3)
    assert len(set(numbers)) == 20
    # One frame more than the time of an image: the demuxer waits for the start of the next one.
    assert now_s - stream_camera.made_s[numbers[-1]] < 0.3 + 2 / FPS
    assert source.status == ""


def test_stream_reconnects_with_another_size(stream_camera: StreamCamera) -> None:
    with open_source(stream_camera.address, POLICY) as source:
        assert next(iter(source)).image_rgb.shape == (64, 96, 3)
        stream_camera.size_wh = (64, 48)  # the camera closes the connection and serves the new size
        deadline_s = time.monotonic() + 10
        frames = source.iterate_frames(lambda: time.monotonic() < deadline_s)
        assert any(frame.image_rgb.shape == (48, 64, 3) for frame in frames)


@pytest.mark.slow
def test_frames_from_before_a_silence_are_not_returned(stream_camera: StreamCamera) -> None:
    with open_source(stream_camera.address, ReconnectPolicy(read_timeout_s=0.5, retry_s=0.05)) as source:
        list(islice(source, 5))
        stream_camera.hangs = True
        end_s = time.monotonic() + 1.5
        list(source.iterate_frames(lambda: time.monotonic() < end_s))
        assert source.status.startswith("camera lost: ")
        resumed_s = time.monotonic()
        stream_camera.hangs = False
        deadline_s = resumed_s + 10
        frame = next(source.iterate_frames(lambda: time.monotonic() < deadline_s))
        assert stream_camera.made_s[read_number(frame.image_rgb)] >= resumed_s


def test_text_is_not_a_video(accept_connections: AcceptConnections) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        accept_connections(server, lambda connection: connection.sendall(b"no video\n" * 10_000))
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=rf"^{address}: not a video, or a damaged one\."):
            open_source(address, POLICY).__enter__()


@pytest.mark.parametrize(
    ("address", "is_explained"),
    [
        ("rtsp://a:p%2Fw@host/x", False),
        ("rtsp://host/x", False),
        ("rtsp://a:p/w@host/x", True),
        ("rtsp://a:p@w@host/x", True),
        ("rtsp://a:p#w@host/x", True),
    ],
)
def test_password_hint_only_for_raw_characters(address: str, is_explained: bool) -> None:
    assert (add_password_hint("No.", address) != "No.") == is_explained
