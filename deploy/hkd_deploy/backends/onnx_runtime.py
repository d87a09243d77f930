"""ONNX Runtime: open a model file on the device that was asked for, or fail."""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.backends.backend import OUTPUT_DTYPES, RuntimeOutputs, TensorInfo, make_closed_error, validate_io
from hkd_det.onnx_session import Provider, open_session

X86_MACHINES = ("x86_64", "AMD64")
ORT_DTYPES = {
    "tensor(uint8)": "uint8",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


class OnnxRuntimeBackend:
    """An open session; several threads may call `run`, which keeps nothing.

    metadata: the file's own strings. batch: pictures a call takes, None for any number.
    input_hw: (height, width) pixels, None where the graph leaves them free.
    """

    def __init__(self, path: Path, device: str, session: Any) -> None:
        self.path = path
        self.device = device
        self.metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
        self.batch, self.input_hw = validate_io(
            path, self.metadata, _read_session_io(session.get_inputs()), _read_session_io(session.get_outputs())
        )
        self._output_names = list(OUTPUT_DTYPES)
        self._session: Any | None = session

    def run(self, images: NDArray[np.uint8]) -> RuntimeOutputs:
        """(B, H, W, 3) uint8 RGB to boxes [B, K, 4] in pixels of them, scores [B, K], valid rows [B]."""
        session = self._session
        if session is None:
            raise make_closed_error(self.path)
        boxes, scores, count = session.run(self._output_names, {"images": images})
        return boxes, scores, count

    def close(self) -> None:
        """Give the model's memory back."""
        self._session = None


@contextmanager
def open_onnx_runtime(
    path: Path, device: str = "cpu", threads: int | None = None, provider: Provider | None = None
) -> Iterator[OnnxRuntimeBackend]:
    """Open an ONNX file on `device`: cpu, cuda or cuda:N.

    threads: CPU threads inside one operator; None leaves it to ONNX Runtime (one a physical core).
    provider: the execution provider, by default ONNX Runtime's own for the device.
    Raises UsageError for a device or thread count that makes no sense, UnavailableError if ONNX
    Runtime or the device is not there, DataError if the file is none of ours.
    """
    # ONNX Runtime's quick INT8 kernels for x86 want unsigned zero points, our files have the 0 that TensorRT wants:
    # what it would make of them is slower than floats with the weights folded once.
    plain_qdq = device == "cpu" and platform.machine() in X86_MACHINES
    opened = OnnxRuntimeBackend(path, device, open_session(path, device, threads, provider, plain_qdq))
    try:
        yield opened
    finally:
        opened.close()


def _read_session_io(nodes: Sequence[Any]) -> list[TensorInfo]:
    return [
        TensorInfo(
            value.name,
            ORT_DTYPES.get(value.type, value.type),
            tuple(side if isinstance(side, int) else None for side in value.shape),
        )
        for value in nodes
    ]
