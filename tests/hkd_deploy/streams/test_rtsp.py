"""RTSP cameras: a small server on this machine sends H.264 (RTP over TCP) and RTCP sender reports."""

import base64
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest

from hkd_deploy.streams import open_source
from hkd_deploy.streams.failures import check_reachable
from hkd_deploy.streams.live import ReconnectPolicy
from hkd_deploy.streams.network import estimate_interval_s
from hkd_det.errors import UnavailableError

av = pytest.importorskip("av")
FPS = 20
AcceptConnections = Callable[[socket.socket, Callable[[socket.socket], object]], None]  # of conftest.py
NTP_EPOCH_S = 2_208_988_800
POLICY = ReconnectPolicy(open_timeout_s=5, read_timeout_s=2, retry_s=0.05)


def make_encoder(gop_s: float, num_bframes: int = 0) -> Any:
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 96, 64, "yuv420p"
    encoder.framerate, encoder.time_base, encoder.gop_size = FPS, Fraction(1, FPS), round(gop_s * FPS)
    encoder.options = {"tune": "zerolatency", "preset": "ultrafast", "x264-params": "scenecut=0"}
    if num_bframes:
        parameters = f"scenecut=0:bframes={num_bframes}:b-adapt=0:rc-lookahead=0:sync-lookahead=0"
        encoder.options = {"preset": "ultrafast", "x264-params": parameters}
        encoder.thread_count = 1
    return encoder


def split_units(data: bytes) -> list[bytes]:
    """Return the NAL units of a byte stream."""
    return [unit for unit in re.split(rb"\x00*\x00\x00\x01", data) if unit]


class RtspCamera:
    """Encodes for each client, with a key frame first. An image is sent `delay_s` after it is encoded.

    Nothing is sent for `backlog_s` after the client asks for images; then all comes at once.
    """

    def __init__(self, accept_connections: AcceptConnections) -> None:
        self.gop_s, self.delay_s, self.has_reports, self.is_off = 1.0, 0.0, True, False
        self.num_bframes, self.backlog_s, self.drop = 0, 0.0, threading.Event()
        self.made_s: dict[int, float] = {}
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"rtsp://127.0.0.1:{self._server.getsockname()[1]}/cam"
        accept_connections(self._server, self._serve)

    def close(self) -> None:
        self.is_off = True
        self._server.close()

    def _serve(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            while request := lines.readline().decode():
                headers = {}
                while (line := lines.readline().decode().strip()) != "":
                    key, _, value = line.partition(":")
                    headers[key.lower()] = value.strip()
                method = request.split()[0]
                connection.sendall(self._answer(method, headers["cseq"]))
                if method == "PLAY":
                    self._send_images(connection)
                    return

    def _answer(self, method: str, number: str) -> bytes:
        body, more = "", ""
        if method == "DESCRIBE":
            units = split_units(self._encode_first())
            sets = ",".join(base64.b64encode(unit).decode() for unit in units if unit[0] & 31 in (7, 8))
            body = (
                "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\na=control:track\r\n"
                f"a=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1;sprop-parameter-sets={sets}\r\n"
            )
            more = f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
        elif method == "SETUP":
            more = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
        return f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\nSession: 1\r\n{more}\r\n{body}".encode()

    def _encode_first(self) -> bytes:
        image = av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), format="rgb24")
        return bytes(make_encoder(1).encode(image)[0])

    def _send_images(self, connection: socket.socket) -> None:
        encoder, number, sequence = make_encoder(self.gop_s, self.num_bframes), 0, 0
        waiting, made_s = deque[tuple[float, float, bytes]](), dict[int, float]()
        start_s = time.monotonic()
        while not self.is_off and not self.drop.is_set():
            time.sleep(max(0.0, start_s + number / FPS - time.monotonic()))
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 + 4 * (number % 50), np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            made_s[number] = self.made_s[number % 50] = time.monotonic()
            sent_s = max(time.monotonic() + self.delay_s, start_s + self.backlog_s)
            waiting += [(sent_s, made_s[packet.pts], bytes(packet)) for packet in encoder.encode(frame)]
            if self.has_reports and number % FPS == 0:
                connection.sendall(make_report(made_s[number]))
            while waiting and time.monotonic() >= waiting[0][0]:
                _, captured_s, data = waiting.popleft()
                units = split_units(data)
                for unit in units:
                    ticks = to_ticks(captured_s)
                    head = struct.pack(">BBHII", 0x80, 96 | 128 * (unit is units[-1]), sequence, ticks, 1)
                    sequence = (sequence + 1) & 0xFFFF
                    connection.sendall(struct.pack(">cBH", b"$", 0, len(head) + len(unit)) + head + unit)
            number += 1


def to_ticks(made_s: float) -> int:
    return round(made_s * 90_000) & 0xFFFFFFFF


def make_report(made_s: float) -> bytes:
    """Return an RTCP sender report: the wall-clock time of a timestamp."""
    wall_s = time.time() - time.monotonic() + made_s + NTP_EPOCH_S
    ntp = int(wall_s) << 32 | int(wall_s % 1 * 2**32)
    return struct.pack(">cBH", b"$", 1, 28) + struct.pack(">BBHIQIII", 0x80, 200, 6, 1, ntp, to_ticks(made_s), 0, 0)


@pytest.fixture
def rtsp_camera(accept_connections: AcceptConnections) -> Iterator[RtspCamera]:
    camera = RtspCamera(accept_connections)
    yield camera
    camera.close()


def measure_ages(camera: RtspCamera, count: int) -> np.ndarray:
    """Return reported and true ages in seconds."""
    ages = []
    with open_source(camera.address, POLICY) as source:
        for frame in islice(source, count):
            now_s = time.monotonic()
            number = round((int(frame.image_rgb[32, 48, 0]) - 20) / 4) % 50
            ages.append((now_s - frame.timestamp_s, now_s - camera.made_s[number]))
        assert source.fps == pytest.approx(FPS, rel=0.1)
    return np.array(ages)


def test_first_image_does_not_wait_for_a_key_frame(rtsp_camera: RtspCamera) -> None:
    """The camera sends a key frame when it is opened, and the next one 30 s later."""
    rtsp_camera.gop_s = 30
    start_s = time.monotonic()
    with open_source(rtsp_camera.address, POLICY) as source:
        assert next(iter(source)).image_rgb.shape == (64, 96, 3)
    assert time.monotonic() - start_s < 2


@pytest.mark.slow
def test_age_is_that_of_the_sender_reports(rtsp_camera: RtspCamera) -> None:
    rtsp_camera.delay_s = 0.4  # invisible in the timestamps
    reported_s, true_s = measure_ages(rtsp_camera, 30)[5:].T
    assert np.median(true_s) > 0.4
    assert np.median(np.abs(reported_s - true_s)) < 0.05


@pytest.mark.slow
def test_age_without_reports_includes_the_frame_that_ffmpeg_holds(rtsp_camera: RtspCamera) -> None:
    rtsp_camera.has_reports = False
    reported_s, true_s = measure_ages(rtsp_camera, 30)[5:].T
    assert np.median(true_s) > 1 / FPS
    assert np.median(np.abs(reported_s - true_s)) < 0.04


def test_age_with_bframes_includes_the_encoder(rtsp_camera: RtspCamera) -> None:
    """The encoder emits an image when it has the next one. No timestamp shows this."""
    rtsp_camera.has_reports, rtsp_camera.num_bframes = False, 2
    reported_s, true_s = measure_ages(rtsp_camera, 30).T
    assert np.median(true_s) > 4 / FPS
    assert np.median(np.abs(reported_s - true_s)) < 0.5 / FPS
    assert np.percentile(np.abs(reported_s - true_s)[:10], 80) < 0.05


def test_images_that_waited_for_the_client_are_skipped(rtsp_camera: RtspCamera) -> None:
    rtsp_camera.has_reports, rtsp_camera.backlog_s = False, 0.6
    reported_s, true_s = measure_ages(rtsp_camera, 20).T
    assert true_s[0] < 0.3
    assert np.percentile(np.abs(reported_s - true_s), 80) < 0.05


@pytest.mark.slow
def test_delay_of_the_last_connection_is_known(rtsp_camera: RtspCamera) -> None:
    rtsp_camera.delay_s = 0.4
    ages = []
    with open_source(rtsp_camera.address, POLICY) as source:
        list(islice(source, 25))
        rtsp_camera.has_reports = False
        rtsp_camera.drop.set()
        while not source.status.startswith("camera lost"):
            time.sleep(0.01)
        rtsp_camera.drop.clear()
        for frame in islice(source, 10):
            now_s = time.monotonic()
            number = round((int(frame.image_rgb[32, 48, 0]) - 20) / 4) % 50
            ages.append((now_s - frame.timestamp_s, now_s - rtsp_camera.made_s[number]))
    reported_s, true_s = np.array(ages).T
    assert np.median(true_s) > 0.4
    assert np.percentile(np.abs(reported_s - true_s), 80) < 0.05


def test_interval_is_that_of_sorted_timestamps() -> None:
    """B-frames arrive in another order; one timestamp jumps."""
    assert estimate_interval_s([0, 3 / 15, 1 / 15, 2 / 15, 6 / 15, 4 / 15, 5 / 15, 100]) == pytest.approx(1 / 15)
    assert estimate_interval_s([5.0]) == estimate_interval_s([]) == 0


@pytest.mark.slow
def test_host_that_drops_requests_is_found_within_a_second(accept_connections: AcceptConnections) -> None:
    """A full queue drops requests like a host that is off. The system alone repeats one after 1 s and after 3 s."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = f"rtsp://127.0.0.1:{server.getsockname()[1]}/cam"
        waiting: list[socket.socket] = []
        with suppress(TimeoutError):
            waiting.extend(socket.create_connection(server.getsockname(), 0.2) for _ in range(9))
        with pytest.raises(UnavailableError, match=r"no answer from 127\.0\.0\.1 within 0\.3 s"):
            check_reachable(address, address, 0.3)
        timer = threading.Timer(1.2, accept_connections, (server, socket.socket.close))
        timer.daemon = True
        timer.start()
        start_s = time.monotonic()
        check_reachable(address, address, 5)
        assert 1 < time.monotonic() - start_s < 2.7
        for connection in waiting:
            connection.close()
        server.shutdown(socket.SHUT_RDWR)


def test_camera_that_never_answers_is_no_damaged_video() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # connections are accepted by the system
        address = f"rtsp://127.0.0.1:{server.getsockname()[1]}/cam"
        with pytest.raises(UnavailableError, match=r"no data within the time limit\. Check that the camera is on"):
            open_source(address, ReconnectPolicy(open_timeout_s=0.5)).__enter__()
