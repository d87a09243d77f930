"""`open_source`: the text a user gives after --source, to an open stream.

Where frames come from: a picture, a folder of pictures, a film, a webcam, a network camera.

with open_source("rtsp://camera/stream") as source:
    for frame_rgb, timestamp_s in source:
        ...
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hkd_deploy.streams.base import Frame, FrameSource
from hkd_deploy.streams.camera import CameraSource, ReconnectPolicy
from hkd_deploy.streams.files import IMAGE_SUFFIXES, ImageSource, VideoSource, list_images
from hkd_det.errors import DataError, UsageError

__all__ = ["Frame", "FrameSource", "open_source", "redact_url"]


URL_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")


@contextmanager
def open_source(text: str, reconnect_policy: ReconnectPolicy | None = None) -> Iterator[FrameSource]:
    """Open a picture, a folder of pictures, a film file, a webcam ("0") or an address (rtsp://..., http://...).

    An address is taken for a camera: live, and asked again when it falls silent; a film on a web
    server has to be fetched first.
    Raises UsageError for an unknown kind of address, DataError for a bad file, UnavailableError for
    a camera that gives no picture now.
    """
    source = _create_source(text, reconnect_policy or ReconnectPolicy())
    try:
        yield source
    finally:
        source.close()


def redact_url(address: str) -> str:
    """An address that may be shown: `rtsp://user:pass@host/x?key=1` to `rtsp://***@host/x?***`.

    All up to the last @ goes (passwords hold slashes and question marks), then the query (keys and tokens).
    """
    address = re.sub(r"^([A-Za-z][A-Za-z0-9+]+:/*).*@", r"\1***@", address)
    return re.sub(r"^([A-Za-z][A-Za-z0-9+]+://[^?]*)\?.*", r"\1?***", address)


def _create_source(text: str, reconnect_policy: ReconnectPolicy) -> FrameSource:
    if text.isascii() and text.isdigit():
        remedy = "is it plugged in (ls /dev/video*), and not in use by another program?"
        return CameraSource(int(text), f"camera {text}", remedy, reconnect_policy)
    if "://" in text:
        return _open_network_camera(text, reconnect_policy)
    path = Path(text)
    if path.is_dir():
        return ImageSource(text, list_images(path))
    if not path.exists():
        shown = redact_url(text)  # a mistyped address ends here as well
        raise DataError(f"{shown}: no such file or folder; --source takes a film, pictures, a webcam (0) or rtsp://...")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageSource(text, [path])
    return VideoSource(path)


def _open_network_camera(address: str, reconnect_policy: ReconnectPolicy) -> FrameSource:
    name = redact_url(address)
    if address.split("://", 1)[0].lower() not in URL_SCHEMES:
        raise UsageError(f"--source {name}: unknown kind of address; known: {', '.join(URL_SCHEMES)}")
    remedy = (
        "check that the camera is on and reachable (ping), the path, and user and password (rtsp://user:pass@host/...)"
    )
    return CameraSource(address, name, remedy, reconnect_policy)


__all__ = ["Frame", "FrameSource", "open_source"]
