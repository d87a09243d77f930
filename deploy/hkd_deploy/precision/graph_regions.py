"""Which parts of a graph may be reckoned in smaller numbers, told by its structure and not by names.

    preprocessing | body: first convolution .. what the last layers read | last layers | decoding

A *layer* is a node with trained weights: Conv, ConvTranspose, Gemm, MatMul. The *last* layers have no layer behind
them: they give scores and sides. The *body* is a layer or has one before it, and has another behind it. All else stays
FP32: what is before the first layer is preprocessing, what is behind the last is decoding, where half a pixel counts.
A detector of two stages has two such ends: what chooses regions (integers: which, how many; the places at which maps
are read) passes no features on, so the first stage's own answers are an end, too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hkd_deploy.precision.model import import_onnx

LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


SAMPLING_OPS = frozenset({"RoiAlign", "GridSample"})  # of maps, their first input, at places that the others say


@dataclass(frozen=True)
class GraphRegions:
    """Names of nodes. layers: those of the body, in the graph's order. last: the last layers, in the graph's order.

    body: all nodes of the body, `layers` among them.
    """

    body: frozenset[str]
    layers: tuple[str, ...]
    output_layers: tuple[str, ...]


def find_graph_regions(model: Any) -> GraphRegions:
    """The parts of a model whose nodes have names of their own."""
    features = _find_feature_inputs(model)
    weights = find_constants(model)
    nodes = list(model.graph.node)
    layers = {node.name for node in nodes if node.op_type in LAYER_OPS and node.input[1] in weights}
    after = _find_downstream_nodes(nodes, features, layers)
    before = _find_upstream_nodes(nodes, features, layers)
    body = {node.name for node in nodes if (node.name in layers or node.name in after) and node.name in before}
    return GraphRegions(
        frozenset(body),
        tuple(node.name for node in nodes if node.name in layers and node.name in body),
        tuple(node.name for node in nodes if node.name in layers and node.name not in body),
    )


def find_constants(model: Any) -> dict[str, Any]:
    """Name to TensorProto of all that is fixed: initializers, values of Constant nodes, and other names for either."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in found:  # torch writes equal weights once
            found[node.output[0]] = found[node.input[0]]
    return found


def list_node_inputs(node: Any) -> list[str]:
    """All that a node reads: its inputs, and what the graphs inside it (of an If) take from around them."""
    inside = [inner for attribute in node.attribute for inner in attribute.g.node]
    return [*node.input, *(name for inner in inside for name in list_node_inputs(inner))]


def find_float_tensors(model: Any) -> frozenset[str]:
    """Names of all values that are FP32."""
    onnx = import_onnx()
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = [*graph.input, *graph.output, *graph.value_info]
    typed = {info.name: info.type.tensor_type.elem_type for info in infos}
    typed.update({name: tensor.data_type for name, tensor in find_constants(model).items()})
    return frozenset(name for name, kind in typed.items() if kind == onnx.TensorProto.FLOAT)


def _find_feature_inputs(model: Any) -> dict[str, list[str]]:
    """Of each node the inputs by which features come: floats, and of those that read maps at places only the maps."""
    floats = find_float_tensors(model)
    return {
        node.name: [name for name in (node.input[:1] if node.op_type in SAMPLING_OPS else node.input) if name in floats]
        for node in model.graph.node
    }


def _find_downstream_nodes(nodes: Iterable[Any], features: dict[str, list[str]], layers: set[str]) -> set[str]:
    """Names of the nodes that have a layer before them."""
    carried: set[str] = set()
    found = set()
    for node in nodes:  # ONNX keeps its nodes in an order in which what is read has been written
        behind = any(name in carried for name in features[node.name])
        if behind:
            found.add(node.name)
        if behind or node.name in layers:
            carried.update(node.output)
    return found


def _find_upstream_nodes(nodes: list[Any], features: dict[str, list[str]], layers: set[str]) -> set[str]:
    """Names of the nodes that have a layer behind them."""
    wanted: set[str] = set()
    found = set()
    for node in reversed(nodes):
        leads = any(name in wanted for name in node.output)
        if leads:
            found.add(node.name)
        if leads or node.name in layers:
            wanted.update(features[node.name])
    return found
