"""Interface of a runtime backend, and the check of a model's inputs and outputs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.model_metadata import ModelMetadata, TensorInfo
from hkd_det.errors import DataError

# boxes [B, K, 4] float32 xyxy, scores [B, K] float32, count [B] int64
RuntimeOutputs = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]
PerformanceHint = Literal["latency", "throughput"]

INPUT_NAME, INPUT_DTYPE = "images", "uint8"
OUTPUT_DTYPES = {"boxes": "float32", "scores": "float32", "count": "int64"}


class Backend(Protocol):
    """A model opened by a runtime. Several threads may call `run` at the same time.

    Attributes:
        path: The model file.
        device: Device that runs the model: cpu, cuda or cuda:N.
        metadata: Metadata strings of the file.
        batch: Fixed batch size. None if the batch dimension is free.
        input_hw: Fixed (height, width) of the input, pixels. None if the size is free.
    """

    path: Path
    device: str
    metadata: dict[str, str]
    batch: int | None
    input_hw: tuple[int, int] | None

    def run(self, images: NDArray[np.uint8]) -> RuntimeOutputs:
        """Run inference on a batch.

        Args:
            images (uint8[B, H, W, 3]): RGB, letterboxed.

        Returns:
            boxes (float32[B, K, 4]): xyxy, input pixels.
            scores (float32[B, K]): 0 to 1, descending.
            count (int64[B]): Number of valid rows per image.
        """

    def close(self) -> None:
        """Release the memory of the model."""


def validate_io(
    path: Path, metadata: Mapping[str, str], inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]
) -> tuple[int | None, tuple[int, int] | None]:
    """Check that a `Backend` can run a model.

    Args:
        path: The model file, for error messages.
        metadata: Metadata strings of the file.
        inputs: Inputs of the graph.
        outputs: Outputs of the graph.

    Returns:
        batch: Fixed batch size. None if it is free.
        input_hw: Fixed (height, width), pixels. None if it is free.

    Raises:
        DataError: Another tool wrote the file, or it was exported with `--raw` or `--no-preprocess`.
    """
    model_metadata = ModelMetadata.from_metadata(metadata, path)
    for flag, is_set in (("--raw", model_metadata.raw), ("--no-preprocess", model_metadata.preprocess != "uint8")):
        if is_set:
            raise DataError(f"{path}: exported with {flag}, which no backend supports. Export it again without {flag}.")
    if {output.name: output.dtype for output in outputs} != OUTPUT_DTYPES:
        raise _make_io_error(path, f"outputs {OUTPUT_DTYPES}", outputs)
    match [(tensor.name, tensor.dtype, tensor.shape) for tensor in inputs]:
        case [("images", "uint8", (batch, int(height), int(width), 3))]:
            return batch, (height, width)
        case [("images", "uint8", (batch, None, None, 3))]:
            return batch, None
    raise _make_io_error(path, "one input images uint8 (B, H, W, 3)", inputs)


def _make_io_error(path: Path, expected: str, actual: Sequence[TensorInfo]) -> DataError:
    listed = ", ".join(map(str, actual)) or "none"
    return DataError(f"{path}: not a model of hkd-export: expected {expected}, got {listed}.")


def make_closed_error(path: Path) -> ValueError:
    """Create the error for a call after `close`.

    Args:
        path: The model file.

    Returns:
        The error, for the caller to raise.
    """
    return ValueError(f"{path}: the model is closed. Call it inside its `with` block.")
