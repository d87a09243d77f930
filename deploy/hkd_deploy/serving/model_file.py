"""Inputs, outputs and metadata of a model file, as an inference server needs them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkd_deploy.model_metadata import NUMPY_DTYPES, TensorInfo, make_tensor_info
from hkd_deploy.precision.model import parse_onnx_model
from hkd_deploy.trt.engine_info import read_engine_info, read_plan
from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_det.errors import DataError, UsageError, import_package
from hkd_det.onnxrt.session import open_session


@dataclass(frozen=True)
class ModelFile:
    """Interface of a model file.

    Attributes:
        path: The .onnx or .engine file.
        inputs: Input tensors. The first dimension is the batch.
        outputs: Output tensors. The first dimension is the batch.
        metadata: Metadata strings that `hkd-export` wrote.
        max_batch: Largest batch of an engine whose batch dimension is free. Otherwise None.
    """

    path: Path
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    max_batch: int | None = None

    @property
    def is_engine(self) -> bool:
        """True for a TensorRT engine, which runs on a GPU only."""
        return self.path.suffix == ".engine"

    @property
    def precision(self) -> str:
        """Precision of the weights: fp32, fp16, bf16 or int8."""
        return self.metadata.get("hkd.precision", "fp32")

    @property
    def batch(self) -> int | None:
        """Fixed batch size. None if the batch dimension of all inputs and outputs is free."""
        batches = {tensor.shape[0] for tensor in (*self.inputs, *self.outputs)}
        return None if batches == {None} else next(batch for batch in batches if batch is not None)


def read_model_file(path: Path) -> ModelFile:
    """Read the interface of a model file.

    Args:
        path: An .onnx file, or an .engine file with its JSON file in the same directory.

    Returns:
        The interface.

    Raises:
        UsageError: The file has another type.
        DataError: The file is damaged or has an unsupported data type.
    """
    match path.suffix:
        case ".onnx":
            model_file = _read_with_onnxruntime(path)
        case ".engine":
            model_file = _read_from_engine_info(path)
        case _:
            raise UsageError(f"{path}: --serving: expected an .onnx or .engine file of hkd-export.")
    for tensor in (*model_file.inputs, *model_file.outputs):
        if tensor.dtype not in NUMPY_DTYPES.values():
            supported = ", ".join(dict.fromkeys(NUMPY_DTYPES.values()))
            raise DataError(f"{path}: {tensor.name}: expected data type {supported}, got {tensor.dtype}.")
    return model_file


def _read_with_onnxruntime(path: Path) -> ModelFile:
    """ONNX Runtime infers more dimensions than the file declares. It cannot open bfloat16 files."""
    if read_onnx_file(path).precision == "bf16":
        return _read_with_onnx(path)
    session = open_session(path)
    inputs, outputs = (
        tuple(make_tensor_info(node.name, node.type, node.shape) for node in nodes)
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return ModelFile(path, inputs, outputs, metadata)


def _read_with_onnx(path: Path) -> ModelFile:
    onnx = import_package("onnx", "onnx", f"It is required to read the bfloat16 file {path}. Run pip install onnx.")
    model = parse_onnx_model(onnx, path.read_bytes(), path)

    def parse_tensors(values: Iterable[Any]) -> tuple[TensorInfo, ...]:
        return tuple(_parse_value_info(onnx, value.name, value.type.tensor_type) for value in values)

    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return ModelFile(path, parse_tensors(model.graph.input), parse_tensors(model.graph.output), metadata)


def _parse_value_info(onnx: Any, name: str, tensor_type: Any) -> TensorInfo:
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor_type.shape.dim)
    return TensorInfo(name, onnx.helper.tensor_dtype_to_np_dtype(tensor_type.elem_type).name, dims)


def _read_from_engine_info(path: Path) -> ModelFile:
    """Read the JSON file: an engine can be opened only on the GPU that it was built for."""
    engine_info = read_engine_info(path)
    read_plan(path, engine_info)  # check that the engine is complete and belongs to the JSON file
    max_batch = engine_info.profile.max[0] if engine_info.profile else None
    return ModelFile(path, engine_info.inputs, engine_info.outputs, engine_info.metadata, max_batch)
