"""Fixtures of the download tests: a local web server with configurable failures."""

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

from hkd_det.datasets import download as module
from hkd_det.datasets.download import RemoteFile

CONTENT = random.Random(3).randbytes(300_000)


@dataclass
class Site:
    """Content and behavior of the server, the same for every path."""

    content: bytes = CONTENT
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    breaks: list[int] = field(default_factory=list)  # number of bytes after which each of the next responses ends
    statuses: list[int] = field(default_factory=list)  # status of each of the next responses
    length: int | None = None  # wrong Content-Length; 0 omits the header
    redirect_to: str = ""
    requests: list[dict[str, str]] = field(default_factory=list)  # headers of every request
    address: str = ""

    def file(self, **changes: Any) -> RemoteFile:
        values = {"sha256": hashlib.sha256(self.content).hexdigest(), "size_bytes": len(self.content)}
        return RemoteFile(f"{self.address}/data/set.zip", **{**values, **changes})

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {key.lower(): value for key, value in handler.headers.items()}
        self.requests.append(headers)
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
        match = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        if match and self.ranges and headers.get("if-range", versions[0]) in versions:
            start = int(match[1])
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
def _run_server(site: Site, host: str) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.respond(self)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Ignore clients that close the connection."""

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
        yield lambda host="127.0.0.1", **options: stack.enter_context(_run_server(Site(**options), host))


@pytest.fixture(autouse=True)
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the duration of every pause instead of waiting."""
    durations: list[float] = []
    monkeypatch.setattr(module.download_file, "__defaults__", (durations.append,))
    return durations
