"""Writers of Caltech `.vbb` and `.seq` files, equivalent to those of Piotr's toolbox."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import scipy.io
from numpy.typing import NDArray

ID, POS, POSV, OCCL = "id", "pos", "posv", "occl"


def _cell(values: list[Any]) -> Any:
    array = np.empty((1, len(values)), object)
    for index, value in enumerate(values):
        array[0, index] = value
    return array


def _write_vbb(path: Path, frames: list[list[dict[str, Any]]], labels: list[str], **changes: Any) -> None:
    """Write the fields of vbbLoad like vbbSave. `changes` replaces `vers` and fields of A."""
    lists: list[Any] = []
    for records in frames:
        structs = np.empty((1, len(records)), [(name, "O") for name in (ID, POS, OCCL, "lock", POSV)])
        for index, record in enumerate(records):
            structs[0, index] = tuple(record[name] for name in structs.dtype.names)
        lists.append(structs if records else np.zeros((0, 0)))
    ones = np.ones((1, len(labels)))
    annotation = {
        **{"nFrame": len(frames), "objLists": _cell(lists), "maxObj": len(labels), "objInit": ones},
        **{"objLbl": _cell([np.array(label) if label else np.zeros((0, 0)) for label in labels]), "objStr": ones},
        **{"objEnd": ones, "objHide": 0 * ones, "altered": 0, "log": 0, "logLen": 0},
    }
    version = changes.pop("vers", 1.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"A": {**annotation, **changes}, "vers": version}, appendmat=False)


def _write_seq(
    path: Path, images: Sequence[NDArray[np.uint8]], codec: int, padding: int = 10, **changes: float
) -> list[bytes]:
    """Write RGB or gray images like seqWriterPlugin.m, and return the bytes per frame.

    `changes` replaces header fields.
    """
    height, width = images[0].shape[:2]
    channels = 1 if images[0].ndim == 2 else 3
    stride = height * width * channels
    stride += 6 + 512 - (stride + 6) % 512
    header = {
        **{"magic": 0xFEED, "version": 3, "size": 1024, "width": width, "height": height, "depth": 8 * channels},
        **{"used_depth": 8, "bytes": height * width * channels, "format": codec, "frames": len(images), "origin": 0},
        **{"stride": stride, "fps": 30.0},
    } | changes
    out = struct.pack("<I", int(header["magic"])) + "Norpix seq\0\0".encode("utf-16-le")
    out += struct.pack("<iI", int(header["version"]), int(header["size"])) + "No Description".encode("utf-16-le").ljust(
        512, b"\0"
    )
    names = ("width", "height", "depth", "used_depth", "bytes", "format", "frames", "origin", "stride")
    out += struct.pack("<9Id", *(int(header[name]) for name in names), header["fps"])
    out = out.ljust(1024, b"\0")
    frames = []
    for index, image in enumerate(images):
        bgr = image[..., ::-1] if channels == 3 else image
        suffix = {100: "", 101: "", 200: "", 1: ".png", 2: ".png"}.get(codec, ".jpg")
        frames.append(cv2.imencode(suffix, bgr)[1].tobytes() if suffix else bgr.tobytes())
        stamp = struct.pack("<IH", 7 + index // 25, index % 25 * 40)
        out += struct.pack("<I", len(frames[-1]) + 4) * bool(suffix) + frames[-1] + stamp
        out += bytes(padding if suffix else stride - len(frames[-1]) - 6)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out)
    return frames


@pytest.fixture(scope="session")
def write_vbb() -> Callable[..., None]:
    """Return `write_vbb(path, frames, labels, **changes)`. A frame is a list of dicts of object fields."""
    return _write_vbb


@pytest.fixture(scope="session")
def write_seq() -> Callable[..., list[bytes]]:
    """Return `write_seq(path, images, codec, padding, **changes)`, which returns the bytes per frame."""
    return _write_seq
