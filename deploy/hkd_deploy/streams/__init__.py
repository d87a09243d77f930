"""Image sources: image files, directories, videos, webcams, CSI cameras and network cameras.

Examples:
    >>> with open_source("rtsp://camera/stream") as source:
    ...     for image_rgb, timestamp_s in source:
    ...         print(timestamp_s, image_rgb.shape)
"""

import glob
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hkd_deploy.streams.csi import SCHEME as CSI_SCHEME
from hkd_deploy.streams.csi import open_csi, parse_csi_address
from hkd_deploy.streams.decoding import AUTO, Hwaccel, resolve_hwaccel
from hkd_deploy.streams.hls import open_hls
from hkd_deploy.streams.live import CameraReader, LiveSource, ReconnectPolicy, WebcamReader
from hkd_deploy.streams.mjpeg import MjpegReader, open_http, sends_images
from hkd_deploy.streams.network import StreamClock, StreamReader
from hkd_deploy.streams.sources import Frame, FrameSource, ImageSource, list_images
from hkd_deploy.streams.video import VideoSource
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.image import IMAGE_SUFFIXES

__all__ = [
    "Frame",
    "FrameSource",
    "Hwaccel",
    "LiveSource",
    "is_live_address",
    "open_source",
    "redact_url",
    "resolve_hwaccel",
]

SECRET_PART = re.compile(r"=|pass|pwd|token|secret|key|auth", re.IGNORECASE)
URL_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")


@contextmanager
def open_source(
    text: str,
    reconnect_policy: ReconnectPolicy | None = None,
    on_frame: Callable[[], object] | None = None,
    hwaccel: Hwaccel | None = None,
) -> Iterator[FrameSource]:
    """Open an image source.

    A URL is treated as a live camera and reopened if the connection fails. Download a video from a web server first.

    Args:
        text: Path of an image, a directory of images, a pattern (`*.jpg`, `**/*.png`) or a video, index of a webcam
            (`0`), CSI camera (`csi://0`), or URL of a network camera.
        reconnect_policy: Timeouts of a camera. None for the defaults.
        on_frame: Opens a camera in the background and is called after each frame; see `LiveSource`. None waits until
            the camera is open.
        hwaccel: Hardware decoder of network cameras, from `resolve_hwaccel`. None for the CPU.

    Yields:
        The opened source.

    Raises:
        UsageError: The URL scheme is not supported, or a hardware decoder is required for another source.
        DataError: The file is missing or damaged.
        UnavailableError: The camera returns no image.
    """
    source = _create_source(text, reconnect_policy or ReconnectPolicy(), on_frame, hwaccel)
    try:
        yield source
    finally:
        source.close()


def is_webcam(text: str) -> bool:
    """Return whether a source is the index of a webcam.

    Args:
        text: Source, as for `open_source`.
    """
    return text.isascii() and text.isdigit()


def is_live_address(text: str) -> bool:
    """Return whether a source is a camera, which has no end.

    Args:
        text: Source, as for `open_source`.
    """
    return is_webcam(text) or "://" in text


def redact_url(address: str) -> str:
    """Remove credentials from a URL: `rtsp://user:pass@host/x?key=1` becomes `rtsp://***@host/x?***`.

    Control characters are escaped, so that a name cannot change the terminal or forge a line of a log.

    Args:
        address: A URL. Other text is only escaped.

    Returns:
        The URL without the text before the last @ (passwords can contain slashes and question marks), the query, the
        fragment, and parts of the path that set a value or name a secret (`/user=admin_password=...`).
    """
    address = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in address)
    scheme, separator, rest = address.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):
        return re.sub(r"^([A-Za-z][A-Za-z0-9+]+:/*).*@", r"\1***@", address)
    _, at_sign, rest = rest.rpartition("@")
    rest, tail = re.match(r"([^?#]*)([?#]?)", rest).groups()  # type: ignore[union-attr]  # always matches
    host, *path = rest.split("/")
    path = ["***" if SECRET_PART.search(part) else part for part in path]
    return f"{scheme}://{'***@' if at_sign else ''}{'/'.join([host, *path])}{f'{tail}***' if tail else ''}"


def _create_source(
    text: str, reconnect_policy: ReconnectPolicy, on_frame: Callable[[], object] | None, hwaccel: Hwaccel | None
) -> FrameSource:
    if hwaccel and hwaccel.is_required and "://" not in text:
        raise UsageError(
            f"--source {redact_url(text)}: expected a network camera with --hwaccel {hwaccel.kind}. Files and webcams "
            f"are decoded on the CPU; use --hwaccel {AUTO} if there are both."
        )
    if is_webcam(text):
        return LiveSource(f"camera {text}", partial(WebcamReader, int(text)), reconnect_policy, on_frame)
    if "://" in text:
        return _open_network_camera(text, reconnect_policy, on_frame, hwaccel)
    path = Path(text)
    if path.is_dir():
        return ImageSource(text, list_images(path))
    if not path.exists() and glob.has_magic(text):
        return _open_pattern(text)
    if not path.exists():
        name = redact_url(text)  # a mistyped URL can contain a password
        raise DataError(
            f"{name}: no such file or directory. --source expects a video, an image, a directory, a webcam (0) or "
            "rtsp://..."
        )
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageSource(text, [path])
    return VideoSource(path)


def _open_pattern(pattern: str) -> FrameSource:
    """Return the images that match a pattern, sorted by name, or the only video."""
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob rejects absolute patterns
    paths = [path for path in map(Path, sorted(found)) if path.is_file()]
    others = [path for path in paths if path.suffix.lower() not in IMAGE_SUFFIXES]
    if len(paths) == len(others) == 1:
        return VideoSource(paths[0])
    if not paths:
        raise DataError(f"{pattern}: no file matches this pattern. Check the path.")
    if others:
        raise UsageError(
            f"--source {pattern}: {len(others)} of {len(paths)} files that match are no images, such as "
            f"{others[0].name}. Match images only, or one video; repeat --source for several videos."
        )
    return ImageSource(pattern, paths)


def _open_network_camera(
    address: str, policy: ReconnectPolicy, on_frame: Callable[[], object] | None, hwaccel: Hwaccel | None
) -> FrameSource:
    name, scheme = redact_url(address), address.split("://", 1)[0].lower()
    if scheme == CSI_SCHEME:
        parse_csi_address(address)  # an invalid address is an error of the user, not of the camera
        return LiveSource(name, partial(open_csi, address, policy), policy, on_frame)
    if scheme not in URL_SCHEMES:
        supported = ", ".join((*URL_SCHEMES, CSI_SCHEME))
        raise UsageError(f"--source {name}: unknown URL scheme. Supported schemes: {supported}.")

    clock = StreamClock()

    def open_reader() -> CameraReader:
        if scheme in ("http", "https"):
            response = open_http(address, name, policy.open_timeout_s)
            if sends_images(response):
                if hwaccel and hwaccel.is_required:
                    response.close()
                    raise UnavailableError(
                        f"{name}: the camera sends JPEG images, which {hwaccel.kind} does not decode here. Set the "
                        f"camera to H.264 or H.265, or use --hwaccel {AUTO}."
                    )
                return MjpegReader(response, address, name, policy, hwaccel)
            kind = response.headers.get_content_type()
            reader = open_hls(response, address, name, policy, clock, hwaccel)
            response.close()
            if reader is not None:
                return reader
            if kind == "text/html":
                raise UnavailableError(f"{name}: not a video, but a web page. Check the path of the URL.")
        return StreamReader(address, name, policy, clock, hwaccel)

    return LiveSource(name, open_reader, policy, on_frame)
