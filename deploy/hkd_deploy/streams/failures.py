"""Failures of network cameras: each has its own message, and no message contains a password."""

import re
import socket
import time
from types import ModuleType
from urllib.parse import urlsplit

from hkd_deploy.streams.live import LoginError
from hkd_det.errors import UnavailableError

DEFAULT_PORTS = {"rtsp": 554, "rtsps": 322, "rtmp": 1935, "http": 80, "https": 443}
PROBE_INTERVAL_S = 1.0  # a lost connection request is repeated by the system after 1, 3, 7 s


def check_reachable(address: str, name: str, timeout_s: float) -> None:
    """Connect to the host and port of a URL, because FFmpeg reports most failures of a connection alike.

    Args:
        address: URL. Schemes without a TCP connection are not checked.
        name: The URL without credentials.
        timeout_s: Limit.

    Raises:
        UnavailableError: The host is unknown or unreachable, or nothing listens at the port.
    """
    try:
        url = urlsplit(address)
        host, port = url.hostname, url.port or DEFAULT_PORTS.get(url.scheme.lower())
    except ValueError:
        raise UnavailableError(add_password_hint(f"{name}: not a valid URL. Check host and port.", address)) from None
    if not host or port is None:
        return
    try:
        _connect(host, port, timeout_s)
    except socket.gaierror:
        raise UnavailableError(add_password_hint(f"{name}: unknown host {host}. Check the name.", address)) from None
    except ConnectionRefusedError:
        raise UnavailableError(
            f"{name}: nothing listens at port {port}. Check the port, and that the camera is on."
        ) from None
    except TimeoutError:
        raise UnavailableError(
            f"{name}: no answer from {host} within {timeout_s:g} s. Check that the camera is on and reachable (ping)."
        ) from None
    except OSError as error:
        raise UnavailableError(
            f"{name}: host {host} is unreachable ({error.strerror}). Check the network and the address."
        ) from None


def _connect(host: str, port: int, timeout_s: float) -> None:
    """Connect and disconnect. New attempts are made, so that a host is found soon after it is back."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        remaining_s = deadline_s - time.monotonic()
        try:
            socket.create_connection((host, port), max(0.01, min(PROBE_INTERVAL_S, remaining_s))).close()
        except TimeoutError:
            if remaining_s <= PROBE_INTERVAL_S:
                raise
        else:
            return


def make_failure(av: ModuleType, error: Exception, name: str, address: str) -> UnavailableError:
    """Describe an error of FFmpeg without the URL, which it contains.

    Args:
        av: The module `av`.
        error: The error.
        name: The URL without credentials.
        address: URL; decides whether a password with special characters is explained.

    Returns:
        The error to raise: one line with the problem and the remedy.
    """
    if isinstance(error, (av.HTTPUnauthorizedError, av.HTTPForbiddenError)):
        message = f"{name}: the camera refuses user and password. Check them (rtsp://user:password@host/...)."
        return LoginError(add_password_hint(message, address))
    for classes, description in _list_failures(av):
        if isinstance(error, classes):
            return UnavailableError(f"{name}: {description}")
    return UnavailableError(
        f"{name}: the stream cannot be read ({type(error).__name__}). Check the camera and the URL."
    )


def _list_failures(av: ModuleType) -> list[tuple[tuple[type[Exception], ...], str]]:
    """Return classes of errors, the special ones first, with the problem and the remedy."""
    codec = "FFmpeg cannot decode the codec. Set the camera to H.264 or H.265."
    return [
        (
            (av.HTTPNotFoundError, av.HTTPBadRequestError),
            "the camera has no stream at this path. Check the path of the URL in the manual of the camera.",
        ),
        ((av.HTTPError,), "the server reports an error. Check the path of the URL, and restart the camera."),
        (
            (av.ExitError, TimeoutError),
            "no data within the time limit. Check that the camera is on and the network is fast enough.",
        ),
        ((ConnectionRefusedError,), "nothing listens at this port. Check the port, and that the camera is on."),
        ((av.DecoderNotFoundError,), codec),
        ((av.InvalidDataError, av.DemuxerNotFoundError), "not a video, or a damaged one. Check the path of the URL."),
        ((ConnectionError, EOFError), "the connection was closed. Check the camera and the network."),
    ]


def add_password_hint(message: str, address: str) -> str:
    """Add a hint to a message if the password of a URL seems to contain / ? # or @ that are not percent-encoded.

    Args:
        message: Sentences.
        address: URL.

    Returns:
        The message with or without the hint.
    """
    before, separator, _ = address.partition("://")[2].rpartition("@")
    if not (separator and re.search(r"[/?#@]", before)):
        return message
    return f"{message} In a password, write / as %2F, @ as %40, ? as %3F and # as %23."
