"""`Backend`: an open model, whatever runs it; and what its file must take and give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.model_metadata import ModelMetadata
from hkd_det.errors import DataError

RuntimeOutputs = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]


PerformanceHint = Literal["latency", "throughput"]  # what matters: one answer soon, or many a second


OUTPUT_DTYPES = {"boxes": "float32", "scores": "float32", "count": "int64"}


class Backend(Protocol):
    """An open model. Several threads may call `run`.

    metadata: the file's own strings. batch: pictures a call takes, None for any number.
    input_hw: (height, width) pixels, None where the graph leaves them free.
    """

    path: Path
    device: str
    metadata: dict[str, str]
    batch: int | None
    input_hw: tuple[int, int] | None

    def run(self, images: NDArray[np.uint8]) -> RuntimeOutputs:
        """(B, H, W, 3) uint8 RGB to boxes [B, K, 4] in pixels of them, scores [B, K], valid rows [B]."""

    def close(self) -> None:
        """Give the model's memory back."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph: its number type as NumPy names it, its shape with None for a free side."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sides = ", ".join("?" if side is None else str(side) for side in self.shape)
        return f"{self.name} {self.dtype} ({sides})"


def validate_io(
    path: Path, metadata: Mapping[str, str], inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]
) -> tuple[int | None, tuple[int, int] | None]:
    """Batch and (height, width) of the one input, images: uint8 (B, H, W, 3); None where free.

    Raises DataError, naming the file, for a model that a `Backend` can't run: another tool's, or one of hkd-export
    for programs that prepare the pictures or choose the boxes themselves.
    """
    manifest = ModelMetadata.from_metadata(metadata, path)
    for flag, odd in (("--raw", manifest.raw), ("--no-preprocess", manifest.preprocess != "uint8")):
        if odd:
            raise DataError(f"{path}: exported with {flag}, for a program of your own; export it again without")
    if {end.name: end.dtype for end in outputs} != OUTPUT_DTYPES:
        raise _make_io_error(path, f"outputs {OUTPUT_DTYPES}", outputs)
    match [(end.name, end.dtype, end.shape) for end in inputs]:
        case [("images", "uint8", (batch, int(height), int(width), 3))]:
            return batch, (height, width)
        case [("images", "uint8", (batch, None, None, 3))]:
            return batch, None
    raise _make_io_error(path, "one input images uint8 (B, H, W, 3)", inputs)


def _make_io_error(path: Path, expected: str, actual: Sequence[TensorInfo]) -> DataError:
    listed = ", ".join(map(str, actual)) or "none"
    return DataError(f"{path}: not a model of hkd-export: expected {expected}, found {listed}")


def make_closed_error(path: Path) -> ValueError:
    """Of a call after the `with` block."""
    return ValueError(f"{path}: this model has been closed; call it inside its `with` block")
