"""A foreign model, open: pictures in, people out, without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.detections import Detections
from hkd_det.errors import DataError
from hkd_det.foreign.answers import decode_outputs
from hkd_det.foreign.description import OnnxModelConfig, load_model_config
from hkd_det.foreign.placement import AlignedLetterbox, normalize_input
from hkd_det.onnx_session import open_session

INPUT_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


class OnnxDetector:
    """An open session with its description. `batch`: pictures a call of the graph takes, None for any number."""

    def __init__(self, path: Path, session: Any, config: OnnxModelConfig) -> None:
        self.path, self.config = path, config
        self._session = session
        self._input_name, self._input_dtype, self.batch, self.input_hw = _read_input_info(path, session, config)
        self._output_names = [value.name for value in session.get_outputs()]

    def __call__(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """People in pictures (H, W, 3) uint8 RGB, each of any size, in pixels of it.

        Raises DataError where the answers are not what the description says.
        """
        found: list[Detections] = []
        step = self.batch or max(1, len(images_rgb))
        for start in range(0, len(images_rgb), step):
            found += self._predict_batch(images_rgb[start : start + step])
        return found

    def _predict_batch(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        places = [
            AlignedLetterbox.from_resize_mode(
                (picture.shape[0], picture.shape[1]), self.input_hw, self.config.resize_mode
            )
            for picture in images_rgb
        ]
        placed = [
            place.apply(picture, self.config.pad_value) for place, picture in zip(places, images_rgb, strict=True)
        ]
        filled = placed + [placed[0]] * ((self.batch or len(placed)) - len(placed))  # a graph of a fixed batch
        numbers = normalize_input(np.stack(filled), self.config, self._input_dtype)
        outputs = self._session.run(self._output_names, {self._input_name: numbers})
        try:
            answers = list(
                decode_outputs(dict(zip(self._output_names, outputs, strict=True)), self.config, self.input_hw)
            )
        except ValueError as error:
            raise DataError(
                f"{self.path}: not what its description says of {self.config.output_format}: {error}"
            ) from None
        return [
            Detections(place.boxes_to_source(boxes), scores)
            for place, (boxes, scores) in zip(places, answers, strict=False)
        ]


def open_onnx_detector(
    path: Path, device: str = "cpu", config_path: Path | None = None, threads: int | None = None
) -> OnnxDetector:
    """Open an ONNX detector on cpu, cuda or cuda:N, and on nothing else.

    description: its YAML file; by default what hkd-export wrote into the model, or the .yaml of its name beside it.
    Raises UsageError, DataError or UnavailableError, each saying what to do.
    """
    session = open_session(path, device, threads)
    return OnnxDetector(
        path, session, load_model_config(path, session.get_modelmeta().custom_metadata_map, config_path)
    )


def _read_input_info(
    path: Path, session: Any, config: OnnxModelConfig
) -> tuple[str, type[np.generic], int | None, tuple[int, int]]:
    """Name, number type, batch and (height, width) of the one input."""
    inputs = session.get_inputs()
    found = [(value.name, value.type, value.shape) for value in inputs]
    if len(inputs) != 1 or inputs[0].type not in INPUT_DTYPES or len(inputs[0].shape) != 4:
        raise DataError(
            f"{path}: expected one input of pictures, 4 dimensions of uint8 or float numbers, found {found}"
        )
    shape = list(inputs[0].shape)
    colours, sides = (shape[1], shape[2:]) if config.layout == "NCHW" else (shape[3], shape[1:3])
    if isinstance(colours, int) and colours != 3:
        raise DataError(f"{path}: its input {shape} has no three colours in the layout {config.layout}")
    return (
        inputs[0].name,
        INPUT_DTYPES[inputs[0].type],
        _get_static_dim(shape[0]),
        _resolve_input_hw(path, sides, config),
    )


def _resolve_input_hw(path: Path, input_dims: Sequence[int | str | None], config: OnnxModelConfig) -> tuple[int, int]:
    asked = config.imgsz_hw or (None, None)
    found = [_get_static_dim(side) or wanted for side, wanted in zip(input_dims, asked, strict=True)]
    if config.imgsz_hw and tuple(found) != tuple(asked):
        raise DataError(f"{path}: its description says imgsz_hw {list(asked)}, the file takes {list(input_dims)}")
    height, width = found
    if height is None or width is None:
        raise DataError(f"{path}: leaves the size of its input open; say it in its description: imgsz_hw: [H, W]")
    return height, width


def _get_static_dim(dimension: int | str | None) -> int | None:
    """A dimension of a graph, None where any number will do."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None
