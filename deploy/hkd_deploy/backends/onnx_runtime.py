"""ONNX Runtime: open a model file on the device that was asked for, or fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError
from hkd_det.onnx_session import open_session

OUTPUTS = {"boxes": "tensor(float)", "scores": "tensor(float)", "count": "tensor(int64)"}


class OnnxRuntime:
    """An open session; several threads may call `run`, which keeps nothing.

    metadata: the file's own strings. input_hw: (height, width) pixels. batch: pictures a call takes,
    None for any number.
    """

    def __init__(self, path: Path, device: str, session: Any) -> None:
        self.path = path
        self.device = device
        self.metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
        self.batch, self.input_hw = _checked_input(session, path)
        _check_outputs(session, path)
        self._session: Any | None = session

    def run(self, pictures: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """(B, H, W, 3) uint8 RGB, letterboxed, to boxes [B, K, 4] in input pixels, scores [B, K], valid rows [B]."""
        if self._session is None:
            raise ValueError(f"{self.path}: this model has been closed; call it inside its `with` block")
        boxes, scores, count = self._session.run(list(OUTPUTS), {"images": pictures})
        return boxes, scores, count

    def close(self) -> None:
        """Give the model's memory back."""
        self._session = None


@contextmanager
def open_onnx_runtime(path: Path, device: str = "cpu", threads: int | None = None) -> Iterator[OnnxRuntime]:
    """Open an ONNX file on `device`: cpu, cuda or cuda:N.

    threads: CPU threads inside one operator; None leaves it to ONNX Runtime (one a physical core).
    Raises UsageError for a device or thread count that makes no sense, UnavailableError if ONNX
    Runtime or the device is not there, DataError if the file is none of ours.
    """
    opened = OnnxRuntime(path, device, open_session(path, device, threads))
    try:
        yield opened
    finally:
        opened.close()


def _checked_input(session: Any, path: Path) -> tuple[int | None, tuple[int, int]]:
    """(batch or None, (height, width)) of the one input, images: uint8 (B, H, W, 3)."""
    found = [(value.name, value.type, value.shape) for value in session.get_inputs()]
    match found:
        case [("images", "tensor(uint8)", [batch, int(height), int(width), 3])]:
            return (batch if isinstance(batch, int) else None), (height, width)
    raise DataError(f"{path}: not a model of hkd-export: expected one input images uint8 (B, H, W, 3), found {found}")


def _check_outputs(session: Any, path: Path) -> None:
    found = {value.name: value.type for value in session.get_outputs()}
    if found != OUTPUTS:
        raise DataError(f"{path}: not a model of hkd-export: expected outputs {OUTPUTS}, found {found}")
