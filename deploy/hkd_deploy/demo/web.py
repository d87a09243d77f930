"""The page of `hkd-demo --web`: flags, the output of the run, and the thread of the server."""

import argparse
import asyncio
import ipaddress
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from hkd_deploy.demo.analytics import replace_analytics
from hkd_deploy.demo.base import FrameResult
from hkd_deploy.demo.camera_file import parse_scene, write_scene
from hkd_deploy.demo.cameras import CameraConfig
from hkd_deploy.demo.delivery import Report
from hkd_deploy.demo.progress import print_message
from hkd_deploy.demo.run import CameraPipeline
from hkd_deploy.demo.web_views import CameraView
from hkd_det.errors import HkdError, UsageError, import_package

DEFAULT_PORT = 8090
DEFAULT_HOST = "127.0.0.1"
INSTALL_HINT = "--web requires it. Run pip install 'hkd-det[web]'."
MAX_CONNECTIONS = 200
LOWEST_PRIORITY = 19  # nice value
STOP_TIMEOUT_S = 1  # open connections are closed after this time
# An address of documentation (RFC 5737). Connecting a UDP socket sends nothing and selects the network interface.
OUTSIDE_ADDRESS = ("192.0.2.1", 9)


def add_web_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags.

    Args:
        parser: Parser of hkd-demo.
    """
    group = parser.add_argument_group("page")
    group.add_argument(
        "--web",
        nargs="?",
        const=DEFAULT_PORT,
        type=_parse_port,
        metavar="PORT",
        help=f"serve a page with live images, counts and statistics (default port: {DEFAULT_PORT}); recorded sources "
        "then run in real time",
    )
    group.add_argument(
        "--host",
        metavar="ADDRESS",
        help=f"address of this machine at which --web listens (default: {DEFAULT_HOST}); 0.0.0.0 for all. Others than "
        "this machine need the token of the printed URL",
    )


def check_web_flags(flags: argparse.Namespace) -> None:
    """Check that the flags fit together.

    Args:
        flags: Parsed flags.

    Raises:
        UsageError: `--host` without `--web`.
    """
    if flags.host is not None and flags.web is None:
        raise UsageError("--host: requires --web. Add it, or omit --host.")


class WebSink:
    """Serves the page. It is a `FrameSink`, and a `FrameWindow`, so that recorded sources run in real time.

    The thread of the detector only replaces the newest frame. The thread of the server encodes it if a viewer asks for
    it, once for all viewers; a slow viewer receives fewer frames.

    Args:
        cameras: The cameras.
        pipelines: List that is filled with the pipelines later, in the same order.
        port: Port; 0 for any free one.
        host: Address or name of this machine.
        camera_file: File of `--cameras`, in which the page saves lines and zones. None without such a file.
        report: Called with one line if they cannot be saved.
        describe_drift: Returns the drift of a camera; see `DriftMonitor.describe`. None without `--monitor`.

    Attributes:
        url: Address of the page, with the token if there is one.
        file_lock: Held while lines and zones are written to the file and set.

    Raises:
        UsageError: The port or the host cannot be used.
        UnavailableError: A package of the extra `web` is not installed.
    """

    def __init__(
        self,
        cameras: Sequence[CameraConfig],
        pipelines: Sequence[CameraPipeline],
        port: int,
        host: str | None = None,
        camera_file: Path | None = None,
        report: Report = print_message,
        describe_drift: Callable[[str], dict[str, Any] | None] | None = None,
    ) -> None:
        import_package("starlette", hint=INSTALL_HINT)
        uvicorn = import_package("uvicorn", hint=INSTALL_HINT)
        web_app = import_package("hkd_deploy.demo.web_app", hint=INSTALL_HINT)
        self._views = {camera.name: CameraView(camera, number) for number, camera in enumerate(cameras, 1)}
        self._view_list = list(self._views.values())
        self._pipelines, self._camera_file, self.file_lock = pipelines, camera_file, Lock()
        self._report = report
        self._socket = _listen(host or DEFAULT_HOST, port)
        address, self.port = self._socket.getsockname()[:2]
        token = None if ipaddress.ip_address(address.partition("%")[0]).is_loopback else secrets.token_urlsafe(32)
        self.url = _make_url(address, self.port, token)
        self._signal = web_app.FrameSignal()
        policy = web_app.AccessPolicy(token, f"hkd_demo_{self.port}", host or DEFAULT_HOST)
        save_scene = self._save_scene if camera_file else None
        app = web_app.make_app(self._view_list, pipelines, self._signal, policy, save_scene, describe_drift)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=STOP_TIMEOUT_S,
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=lambda: asyncio.run(self._serve()), name="web", daemon=True)
        self._thread.start()

    async def _serve(self) -> None:
        if sys.platform == "linux":
            # Linux applies it to this thread only. A viewer must not delay the detector, which may use all cores.
            os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY)
        self._signal.start()
        await self._server.serve(sockets=[self._socket])
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # of a viewer that does not read
        await asyncio.sleep(0)

    def write(self, result: FrameResult) -> None:
        """Replace the newest frame of the camera; see `FrameSink.write`."""
        self._views[result.camera].add(result)
        self._signal.notify()

    def write_status(self, camera: str, status: str) -> None:
        """Show a status; see `FrameSink.write_status`."""
        self._views[camera].set_status(status)

    def set_camera(self, camera: CameraConfig) -> None:
        """Replace the settings of a camera, or add one, whose pipeline is then the last one.

        Args:
            camera: The camera. Its privacy is that of the run if it has none.
        """
        if view := self._views.get(camera.name):
            view.set_camera(camera)
            return
        view = CameraView(camera, len(self._view_list) + 1)
        self._views[camera.name] = view
        self._view_list.append(view)

    def is_open(self, wait_ms: int = 1) -> bool:
        """Wait for `wait_ms` if it is more than 1 ms.

        Args:
            wait_ms: Time until the next recorded frame.

        Returns:
            True: a page does not end the run.
        """
        if wait_ms > 1:
            time.sleep(wait_ms / 1e3)
        return True

    def close(self) -> None:
        """Stop the server, within about a second also if a viewer does not read."""
        self._server.should_exit = True
        self._signal.close()
        self._thread.join(STOP_TIMEOUT_S + 0.5)
        self._socket.close()

    def _save_scene(self, index: int, content: Any) -> bool:
        """Save lines and zones of a camera and count with them. Return False if its run did not begin."""
        assert self._camera_file is not None
        name = list(self._views)[index]
        lines, zones = parse_scene(content)
        with self.file_lock:
            pipeline = self._pipelines[index] if index < len(self._pipelines) else None
            analytics = replace_analytics(pipeline, lines, zones) if pipeline else None  # first, because it can fail
            try:
                write_scene(self._camera_file, name, lines, zones)
            except (HkdError, OSError) as error:
                self._report(f"--web: lines and zones are not saved: {error}", name, "error")
                raise
            if pipeline and analytics:
                pipeline.set_scene(*analytics, lines, zones)
            self._views[name].set_scene(lines, zones)
        return pipeline is not None


def _parse_port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port, got {text!r}. Write the model before --web.")
    return int(text)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror:
        raise UsageError(f"--host {host}: unknown host. Use an address of this machine, or 0.0.0.0 for all.") from None
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--web {port}: cannot listen on {host}: {reason}. Choose another port or --host.") from None


def _make_url(address: str, port: int, token: str | None) -> str:
    if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
        address = _find_own_address()
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}/{f'?token={token}' if token else ''}"


def _find_own_address() -> str:
    """Return the address of this machine in its network, or its name without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(OUTSIDE_ADDRESS)
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
