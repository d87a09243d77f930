"""Regions of a graph that may run in reduced precision, determined by the graph structure instead of node names.

    preprocessing | body: first convolution .. input of the output layers | output layers | decoding

A layer is a node with trained weights: Conv, ConvTranspose, Gemm or MatMul. An output layer has no layer after it; it
computes class scores or box sides. The body contains every layer before the output layers and the nodes between them.
Everything else stays FP32: preprocessing, and decoding, where half a pixel matters.

A two-stage detector has two sets of output layers. The region proposals pass indices and coordinates to the second
stage, but no features. The layers that predict them are therefore output layers as well.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hkd_deploy.precision.model import import_onnx

LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
SAMPLING_OPS = frozenset({"RoiAlign", "GridSample"})  # input 0: feature map, other inputs: sampling positions


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
