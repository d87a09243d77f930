"""`open_source`: the text a user gives after --source, to an open stream."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hkd_deploy.streams.frames import Frame, FrameSource
from hkd_deploy.streams.live import LiveSource, Patience
from hkd_deploy.streams.recorded import PICTURE_SUFFIXES, Film, Pictures, pictures_in
from hkd_det.errors import DataError, UsageError

__all__ = ["Frame", "FrameSource", "open_source", "without_password"]

NETWORK = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")


@contextmanager
def open_source(text: str, patience: Patience | None = None) -> Iterator[FrameSource]:
    """Open a picture, a folder of pictures, a film file, a webcam ("0") or an address (rtsp://..., http://...).

    An address is taken for a camera: live, and asked again when it falls silent; a film on a web
    server has to be fetched first.
    Raises UsageError for an unknown kind of address, DataError for a bad file, UnavailableError for
    a camera that gives no picture now.
    """
    source = _opened(text, patience or Patience())
    try:
        yield source
    finally:
        source.close()


def without_password(address: str) -> str:
    """An address that may be shown: `rtsp://user:pass@host/x?key=1` to `rtsp://***@host/x?***`.

    All up to the last @ goes (passwords hold slashes and question marks), then the query (keys and tokens).
    """
    address = re.sub(r"^([A-Za-z][A-Za-z0-9+]+:/*).*@", r"\1***@", address)
    return re.sub(r"^([A-Za-z][A-Za-z0-9+]+://[^?]*)\?.*", r"\1?***", address)


def _opened(text: str, patience: Patience) -> FrameSource:
    if text.isascii() and text.isdigit():
        remedy = "is it plugged in (ls /dev/video*), and not in use by another program?"
        return LiveSource(int(text), f"camera {text}", remedy, patience)
    if "://" in text:
        return _network(text, patience)
    path = Path(text)
    if path.is_dir():
        return Pictures(text, pictures_in(path))
    if not path.exists():
        shown = without_password(text)  # a mistyped address ends here as well
        raise DataError(f"{shown}: no such file or folder; --source takes a film, pictures, a webcam (0) or rtsp://...")
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return Pictures(text, [path])
    return Film(path)


def _network(address: str, patience: Patience) -> FrameSource:
    name = without_password(address)
    if address.split("://", 1)[0].lower() not in NETWORK:
        raise UsageError(f"--source {name}: unknown kind of address; known: {', '.join(NETWORK)}")
    remedy = (
        "check that the camera is on and reachable (ping), the path, and user and password (rtsp://user:pass@host/...)"
    )
    return LiveSource(address, name, remedy, patience)
