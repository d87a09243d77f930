"""Inputs, outputs and metadata of a model file for an inference server, and the conversion of a graph for nvinfer."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hkd_deploy.model_metadata import NUMPY_DTYPES, PREPROCESS_FLOAT01, ModelMetadata, TensorInfo, make_tensor_info
from hkd_deploy.precision.graph import list_node_inputs
from hkd_deploy.precision.model import parse_onnx_model
from hkd_deploy.trt.engine_info import read_engine_info, read_plan
from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_det.errors import DataError, UsageError, import_package
from hkd_det.onnxrt.session import open_session

COUNT_OUTPUT = "count"
NHWC_TO_NCHW, NCHW_TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


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


def write_nvinfer_graph(source_path: Path, metadata: ModelMetadata, target_path: Path) -> None:
    """Convert a graph to the input float32 [B, 3, H, W] RGB, 0 to 1, and remove the output `count`.

    Args:
        source_path: ONNX file of fixed size. A uint8 input is converted; the rest of the graph stays unchanged.
        metadata: Metadata of the file.
        target_path: The file to write.

    Raises:
        DataError: The first operators of the graph are not those of `hkd-export`.
        UnavailableError: The onnx package is missing.
    """
    hint = "Run pip install onnx, or write the DeepStream files on the machine that exports the model."
    onnx = import_package("onnx", "onnx", hint)
    model = parse_onnx_model(onnx, source_path.read_bytes(), source_path)
    if metadata.preprocess == "uint8":
        _convert_input_to_nchw(onnx, model, source_path)
        _update_metadata(onnx, model)
    _drop_output(model, COUNT_OUTPUT)
    onnx.checker.check_model(model)
    onnx.save(model, target_path)


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


def _convert_input_to_nchw(onnx: Any, model: Any, path: Path) -> None:
    """Replace the cast to float32 and the transpose that follows by one multiplication by 255."""
    graph, helper, float32 = model.graph, onnx.helper, onnx.TensorProto.FLOAT
    images = graph.input[0]
    consumers = [node for node in graph.node if images.name in list_node_inputs(node)]
    if len(consumers) != 1 or consumers[0].op_type != "Cast" or consumers[0].attribute[0].i != float32:
        raise DataError(
            f"{path}: expected a cast of {images.name} to float32 as the first operator. Export the model again."
        )
    (cast,) = consumers
    transposes = [
        node for node in graph.node if node.op_type == "Transpose" and _is_nchw_transpose(node, cast.output[0])
    ]
    nchw_names = [node.output[0] for node in transposes] or [f"{images.name}_planes"]
    scale = onnx.numpy_helper.from_array(np.array(255, np.float32), f"{images.name}_white")
    first_nodes = [
        helper.make_node("Mul", [images.name, scale.name], [name], name=f"{name}_from_0_1") for name in nchw_names
    ]
    # The optimizer of ONNX Runtime, which processed INT8 files, reads the image shape before the transpose.
    if any(cast.output[0] in list_node_inputs(node) for node in graph.node if node not in transposes):
        nhwc_name = cast.output[0]
        first_nodes.append(
            helper.make_node("Transpose", [nchw_names[0]], [nhwc_name], name=f"{nhwc_name}_back", perm=NCHW_TO_NHWC)
        )
    nodes = [new for node in graph.node if node not in transposes for new in (first_nodes if node == cast else [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(scale)
    dims = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    images.CopyFrom(helper.make_tensor_value_info(images.name, float32, [dims[axis] for axis in NHWC_TO_NCHW]))


def _is_nchw_transpose(transpose: Any, input_name: str) -> bool:
    return transpose.input[0] == input_name and list(transpose.attribute[0].ints) == NHWC_TO_NCHW


def _update_metadata(onnx: Any, model: Any) -> None:
    """Set the preprocessing that hkd-export --no-preprocess writes. The other keys stay."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, entries | {"hkd.preprocess": json.dumps(PREPROCESS_FLOAT01)})


def _drop_output(model: Any, name: str) -> None:
    """Remove an output. Runtimes skip the operators that only this output needs.

    nvinfer treats the first dimension of every output as the batch and allocates memory for the others. An output of
    shape [B] gets no memory, and TensorRT would write to an invalid address.
    """
    outputs = [output for output in model.graph.output if output.name != name]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
