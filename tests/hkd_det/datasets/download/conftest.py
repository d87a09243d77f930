"""A web server on this machine that behaves as badly as it is told: for the tests of downloads."""

import hashlib
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hkd_det.datasets import download_file as fetch
from hkd_det.datasets.download_file import RemoteFile

CONTENT = random.Random(3).randbytes(300_000)


@dataclass
class Site:
    """What is served under every path, and how."""

    content: bytes = CONTENT
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    breaks: list[int] = field(default_factory=list)  # of the next answers: after how many bytes the line goes dead
    statuses: list[int] = field(default_factory=list)  # of the next answers, in the place of 200
    length: int | None = None  # what is said to come, where it is not the truth; 0: nothing is said
    redirect_to: str = ""
    asked: list[dict[str, str]] = field(default_factory=list)  # the headers of every request
    address: str = ""

    def file(self, **changes: Any) -> RemoteFile:
        known = {"sha256": hashlib.sha256(self.content).hexdigest(), "size_bytes": len(self.content)}
        return RemoteFile(f"{self.address}/data/set.zip", **{**known, **changes})

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = {key.lower(): value for key, value in handler.headers.items()}
        self.asked.append(asked)
        if self.redirect_to:
            handler.send_response(302)
            handler.send_header("Location", self.redirect_to)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            handler.send_error(status)
            return
        start, versions = 0, [self.headers.get("ETag"), self.headers.get("Last-Modified")]
        span = re.fullmatch(r"bytes=(\d+)-", asked.get("range", ""))
        if span and self.ranges and asked.get("if-range", versions[0]) in versions:
            start = int(span[1])
            if start >= len(self.content):
                handler.send_error(416)
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        else:
            handler.send_response(200)
        for key, value in self.headers.items():
            handler.send_header(key, value)
        length = len(self.content) - start if self.length is None else self.length
        if length:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        rest = self.content[start:]
        handler.wfile.write(rest[: self.breaks.pop(0)] if self.breaks else rest)
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def _serving(site: Site, host: str) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Whoever asked has had enough."""

    with Server((host, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        site.address = f"http://{host}:{server.server_port}"
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()


Serve = Callable[..., Site]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setenv("NO_PROXY", "*")
    with ExitStack() as stack:
        yield lambda host="127.0.0.1", **how: stack.enter_context(_serving(Site(**how), host))


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every pause that would have been made; none is made."""
    pauses: list[float] = []
    monkeypatch.setattr(fetch.download_file, "__defaults__", (pauses.append,))
    return pauses
