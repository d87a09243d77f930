"""Routes and access control of the page of `hkd-demo --web`. Requires the extra `web`."""

import asyncio
import ipaddress
import json
import secrets
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hkd_deploy.demo.run import CameraPipeline
from hkd_deploy.demo.web_views import CameraView, read_power_w, read_temperature_c
from hkd_det.errors import HkdError, UnavailableError, UsageError

PAGE_DIRECTORY = Path(__file__).parent / "page"
CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
MAX_RESPONSES_PER_S = 50  # with frames, to all viewers together; one takes about 2 ms
WAIT_S = 10.0  # a request for new frames returns without one after this time
MAX_BODY_BYTES = 2**16
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# A cookie with SameSite=Strict is not sent after a redirect from another site, but it is sent after this refresh.
LOGIN_PAGE = '<!doctype html><meta http-equiv="refresh" content="0; url=/"><title>hkd-demo</title>'
DescribeDrift = Callable[[str], dict[str, Any] | None]  # name of the camera: fields of its last event `drift`
SaveScene = Callable[[int, Any], bool]  # index of the camera, content of the request: whether it is in effect


class FrameSignal:
    """Wakes requests that wait for a frame. `notify` may be called by any thread and returns at once."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        self._num_waiting = 0
        self._is_closed = False

    def start(self) -> None:
        """Use the running event loop."""
        self._loop = asyncio.get_running_loop()

    def notify(self) -> None:
        """Wake all requests. Without one, nothing happens."""
        if self._num_waiting and self._loop:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        """End all requests that wait, now and later."""
        self._is_closed = True
        self.notify()

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait until a condition is true.

        Args:
            condition: Checked at the start and after each frame.
            timeout_s: Longest time.
        """
        self._num_waiting += 1  # before the condition is checked, so that no frame is missed
        with suppress(asyncio.TimeoutError):
            try:
                end_s = time.monotonic() + timeout_s
                while not condition() and not self._is_closed:
                    await asyncio.wait_for(self._event.wait(), max(0.0, end_s - time.monotonic()))
            finally:
                self._num_waiting -= 1

    def _wake(self) -> None:
        self._event.set()
        self._event = asyncio.Event()


class RateLimit:
    """Limits the responses to all viewers, so that many viewers do not take the processor from the detector.

    Viewers that wait have their turn at the same time, so that an image is encoded once for all of them. The next turn
    is the later, the more responses the last one had.

    Args:
        per_s: Maximum number of responses per second on average.
    """

    def __init__(self, per_s: float) -> None:
        self._interval_s = 1 / per_s
        self._turn_s, self._num_responses = 0.0, 0

    async def wait(self) -> None:
        """Wait for the turn of a response."""
        now_s = time.monotonic()
        if now_s > self._turn_s:
            self._turn_s = max(now_s, self._turn_s + self._num_responses * self._interval_s)
            self._num_responses = 0
        self._num_responses += 1
        await asyncio.sleep(self._turn_s - now_s)


@dataclass(frozen=True)
class AccessPolicy:
    """Who may use the page.

    Attributes:
        token: Secret of the printed URL. None for a page that only this machine can open.
        cookie: Name of the cookie. It contains the port, because cookies are valid for all ports of a host.
        host: Value of --host.
    """

    token: str | None
    cookie: str
    host: str

    def check(self, request: Request) -> Response | None:
        """Check a request.

        Args:
            request: The request.

        Returns:
            The response to a request that is refused, or that logs in. None for a request that is allowed.
        """
        host = request.headers.get("host", "")
        if not self._is_known_host(host):
            return PlainTextResponse("Unknown host name. Use the printed address, or an IP address.", 403)
        if self.token is not None:
            if request.url.path == "/" and "token" in request.query_params:
                return self._log_in(request.query_params["token"], self.token)
            if not _is_equal(request.cookies.get(self.cookie, ""), self.token):
                return PlainTextResponse("Open the address with ?token= that hkd-demo printed at its start.", 401)
        if request.method not in ("GET", "HEAD") and urlsplit(request.headers.get("origin", "")).netloc != host:
            return PlainTextResponse("The request is from another site.", 403)
        return None

    def _log_in(self, given: str, token: str) -> Response:
        if not _is_equal(given, token):
            return PlainTextResponse("Wrong token. Open the address that hkd-demo printed at its start.", 401)
        response = HTMLResponse(LOGIN_PAGE)
        response.set_cookie(self.cookie, token, httponly=True, samesite="strict")
        return response

    def _is_known_host(self, host: str) -> bool:
        """Return whether it is an IP address or a name of this machine. DNS rebinding needs another name."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            urlsplit(f"//{host}").port  # noqa: B018 - raises ValueError
        except ValueError:
            return False
        with suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        machine = socket.gethostname().lower()
        return name in ("localhost", self.host.lower(), machine, f"{machine}.local")


class AccessControl:
    """Middleware that applies an `AccessPolicy` and adds headers to each response.

    Args:
        app: The application.
        policy: The policy.
    """

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Process a request."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        refusal = self._policy.check(Request(scope))
        await (refusal or self._app)(scope, receive, send_with_headers)


def make_app(
    views: Sequence[CameraView],
    pipelines: Sequence[CameraPipeline],
    signal: FrameSignal,
    policy: AccessPolicy,
    save_scene: SaveScene | None,
    describe_drift: DescribeDrift | None,
) -> AccessControl:
    """Create the application.

    Args:
        views: The cameras. The list can grow.
        pipelines: List that is filled with the pipelines later, in the order of `views`.
        signal: Wakes requests when there is a new frame.
        policy: Who may use the page.
        save_scene: Saves lines and zones; called in another thread. None if they cannot be saved.
        describe_drift: Returns the drift of a camera. None without `--monitor`.
    """

    rate_limit = RateLimit(MAX_RESPONSES_PER_S)

    async def get_state(request: Request) -> Response:
        since = _parse_int(request.query_params.get("since", ""))
        shown = list(views)  # a reload may add one
        states = [
            view.describe(pipelines[index] if index < len(pipelines) else None, since)
            for index, view in enumerate(shown)
        ]
        if describe_drift:
            for view, camera in zip(shown, states, strict=True):
                camera["drift"] = describe_drift(view.camera_name) or {"state": "waiting"}
        device = {"temperature_c": read_temperature_c(), "power_w": read_power_w()}
        state = {"time": int(time.time()), "cameras": states, "can_save": save_scene is not None}
        return JSONResponse(state | device)

    async def get_frames(request: Request) -> Response:
        after = parse_positions(request.query_params.get("after", ""), len(views))
        await signal.wait_for(lambda: any(views[index].seq != seq for index, seq in after.items()), WAIT_S)
        await rate_limit.wait()  # then the frames are the newest
        return Response(pack_frames(views, after), media_type="application/octet-stream")

    async def post_scene(request: Request) -> Response:
        index = request.path_params["index"]
        if save_scene is None or index >= len(views):
            return JSONResponse({"error": "Lines and zones can be saved with --cameras FILE only."}, 409)
        content = await _read_json(request)
        if isinstance(content, Response):
            return content
        try:
            is_active = await run_in_threadpool(save_scene, index, content)
        except (UsageError, UnavailableError) as error:
            return JSONResponse({"error": views[index].hide_address(str(error))}, 400)
        except (HkdError, OSError):
            return JSONResponse({"error": "The file of --cameras cannot be changed. See the log of hkd-demo."}, 500)
        return JSONResponse({"is_active": is_active})

    routes = [
        Route("/state", get_state),
        Route("/frames", get_frames),
        Route("/cameras/{index:int}/scene", post_scene, methods=["POST"]),
        Route("/favicon.ico", _make_file_route(b"", "image/x-icon")),
    ]
    for path in sorted(PAGE_DIRECTORY.iterdir()):  # read once: no path of a request reaches the file system
        route = "/" if path.name == "index.html" else f"/{path.name}"
        if path.suffix in CONTENT_TYPES:
            routes.append(Route(route, _make_file_route(path.read_bytes(), CONTENT_TYPES[path.suffix])))
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    return AccessControl(app, policy)


def parse_positions(text: str, num_cameras: int) -> dict[int, int]:
    """Parse the parameter `after` of a request for frames.

    Args:
        text: `CAMERA:SEQ,CAMERA:SEQ`. Invalid parts have no effect.
        num_cameras: Number of cameras.

    Returns:
        Newest frame that the viewer has, by index of the camera.
    """
    positions = {}
    for part in text.split(",")[:num_cameras]:
        camera, _, seq = part.partition(":")
        if camera.isascii() and camera.isdigit() and len(camera) < 5 and int(camera) < num_cameras:
            positions[int(camera)] = _parse_int(seq)
    return positions


def pack_frames(views: Sequence[CameraView], after: dict[int, int]) -> bytes:
    """Pack the frames that a viewer does not have.

    Args:
        views: The cameras.
        after: Newest frame that the viewer has, by index of the camera.

    Returns:
        Length of the JSON (uint32, big endian), the JSON (a list with `camera`, `bytes` and the properties of each
        frame), and the JPEGs in the same order.
    """
    headers, images = [], []
    for index, seq in after.items():
        if views[index].seq != seq:
            properties, image = views[index].encode()
            if image:
                headers.append({"camera": index, "bytes": len(image), **properties})
                images.append(image)
    header = json.dumps(headers).encode()
    return struct.pack(">I", len(header)) + header + b"".join(images)


async def _read_json(request: Request) -> Any:
    """Return the body of a request, or the response to an invalid one."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return JSONResponse({"error": "Expected JSON."}, 415)
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return JSONResponse({"error": "Too many lines and zones."}, 413)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return JSONResponse({"error": "Expected JSON."}, 400)


def _make_file_route(content: bytes, content_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def get_file(_: Request) -> Response:
        return Response(content, media_type=content_type)

    return get_file


def _is_equal(given: str, secret: str) -> bool:
    """Compare in a time that does not depend on the values."""
    return secrets.compare_digest(given.encode(), secret.encode())


def _parse_int(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
