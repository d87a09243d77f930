"""Cameras that refuse the password: a server on this machine counts the logins, as cameras that lock accounts do."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from hkd_deploy.streams import open_source
from hkd_deploy.streams.live import LiveSource, LoginError, ReconnectPolicy
from hkd_det.errors import UnavailableError

AcceptConnections = Callable[[socket.socket, Callable[[socket.socket], object]], None]  # of conftest.py
POLICY = ReconnectPolicy(open_timeout_s=2, read_timeout_s=2, retry_s=0.02, login_retry_s=0.5, max_login_retry_s=1.0)
DIGEST = 'Digest realm="camera", nonce="{nonce}", algorithm=MD5, qop="auth"'
SCHEMES = {
    "basic": 'Basic realm="camera"',
    "digest": DIGEST,
    "both": DIGEST + '\r\nWWW-Authenticate: Basic realm="camera"',
}


class LockedCamera:
    """Refuses each login with `status` over HTTP and RTSP. `logins_s` has the time of each request with a password."""

    def __init__(self, accept_connections: AcceptConnections) -> None:
        self.scheme, self.status = "basic", "401 Unauthorized"
        self.logins_s: list[float] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        accept_connections(self._server, self._serve)

    def close(self) -> None:
        self._server.close()

    def _serve(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            while request := lines.readline().decode():
                headers = {}
                while (line := lines.readline().decode().strip()) != "":
                    key, _, value = line.partition(":")
                    headers[key.lower()] = value.strip()
                method, protocol = request.split()[0], request.split()[2]
                if "authorization" in headers:
                    self.logins_s.append(time.monotonic())
                challenge = SCHEMES[self.scheme].format(nonce=time.monotonic_ns())
                head = f"{protocol} {self.status}\r\nWWW-Authenticate: {challenge}\r\nContent-Length: 0\r\n"
                if method == "OPTIONS":
                    head = f"{protocol} 200 OK\r\nPublic: DESCRIBE, SETUP, PLAY\r\n"
                connection.sendall(f"{head}CSeq: {headers.get('cseq', 1)}\r\n\r\n".encode())


@pytest.fixture
def locked_camera(accept_connections: AcceptConnections) -> Iterator[LockedCamera]:
    camera = LockedCamera(accept_connections)
    yield camera
    camera.close()


def watch_in_background(address: str, seconds: float) -> LiveSource:
    """Open a camera as hkd-demo does, and return its closed source."""
    with open_source(address, POLICY, on_frame=lambda: None) as source:
        assert isinstance(source, LiveSource)
        time.sleep(seconds)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 0.5
    return source


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("url", ["rtsp://u:wr0ng@127.0.0.1:{}/cam", "http://u:wr0ng@127.0.0.1:{}/live.m3u8"])
@pytest.mark.slow
def test_refused_login_is_repeated_rarely(locked_camera: LockedCamera, url: str, scheme: str) -> None:
    """HTTP is the same for MJPEG and HLS: the type of the stream is known after the login."""
    if url.startswith("rtsp"):
        pytest.importorskip("av")
    locked_camera.scheme = scheme
    source = watch_in_background(url.format(locked_camera.port), 2)
    logins_s = [login_s - locked_camera.logins_s[0] for login_s in locked_camera.logins_s]
    assert logins_s == pytest.approx([0, 0.5, 1.5], abs=0.25)  # one per opening, after 0.5 s and 1 s
    assert isinstance(source.open_error, LoginError)
    assert "the camera refuses user and password. Check them" in source.status
    assert source.status.endswith("Next attempt in 1 s.")
    assert "wr0ng" not in source.status


def test_forbidden_is_a_refused_login(locked_camera: LockedCamera) -> None:
    locked_camera.status = "403 Forbidden"
    with pytest.raises(LoginError):
        open_source(f"http://127.0.0.1:{locked_camera.port}/cam", POLICY).__enter__()


def test_other_failures_are_repeated_soon(locked_camera: LockedCamera) -> None:
    locked_camera.status = "404 Not Found"
    with pytest.raises(UnavailableError) as caught:
        open_source(f"http://u:p@127.0.0.1:{locked_camera.port}/cam", POLICY).__enter__()
    assert not isinstance(caught.value, LoginError)
    source = watch_in_background(f"http://u:p@127.0.0.1:{locked_camera.port}/cam", 0.5)
    assert source.status and "Next attempt" not in source.status


def test_delays_of_refused_logins_are_long() -> None:
    """Cameras lock an account after three to ten wrong passwords in a few minutes."""
    policy, delays_s = ReconnectPolicy(), []
    source = LiveSource("camera", refuse_login, policy, lambda: None)
    source.stop()
    source._thread.join(2)
    source._num_refused = 0
    delays_s = [source._count_refused_login() for _ in range(30)]
    assert delays_s[:4] == [10, 20, 40, 60]
    assert set(delays_s[4:]) == {60}


def refuse_login() -> None:
    raise LoginError("camera: the camera refuses user and password. Check them.")


def test_changed_password_of_mjpeg_camera_is_tried_rarely(make_camera: Callable[..., object]) -> None:
    """An image ends the series: the next refusal is followed by the short delay again."""
    camera = make_camera(50)
    camera.login = ("u", "p")
    address = camera.address.replace("://", "://u:p@")
    frames = threading.Event()
    with open_source(address, POLICY, on_frame=frames.set) as source:
        for _ in range(2):
            assert frames.wait(3)
            camera.login = ("u", "changed")
            camera.off()
            camera.on()
            deadline_s = time.monotonic() + 3
            while not source.status.endswith("Next attempt in 0.5 s.") and time.monotonic() < deadline_s:
                time.sleep(0.005)
            assert source.status.endswith("Next attempt in 0.5 s.")
            camera.login = ("u", "p")
            frames.clear()
