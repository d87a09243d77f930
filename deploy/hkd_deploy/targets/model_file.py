"""What a model file takes and gives, from the file itself, or for an engine from the JSON beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkd_det.errors import DataError, UsageError
from hkd_det.onnx_session import open_session

ONNX_DTYPES = {
    "tensor(uint8)": "uint8",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


@dataclass(frozen=True)
class Tensor:
    """One input or output. dtype: as numpy names it. shape: the batch in front; None where any number will do."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sides = ", ".join("any" if side is None else str(side) for side in self.shape)
        return f"{self.name} {self.dtype} ({sides})"


@dataclass(frozen=True)
class ModelFile:
    """A model file's interface.

    metadata: what hkd-export wrote into it. most: pictures in one call at most, where the batch is free and the
    file sets a limit (an engine's profile does).
    """

    path: Path
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    metadata: Mapping[str, str]
    most: int | None = None

    @property
    def is_engine(self) -> bool:
        """Whether TensorRT built it, and it runs on a GPU only."""
        return self.path.suffix == ".engine"

    @property
    def batch(self) -> int | None:
        """Pictures a call takes; None where every input and output leaves the first side free."""
        sides = {tensor.shape[0] for tensor in (*self.inputs, *self.outputs)}
        return None if sides == {None} else next(side for side in sides if side is not None)


def read_onnx(path: Path) -> ModelFile:
    """The interface of an ONNX file, as ONNX Runtime sees it. Raises DataError for a file it cannot load."""
    session = open_session(path)

    def tensors(values: list[Any]) -> tuple[Tensor, ...]:
        return tuple(Tensor(value.name, _dtype(value.type, path), _shape(value.shape)) for value in values)

    return ModelFile(
        path,
        tensors(session.get_inputs()),
        tensors(session.get_outputs()),
        session.get_modelmeta().custom_metadata_map,
    )


def _dtype(onnx_type: str, path: Path) -> str:
    if onnx_type not in ONNX_DTYPES:
        raise DataError(f"{path}: has a {onnx_type} among its inputs and outputs; known: {', '.join(ONNX_DTYPES)}")
    return ONNX_DTYPES[onnx_type]


def _shape(sides: list[Any]) -> tuple[int | None, ...]:
    return tuple(side if isinstance(side, int) else None for side in sides)


def read_model_file(path: Path) -> ModelFile:
    """The interface of an .onnx or .engine file. Raises UsageError for another kind of file."""
    match path.suffix:
        case ".onnx":
            return read_onnx(path)
        case _:
            raise UsageError(f"{path}: --target takes an .onnx file of hkd-export or an engine it built")
