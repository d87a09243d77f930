"""Image sources: image files, directories, videos, webcams and network cameras.

Examples:
    >>> with open_source("rtsp://camera/stream") as source:
    ...     for image_rgb, timestamp_s in source:
    ...         print(timestamp_s, image_rgb.shape)
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hkd_deploy.streams.sources import CameraSource, Frame, FrameSource, ImageSource, ReconnectPolicy, list_images
from hkd_deploy.streams.video import VideoSource
from hkd_det.errors import DataError, UsageError
from hkd_det.image import IMAGE_SUFFIXES

__all__ = ["Frame", "FrameSource", "open_source", "redact_url"]

URL_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")


@contextmanager
def open_source(text: str, reconnect_policy: ReconnectPolicy | None = None) -> Iterator[FrameSource]:
    """Open an image source.

    A URL is treated as a live camera and reopened if the connection fails. Download a video from a web server first.

    Args:
        text: Path of an image, a directory of images or a video, index of a webcam (`0`), or URL of a network camera.
        reconnect_policy: Timeouts of a camera. None for the defaults.

    Yields:
        The opened source.

    Raises:
        UsageError: The URL scheme is not supported.
        DataError: The file is missing or damaged.
        UnavailableError: The camera returns no image.
    """
    source = _create_source(text, reconnect_policy or ReconnectPolicy())
    try:
        yield source
    finally:
        source.close()


def redact_url(address: str) -> str:
    """Remove credentials from a URL: `rtsp://user:pass@host/x?key=1` becomes `rtsp://***@host/x?***`.

    Args:
        address: A URL. Other text is returned unchanged.

    Returns:
        The URL without the text before the last @ (passwords can contain slashes and question marks) and without the
        query (it can contain keys and tokens).
    """
    address = re.sub(r"^([A-Za-z][A-Za-z0-9+]+:/*).*@", r"\1***@", address)
    return re.sub(r"^([A-Za-z][A-Za-z0-9+]+://[^?]*)\?.*", r"\1?***", address)


def _create_source(text: str, reconnect_policy: ReconnectPolicy) -> FrameSource:
    if text.isascii() and text.isdigit():
        hint = "Check that it is connected (ls /dev/video*) and not in use by another program."
        return CameraSource(int(text), f"camera {text}", hint, reconnect_policy)
    if "://" in text:
        return _open_network_camera(text, reconnect_policy)
    path = Path(text)
    if path.is_dir():
        return ImageSource(text, list_images(path))
    if not path.exists():
        name = redact_url(text)  # a mistyped URL can contain a password
        raise DataError(
            f"{name}: no such file or directory. --source expects a video, an image, a directory, a webcam (0) or "
            "rtsp://..."
        )
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageSource(text, [path])
    return VideoSource(path)


def _open_network_camera(address: str, reconnect_policy: ReconnectPolicy) -> FrameSource:
    name = redact_url(address)
    if address.split("://", 1)[0].lower() not in URL_SCHEMES:
        raise UsageError(f"--source {name}: unknown URL scheme. Supported schemes: {', '.join(URL_SCHEMES)}.")
    hint = (
        "Check that the camera is on and reachable (ping), and check the path, user and password "
        "(rtsp://user:pass@host/...)."
    )
    return CameraSource(address, name, hint, reconnect_policy)
