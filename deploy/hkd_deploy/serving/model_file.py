"""What a model file takes and gives, from the file itself, or for an engine from the JSON beside it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkd_deploy.precision.model import parse_onnx_model
from hkd_deploy.trt.engine_info import EngineTensor, read_engine_info, read_plan
from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_det.errors import DataError, UsageError, import_package
from hkd_det.onnxrt.session import open_session

NUMPY_DTYPES = {  # ONNX Runtime's words and TensorRT's to numpy's
    "tensor(uint8)": "uint8",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "UINT8": "uint8",
    "FLOAT": "float32",
    "HALF": "float16",
    "INT32": "int32",
    "INT64": "int64",
}


@dataclass(frozen=True)
class TensorSpec:
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
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    max_batch: int | None = None

    @property
    def is_engine(self) -> bool:
        """Whether TensorRT built it, and it runs on a GPU only."""
        return self.path.suffix == ".engine"

    @property
    def precision(self) -> str:
        """fp32, fp16, bf16 or int8, as hkd-export made it."""
        return self.metadata.get("hkd.precision", "fp32")

    @property
    def batch(self) -> int | None:
        """Pictures a call takes; None where every input and output leaves the first side free."""
        sides = {tensor.shape[0] for tensor in (*self.inputs, *self.outputs)}
        return None if sides == {None} else next(side for side in sides if side is not None)


def read_model_file(path: Path) -> ModelFile:
    """The interface of an .onnx or .engine file. Raises UsageError for another kind, DataError for a bad one."""
    match path.suffix:
        case ".onnx":
            return _read_with_onnxruntime(path)
        case ".engine":
            return _read_from_engine_info(path)
        case _:
            raise UsageError(f"{path}: --target takes an .onnx file of hkd-export or an .engine it built")


def _read_with_onnxruntime(path: Path) -> ModelFile:
    """As ONNX Runtime sees it, which knows more sides than the file says; but it opens no bfloat16."""
    if read_onnx_file(path).precision == "bf16":
        return _read_with_onnx(path)
    session = open_session(path)

    def tensors(values: list[Any]) -> tuple[TensorSpec, ...]:
        return tuple(_make_tensor_spec(path, value.name, value.type, value.shape) for value in values)

    metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return ModelFile(path, tensors(session.get_inputs()), tensors(session.get_outputs()), metadata)


def _read_with_onnx(path: Path) -> ModelFile:
    """As the file itself says. Needs onnx."""
    onnx = import_package("onnx", "onnx", f"{path} is of bfloat16 and read with it: pip install onnx")
    model = parse_onnx_model(onnx, path.read_bytes(), path)

    def tensors(values: Iterable[Any]) -> tuple[TensorSpec, ...]:
        return tuple(_parse_value_info(onnx, value.name, value.type.tensor_type) for value in values)

    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return ModelFile(path, tensors(model.graph.input), tensors(model.graph.output), metadata)


def _parse_value_info(onnx: Any, name: str, tensor_type: Any) -> TensorSpec:
    sides = tuple(side.dim_value if side.HasField("dim_value") else None for side in tensor_type.shape.dim)
    return TensorSpec(name, onnx.helper.tensor_dtype_to_np_dtype(tensor_type.elem_type).name, sides)


def _read_from_engine_info(path: Path) -> ModelFile:
    """As the sidecar has it: an engine opens only on the GPU it was built for."""
    facts = read_engine_info(path)
    read_plan(path, facts)  # is it the one the sidecar speaks of, and whole?

    def tensors(values: Sequence[EngineTensor]) -> tuple[TensorSpec, ...]:
        return tuple(_make_tensor_spec(path, value.name, value.dtype, value.shape) for value in values)

    most = facts.profile.max[0] if facts.profile else None
    return ModelFile(path, tensors(facts.inputs), tensors(facts.outputs), facts.metadata, most)


def _make_tensor_spec(path: Path, name: str, dtype: str, shape: Sequence[Any]) -> TensorSpec:
    if dtype not in NUMPY_DTYPES:
        raise DataError(f"{path}: {name} is {dtype}; known are {', '.join(dict.fromkeys(NUMPY_DTYPES.values()))}")
    # A free side is a name in ONNX, -1 in TensorRT.
    return TensorSpec(
        name, NUMPY_DTYPES[dtype], tuple(side if isinstance(side, int) and side >= 0 else None for side in shape)
    )
