"""`camera`: a network camera on this machine, MJPEG over HTTP, that can be switched off, on, and made to hang."""

import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest

SIZE_HW = (64, 96)


def jpeg_of(number: int) -> bytes:
    """Frame `number`, told by its grey level: 20, 21, ... 219, again 20."""
    picture = np.full((*SIZE_HW, 3), 20 + number % 200, np.uint8)
    return bytes(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 100])[1])


class Camera:
    """`address` to open; `off()`, `on()`; `hang()` keeps the line open and sends nothing more."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.hangs = False
        self.connections = 0
        self.sent = 0
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.on()
        self.address = f"http://127.0.0.1:{self._port}/video.mjpg"

    def on(self) -> None:
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera.connections += 1
                with suppress(OSError):
                    camera.stream(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Not into the test's output."""

        self.hangs = False
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stream(self, handler: BaseHTTPRequestHandler) -> None:
        server = self._server
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        handler.end_headers()
        while self._server is server:
            if not self.hangs:
                picture = jpeg_of(self.sent)
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                handler.wfile.write(head.encode() + picture + b"\r\n")
                self.sent += 1
            time.sleep(1 / self.fps)
        handler.connection.shutdown(2)

    def on_again(self) -> None:
        self.hangs = False

    def hang(self) -> None:
        self.hangs = True

    def off(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            socketserver.TCPServer.server_close(server)


@pytest.fixture
def camera() -> Iterator[Camera]:
    """A camera of 100 frames a second."""
    running = Camera(fps=100)
    yield running
    running.off()
