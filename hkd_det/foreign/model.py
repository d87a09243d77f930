"""A foreign model, open: pictures in, people out, without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.detections import Detections
from hkd_det.errors import DataError
from hkd_det.foreign.answers import people
from hkd_det.foreign.description import Description, describe
from hkd_det.foreign.placement import Placement, as_input
from hkd_det.onnx_session import open_session

KINDS: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


class ForeignModel:
    """An open session with its description. `batch`: pictures a call of the graph takes, None for any number."""

    def __init__(self, path: Path, session: Any, description: Description) -> None:
        self.path, self.description = path, description
        self._session = session
        self._input, self._kind, self.batch, self.input_hw = _input(path, session, description)
        self._outputs = [value.name for value in session.get_outputs()]

    def __call__(self, pictures_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """People in pictures (H, W, 3) uint8 RGB, each of any size, in pixels of it.

        Raises DataError where the answers are not what the description says.
        """
        found: list[Detections] = []
        step = self.batch or max(1, len(pictures_rgb))
        for start in range(0, len(pictures_rgb), step):
            found += self._run(pictures_rgb[start : start + step])
        return found

    def _run(self, pictures_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        places = [
            Placement.of((picture.shape[0], picture.shape[1]), self.input_hw, self.description.placement)
            for picture in pictures_rgb
        ]
        placed = [
            place.apply(picture, self.description.pad) for place, picture in zip(places, pictures_rgb, strict=True)
        ]
        filled = placed + [placed[0]] * ((self.batch or len(placed)) - len(placed))  # a graph of a fixed batch
        numbers = as_input(np.stack(filled), self.description, self._kind)
        outputs = self._session.run(self._outputs, {self._input: numbers})
        try:
            answers = list(people(dict(zip(self._outputs, outputs, strict=True)), self.description, self.input_hw))
        except ValueError as error:
            raise DataError(
                f"{self.path}: not what its description says of {self.description.output}: {error}"
            ) from None
        return [
            Detections(place.to_source(boxes), scores) for place, (boxes, scores) in zip(places, answers, strict=False)
        ]


def open_foreign(
    path: Path, device: str = "cpu", description: Path | None = None, threads: int | None = None
) -> ForeignModel:
    """Open an ONNX detector on cpu, cuda or cuda:N, and on nothing else.

    description: its YAML file; by default what hkd-export wrote into the model, or the .yaml of its name beside it.
    Raises UsageError, DataError or UnavailableError, each saying what to do.
    """
    session = open_session(path, device, threads)
    return ForeignModel(path, session, describe(path, session.get_modelmeta().custom_metadata_map, description))


def _input(
    path: Path, session: Any, description: Description
) -> tuple[str, type[np.generic], int | None, tuple[int, int]]:
    """Name, number type, batch and (height, width) of the one input."""
    inputs = session.get_inputs()
    found = [(value.name, value.type, value.shape) for value in inputs]
    if len(inputs) != 1 or inputs[0].type not in KINDS or len(inputs[0].shape) != 4:
        raise DataError(
            f"{path}: expected one input of pictures, 4 dimensions of uint8 or float numbers, found {found}"
        )
    shape = list(inputs[0].shape)
    colours, sides = (shape[1], shape[2:]) if description.layout == "NCHW" else (shape[3], shape[1:3])
    if isinstance(colours, int) and colours != 3:
        raise DataError(f"{path}: its input {shape} has no three colours in the layout {description.layout}")
    return inputs[0].name, KINDS[inputs[0].type], _fixed(shape[0]), _size_hw(path, sides, description)


def _size_hw(path: Path, sides: Sequence[int | str | None], description: Description) -> tuple[int, int]:
    asked = description.imgsz_hw or (None, None)
    found = [_fixed(side) or wanted for side, wanted in zip(sides, asked, strict=True)]
    if description.imgsz_hw and tuple(found) != tuple(asked):
        raise DataError(f"{path}: its description says imgsz_hw {list(asked)}, the file takes {list(sides)}")
    height, width = found
    if height is None or width is None:
        raise DataError(f"{path}: leaves the size of its input open; say it in its description: imgsz_hw: [H, W]")
    return height, width


def _fixed(dimension: int | str | None) -> int | None:
    """A dimension of a graph, None where any number will do."""
    return dimension if isinstance(dimension, int) and dimension > 0 else None
