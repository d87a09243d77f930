"""HTTP cameras that send JPEG images (`multipart/x-mixed-replace`), read with the standard library.

The format has no timestamps, and FFmpeg does not tell how long the bytes of an image took. Both are needed to see a
backlog: a connection that never pauses between images is slower than its camera, and images queue up on the way.
"""

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.streams.decoding import CPU, Hwaccel
from hkd_deploy.streams.failures import add_password_hint, check_reachable
from hkd_deploy.streams.live import CameraFrame, LoginError, ReconnectPolicy
from hkd_det.errors import UnavailableError
from hkd_det.image import decode_image

MULTIPART = "multipart/"
MAX_IMAGE_BYTES = 1 << 26
BUSY_RATIO = 0.35  # share of the time between two images in which bytes arrive; above it images may queue up
CATCH_UP_RATIO = 0.5  # images that come faster than this share of the interval were queued
MIN_SILENCE_S = 1.0
MAX_LAG_S = 2.0  # a longer queue is skipped by a new connection
INTERVAL_GAIN = 0.1
LOGIN_STATUSES = (401, 403)
FAILURES = {
    401: "the camera refuses user and password. Check them (http://user:password@host/...).",
    403: "the camera refuses user and password. Check them (http://user:password@host/...).",
    404: "the camera has no stream at this path. Check the path of the URL in the manual of the camera.",
}


class MjpegReader:
    """One camera that sends JPEG images over HTTP.

    Args:
        response: Response of the camera to the request of the URL.
        address: URL.
        name: The URL without credentials.
        policy: Timeouts.
        hwaccel: Hardware decoder that was requested; JPEG images are decoded on the CPU.

    Attributes:
        fps: None; the format does not state it.
        decoder: Empty, or `cpu` if a hardware decoder was requested.
    """

    def __init__(
        self,
        response: http.client.HTTPResponse,
        address: str,
        name: str,
        policy: ReconnectPolicy,
        hwaccel: Hwaccel | None = None,
    ) -> None:
        self._response, self._address, self._name, self._policy = response, address, name, policy
        self._interval_s: float | None = None  # between images, as the camera makes them
        self.fps: float | None = None
        self.decoder = CPU if hwaccel else ""
        self._lag_s = 0.0
        self._last_s: float | None = None
        self._is_first = True  # the last image was the first of its connection

    def read(self) -> CameraFrame:
        """Wait for the next image; see `CameraReader.read`."""
        if self._lag_s > MAX_LAG_S:
            self.close()
            self._response = open_http(self._address, self._name, self._policy.read_timeout_s)
            self._lag_s, self._last_s = 0.0, None
        try:
            start_s, encoded = self._read_part()
        except TimeoutError:
            raise UnavailableError(
                f"{self._name}: no data for {self._policy.read_timeout_s:g} s. Check that the camera is on and "
                "reachable."
            ) from None
        except (OSError, http.client.HTTPException, ValueError):
            raise UnavailableError(
                f"{self._name}: the connection was closed. Check the camera and the network."
            ) from None
        now_s = time.monotonic()
        self._update_lag(start_s, now_s)
        return CameraFrame(lambda: self._decode(encoded), min(start_s, now_s - self._lag_s))

    def close(self) -> None:
        """Close the connection."""
        self._response.close()

    def _read_part(self) -> tuple[float, bytes]:
        """Return when the first byte of the next image arrived, and its bytes."""
        line = self._response.readline(1 << 16)
        while line in (b"\r\n", b"\n"):
            line = self._response.readline(1 << 16)
        start_s, length = time.monotonic(), -1
        boundary = line.strip()
        if not boundary.startswith(b"--"):
            raise ValueError
        while (header := self._response.readline(1 << 16)).strip():
            key, _, value = header.partition(b":")
            if key.strip().lower() == b"content-length":
                length = int(value)
        if not 0 < length <= MAX_IMAGE_BYTES:
            return start_s, self._read_until_boundary(boundary)
        encoded = self._response.read(length)
        if len(encoded) < length:
            raise ValueError
        return start_s, encoded

    def _read_until_boundary(self, boundary: bytes) -> bytes:
        """Read an image whose length is not stated. The boundary of the next one is consumed."""
        data = bytearray()
        while not data.endswith(b"\r\n") or not (line := self._response.readline(1 << 16)).startswith(boundary):
            chunk = line if data.endswith(b"\r\n") else self._response.readline(1 << 16)
            if not chunk or len(data) > MAX_IMAGE_BYTES:
                raise ValueError
            data += chunk
        return bytes(data[:-2])

    def _update_lag(self, start_s: float, now_s: float) -> None:
        """Estimate the age of the image when it is complete, from the pauses between images.

        Where the next image had to be waited for, nothing is queued. Where its bytes took most of the time, or it came
        right after the last one, the queue grows or shrinks by the difference to the interval of the camera. After a
        long silence the image may be as old as the silence: either the line or the camera paused.
        """
        if self._last_s is None:
            self._lag_s = now_s - start_s
        else:
            interval_s, known_s = now_s - self._last_s, self._interval_s
            if self._is_first and now_s - start_s > BUSY_RATIO * interval_s:
                # The line is busy, and the first byte of the first image came late as well.
                self._lag_s = max(self._lag_s, interval_s)
            if known_s is not None and interval_s > max(MIN_SILENCE_S, 3 * known_s):
                self._lag_s = interval_s - known_s
            elif known_s is not None and (
                now_s - start_s > BUSY_RATIO * interval_s or interval_s < CATCH_UP_RATIO * known_s
            ):
                self._lag_s = max(0.0, self._lag_s + interval_s - known_s)
            elif now_s - start_s <= BUSY_RATIO * interval_s:
                self._lag_s = 0.0
                self._interval_s = interval_s if known_s is None else known_s + INTERVAL_GAIN * (interval_s - known_s)
        self._is_first, self._last_s = self._last_s is None, now_s

    def _decode(self, encoded: bytes) -> NDArray[np.uint8]:
        return decode_image(encoded, Path(self._name))


class _SingleLogin(urllib.request.BaseHandler):
    """Sends a password once. With Digest, the standard library sends it six times, which locks accounts of cameras."""

    def http_error_401(self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        """Send the request again with the password, unless it was sent with one."""
        fp.close()
        if req.has_header("Authorization"):
            return None
        return super().http_error_401(req, fp, code, msg, headers)  # type: ignore[misc]  # of the other base class


class _BasicLogin(_SingleLogin, urllib.request.HTTPBasicAuthHandler):
    """Basic authentication."""


class _DigestLogin(_SingleLogin, urllib.request.HTTPDigestAuthHandler):
    """Digest authentication."""


def open_http(address: str, name: str, timeout_s: float) -> http.client.HTTPResponse:
    """Request a URL, with Basic or Digest authentication if it contains user and password.

    Args:
        address: URL.
        name: The URL without credentials.
        timeout_s: Limit for connecting and for each read.

    Returns:
        The response, whose body has not been read.

    Raises:
        UnavailableError: The host is unreachable, or the server reports an error.
    """
    check_reachable(address, name, timeout_s)
    return send_request(address, name, timeout_s)


def send_request(address: str, name: str, timeout_s: float) -> http.client.HTTPResponse:
    """Request a URL of a host that is known to be reachable; see `open_http`."""
    url = urlsplit(address)
    bare = urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2]))
    handlers: list[urllib.request.BaseHandler] = []
    if url.username is not None:
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        passwords.add_password(None, bare, unquote(url.username), unquote(url.password or ""))
        handlers = [_BasicLogin(passwords), _DigestLogin(passwords)]
    try:
        response: http.client.HTTPResponse = urllib.request.build_opener(*handlers).open(bare, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        default = f"the server reports error {error.code}. Check the path of the URL, and restart the camera."
        message = f"{name}: {FAILURES.get(error.code, default)}"
        error_class = LoginError if error.code in LOGIN_STATUSES else UnavailableError
        raise error_class(add_password_hint(message, address)) from None
    except TimeoutError:
        raise UnavailableError(
            f"{name}: no answer within {timeout_s:g} s. Check that the camera is on and reachable."
        ) from None
    except (urllib.error.URLError, OSError, http.client.HTTPException, ValueError) as error:
        raise UnavailableError(
            f"{name}: the request failed ({type(error).__name__}). Check the URL, the camera and the network."
        ) from None
    return response


def sends_images(response: http.client.HTTPResponse) -> bool:
    """Return whether a response is a sequence of images.

    Args:
        response: Response of the camera.
    """
    return response.headers.get_content_type().startswith(MULTIPART)
