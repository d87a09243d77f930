"""Inputs, outputs and metadata of a detector's graph, and the values of the inputs other than the image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError
from hkd_det.onnxrt.model_config import OnnxModelConfig

INPUT_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}
SIZE_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
# Inputs that state the size of the image. With the size of the model input, boxes are in its pixels.
SIZES_WH = ("orig_target_sizes",)  # RT-DETR, D-FINE, DEIM
MAX_LISTED = 8  # inputs in an error message
SIZES_HW = ("im_shape",)  # PaddleDetection
SCALES_HW = ("scale_factor",)  # PaddleDetection: input pixels per image pixel


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Attributes:
        name: Its name.
        type: Number type as ONNX Runtime names it, such as tensor(float).
        shape: Its dimensions; None if a dimension is dynamic.
    """

    name: str
    type: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class GraphIO:
    """Inputs, outputs and metadata of a graph.

    Attributes:
        name: Name of the graph.
        metadata: Metadata strings of the file.
        inputs: All inputs.
        outputs: All outputs, in the order of the graph.
    """

    name: str
    metadata: Mapping[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def image_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of 4 dimensions; one in a detector."""
        return tuple(value for value in self.inputs if len(value.shape) == 4)


def read_graph_io(session: Any) -> GraphIO:
    """Read the inputs, outputs and metadata of a session.

    Args:
        session: `onnxruntime.InferenceSession`, or an object with its methods.
    """
    meta = session.get_modelmeta()
    inputs, outputs = (
        tuple(TensorSpec(value.name, value.type, tuple(map(_get_static_dim, value.shape))) for value in values)
        for values in (session.get_inputs(), session.get_outputs())
    )
    return GraphIO(meta.graph_name, meta.custom_metadata_map, inputs, outputs)


def read_image_input(
    path: Path, graph: GraphIO, config: OnnxModelConfig
) -> tuple[TensorSpec, int | None, tuple[int, int]]:
    """Find the input for the image.

    Args:
        path: Model file, for error messages.
        graph: Inputs of its graph.
        config: Input conventions.

    Returns:
        tensor: The input.
        batch: Batch size, or None if it is dynamic.
        input_hw: Height and width in pixels.

    Raises:
        DataError: The inputs do not match the configuration.
    """
    images = graph.image_inputs
    sizes = [value for value in graph.inputs if value not in images]
    is_known = all(value.name in (*SIZES_WH, *SIZES_HW, *SCALES_HW) and value.type in SIZE_DTYPES for value in sizes)
    if len(images) != 1 or images[0].type not in INPUT_DTYPES or not is_known:
        actual = [(value.name, value.type, list(value.shape)) for value in graph.inputs[:MAX_LISTED]]
        raise DataError(
            f"{path}: expected one input of 4 dimensions and type uint8 or float, and of other inputs only "
            f"{', '.join((*SIZES_WH, *SIZES_HW, *SCALES_HW))}, got {actual}."
        )
    shape = images[0].shape
    channels, sides = (shape[1], shape[2:]) if config.layout == "NCHW" else (shape[3], shape[1:3])
    if channels not in (3, None):
        raise DataError(
            f"{path}: expected 3 channels in the layout {config.layout}, got the input shape {list(shape)}. Check the "
            "key layout of the model configuration."
        )
    return images[0], shape[0], _resolve_input_hw(path, sides, config)


def make_size_inputs(graph: GraphIO, batch: int, input_hw: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """Return the values of the inputs other than the image: boxes are then in input pixels.

    Args:
        graph: Inputs of the graph.
        batch: Number of images.
        input_hw: Height and width of the model input in pixels.

    Returns:
        Input name to array [B, 2].
    """
    height, width = input_hw
    values: dict[str, tuple[float, float]] = {
        **dict.fromkeys(SIZES_WH, (width, height)),
        **dict.fromkeys(SIZES_HW, (height, width)),
        **dict.fromkeys(SCALES_HW, (1, 1)),
    }
    return {
        value.name: np.tile(np.array(values[value.name], SIZE_DTYPES[value.type]), (batch, 1))
        for value in graph.inputs
        if value.name in values
    }


def _resolve_input_hw(path: Path, sides: Sequence[int | None], config: OnnxModelConfig) -> tuple[int, int]:
    requested = config.imgsz_hw or (None, None)
    default = config.default_imgsz_hw or (None, None)
    resolved = [side or one or other for side, one, other in zip(sides, requested, default, strict=True)]
    if config.imgsz_hw and tuple(resolved) != tuple(requested):
        raise DataError(
            f"{path}: imgsz_hw is {list(requested)} in the model configuration, but the input is {list(sides)}. "
            "Omit imgsz_hw, or set the size of the input."
        )
    height, width = resolved
    if height is None or width is None:
        raise DataError(f"{path}: the input size is dynamic. Set imgsz_hw: [H, W] in the model configuration.")
    return height, width


def _get_static_dim(dimension: int | str | None) -> int | None:
    """Return a dimension of the graph, or None if it is dynamic."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None
