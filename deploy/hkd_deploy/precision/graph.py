"""Regions of a graph that may run in reduced precision, folding of norms, and conversion to float16 and bfloat16.

    preprocessing | body: first convolution .. input of the output layers | output layers | decoding

The graph structure determines the regions, not the node names. A layer is a node with trained weights: Conv,
ConvTranspose, Gemm or MatMul. An output layer has no layer after it; it computes class scores or box sides. The body
contains every layer before the output layers and the nodes between them. Everything else stays FP32: preprocessing, and
decoding, where half a pixel matters.

A two-stage detector has two sets of output layers. The region proposals pass indices and coordinates to the second
stage, but no features. The layers that predict them are therefore output layers as well.

The conversion sets explicit types, so that no runtime chooses a precision. The body runs in half precision; Cast nodes
connect it to the rest. The output layers stay FP32: rounding would make neighboring scores equal, and peak NMS keeps
all equal scores (`ops/boxes.py`). Inputs and outputs keep their types. The conversion is implemented here because
onnxruntime.transformers.float16 does not support bfloat16 and modelopt.onnx.autocast of NVIDIA requires torch.
"""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from hkd_deploy.precision.model import import_onnx
from hkd_det.errors import DataError

HalfPrecision = Literal["fp16", "bf16"]

LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
SAMPLING_OPS = frozenset({"RoiAlign", "GridSample"})  # input 0: feature map, other inputs: sampling positions
# Operators that are accurate in half precision. Large sums, exponentials and unlisted operators stay FP32.
HALF_OPS = frozenset({
    "Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Div", "Elu", "Flatten", "Gemm",
    "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MatMul", "Max",
    "MaxPool", "Min", "Mul", "PRelu", "Pad", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze",
    "Sub", "Tanh", "Transpose", "Unsqueeze",
})  # fmt: skip
FP16_MAX = float(np.finfo(np.float16).max)
BF16_OPSET = 22  # the first opset in which Conv and pooling accept bfloat16
BF16_IR_VERSION = 10  # the IR version of opset 22


@dataclass(frozen=True)
class GraphRegions:
    """Node names of the regions of a graph.

    Attributes:
        body: All nodes of the body, including `layers`.
        layers: Layers of the body in graph order.
        output_layers: Output layers in graph order.
    """

    body: frozenset[str]
    layers: tuple[str, ...]
    output_layers: tuple[str, ...]


def find_graph_regions(model: Any) -> GraphRegions:
    """Find the regions of a model.

    Args:
        model: onnx.ModelProto in which every node has a unique name.

    Returns:
        Node names of the body, its layers and the output layers.
    """
    feature_inputs = _find_feature_inputs(model)
    weights = find_constants(model)
    nodes = list(model.graph.node)
    layers = {node.name for node in nodes if node.op_type in LAYER_OPS and node.input[1] in weights}
    downstream = _find_downstream_nodes(nodes, feature_inputs, layers)
    upstream = _find_upstream_nodes(nodes, feature_inputs, layers)
    body = {node.name for node in nodes if node.name in upstream and (node.name in layers or node.name in downstream)}
    return GraphRegions(
        frozenset(body),
        tuple(node.name for node in nodes if node.name in layers and node.name in body),
        tuple(node.name for node in nodes if node.name in layers and node.name not in body),
    )


def find_constants(model: Any) -> dict[str, Any]:
    """Return all constant values of a model.

    Args:
        model: onnx.ModelProto.

    Returns:
        Value name to TensorProto: initializers, outputs of Constant nodes, and Identity outputs of either.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in constants:  # torch stores equal weights only once
            constants[node.output[0]] = constants[node.input[0]]
    return constants


def list_node_inputs(node: Any) -> list[str]:
    """Return the names of all values that a node reads, including those read by its subgraphs (If, Loop).

    Args:
        node: onnx.NodeProto.
    """
    inner_nodes = [inner for attribute in node.attribute for inner in attribute.g.node]
    return [*node.input, *(name for inner in inner_nodes for name in list_node_inputs(inner))]


def find_float_tensors(model: Any) -> frozenset[str]:
    """Return the names of all FP32 values of a model.

    Args:
        model: onnx.ModelProto.
    """
    onnx = import_onnx()
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = [*graph.input, *graph.output, *graph.value_info]
    dtypes = {info.name: info.type.tensor_type.elem_type for info in infos}
    dtypes.update({name: tensor.data_type for name, tensor in find_constants(model).items()})
    return frozenset(name for name, dtype in dtypes.items() if dtype == onnx.TensorProto.FLOAT)


def fold_norms(model: Any) -> Any:
    """Return a copy of a model with linear operators after a convolution folded into its weights.

    The torch exporter folds BatchNorm2d, but not the multiplication and addition of a frozen normalization.

    Args:
        model: onnx.ModelProto. It is not modified.

    Returns:
        The onnx.ModelProto after the basic graph optimizations of ONNX Runtime.
    """
    onnx = import_onnx()
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with TemporaryDirectory(prefix="hkd-precision-") as temp_dir:
        source_path, folded_path = Path(temp_dir) / "source.onnx", Path(temp_dir) / "folded.onnx"
        onnx.save(model, source_path)
        options.optimized_model_filepath = str(folded_path)
        runtime.InferenceSession(str(source_path), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(folded_path)
    folded.ir_version = min(folded.ir_version, model.ir_version)
    # The nodes that replace an operator without a kernel, such as HardSwish, have no names.
    for index, node in enumerate(folded.graph.node):
        node.name = node.name or f"{node.op_type}_folded_{index}"
    # ONNX Runtime lists every operator domain that it supports; keep those that the model contains.
    domains = [entry for entry in folded.opset_import if entry.domain in {node.domain for node in folded.graph.node}]
    del folded.opset_import[:]
    folded.opset_import.extend(domains)
    return folded


def _find_feature_inputs(model: Any) -> dict[str, list[str]]:
    """Map each node to its FP32 inputs; for sampling operators only to the feature map."""
    floats = find_float_tensors(model)
    return {
        node.name: [name for name in (node.input[:1] if node.op_type in SAMPLING_OPS else node.input) if name in floats]
        for node in model.graph.node
    }


def _find_downstream_nodes(nodes: Iterable[Any], feature_inputs: dict[str, list[str]], layers: set[str]) -> set[str]:
    """Return the names of the nodes that have a layer before them. Nodes are in topological order."""
    feature_values: set[str] = set()
    downstream = set()
    for node in nodes:
        is_downstream = any(name in feature_values for name in feature_inputs[node.name])
        if is_downstream:
            downstream.add(node.name)
        if is_downstream or node.name in layers:
            feature_values.update(node.output)
    return downstream


def _find_upstream_nodes(nodes: list[Any], feature_inputs: dict[str, list[str]], layers: set[str]) -> set[str]:
    """Return the names of the nodes that have a layer after them. Nodes are in topological order."""
    read_values: set[str] = set()
    upstream = set()
    for node in reversed(nodes):
        is_upstream = any(name in read_values for name in node.output)
        if is_upstream:
            upstream.add(node.name)
        if is_upstream or node.name in layers:
            read_values.update(feature_inputs[node.name])
    return upstream


def convert_to_half(model: Any, regions: GraphRegions, precision: HalfPrecision) -> Any:
    """Return a copy of an FP32 model whose body runs in half precision.

    Args:
        model: onnx.ModelProto in which every node has a unique name. It is not modified.
        regions: Regions of the model.
        precision: fp16 or bf16.

    Returns:
        The converted onnx.ModelProto.

    Raises:
        DataError: If a weight exceeds the range of float16.
    """
    onnx = import_onnx()
    if precision == "bf16":
        converted = onnx.version_converter.convert_version(model, BF16_OPSET)
        converted.ir_version = BF16_IR_VERSION
        onnx.helper.set_model_props(converted, {entry.key: entry.value for entry in model.metadata_props})
    else:
        converted = onnx.ModelProto()
        converted.CopyFrom(model)
    _HalfConverter(onnx, converted, regions, precision).rewrite()
    _remove_unused(converted)
    del converted.graph.value_info[:]
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(converted, strict_mode=True), full_check=True)
    return converted


class _HalfConverter:
    """Rewrite the nodes of a graph in one pass.

    A body value `x` becomes `x_fp16` (or `x_bf16`). If an FP32 node reads `x`, a Cast node restores it.
    """

    def __init__(self, onnx: Any, model: Any, regions: GraphRegions, precision: HalfPrecision) -> None:
        self.onnx, self.graph, self.precision = onnx, model.graph, precision
        self.float_values, self.constants = find_float_tensors(model), find_constants(model)
        self.half_nodes = {
            node.name for node in model.graph.node if node.name in regions.body and node.op_type in HALF_OPS
        }
        self.dtype = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
        self.half_values: set[str] = set()  # values that exist in half precision
        self.half_only_values: set[str] = set()  # values that only half-precision nodes produce
        self.restored_values: set[str] = set()  # `half_only_values` that a Cast node converts back to FP32
        self.nodes: list[Any] = []

    def rewrite(self) -> None:
        for node in list(self.graph.node):
            if node.name in self.half_nodes:
                self._convert_node(node)
            elif node.op_type == "Shape":  # both precisions have the same shape
                if node.input[0] in self.half_only_values:
                    node.input[0] = self._make_half_name(node.input[0])
            else:
                for name in list_node_inputs(node):
                    self._restore_float(name)
            self.nodes.append(node)
        for output in self.graph.output:
            self._restore_float(output.name)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _convert_node(self, node: Any) -> None:
        # Only the first input of Resize is data; its scales are always FP32.
        num_inputs = 1 if node.op_type == "Resize" else len(node.input)
        for index in range(num_inputs):
            if node.input[index] in self.float_values:
                node.input[index] = self._get_half_value(node.input[index])
        for index, name in enumerate(node.output):
            if name in self.float_values:
                self.half_values.add(name)
                self.half_only_values.add(name)
                node.output[index] = self._make_half_name(name)

    def _get_half_value(self, name: str) -> str:
        half_name = self._make_half_name(name)
        if name not in self.half_values:
            self.half_values.add(name)
            if name in self.constants:
                self.graph.initializer.append(self._make_half_tensor(name, half_name))
            else:
                self.nodes.append(self._make_cast(name, half_name, self.dtype))
        return half_name

    def _restore_float(self, name: str) -> None:
        if name in self.half_only_values and name not in self.restored_values:
            self.restored_values.add(name)
            self.nodes.append(self._make_cast(self._make_half_name(name), name, self.onnx.TensorProto.FLOAT))

    def _make_half_tensor(self, name: str, half_name: str) -> Any:
        values = self.onnx.numpy_helper.to_array(self.constants[name])
        max_abs = float(np.abs(values).max(initial=0))
        if self.precision == "fp16" and max_abs > FP16_MAX:
            raise DataError(f"weight {name}: {max_abs:.3g} exceeds the range of float16. Set --precision bf16.")
        if self.precision == "fp16":
            return self.onnx.numpy_helper.from_array(values.astype(np.float16), half_name)
        return self.onnx.helper.make_tensor(half_name, self.dtype, values.shape, values.ravel())

    def _make_cast(self, source: str, target: str, dtype: int) -> Any:
        return self.onnx.helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=dtype)

    def _make_half_name(self, name: str) -> str:
        return f"{name}_{self.precision}"


def _remove_unused(model: Any) -> None:
    """Remove nodes and initializers that no output depends on, such as FP32 weights that now exist in half."""
    read_values = {value.name for value in model.graph.output}
    nodes = []
    for node in reversed(model.graph.node):
        if read_values.intersection(node.output):
            read_values.update(list_node_inputs(node))
            nodes.append(node)
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read_values]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(weights)
    model.graph.node.extend(reversed(nodes))
