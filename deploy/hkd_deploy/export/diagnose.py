"""Comparison of an exported file with torch, layer by layer, to locate where a difference begins.

The torch exporter names nodes by module: `/neck/outputs.0/outputs.0.0/Conv` belongs to the layer `neck.outputs.0.0`,
and `/head/one2many_1/Conv` to the second call of `head.one2many`. This pairs layers of every model family.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hkd_deploy.export.graph import ExportModule
from hkd_deploy.export.parity import BOX_TOLERANCE_PX, SCORE_TOLERANCE, compute_max_difference
from hkd_deploy.precision.graph import find_constants, find_graph_regions
from hkd_deploy.precision.model import run_model
from hkd_det.models.feature_layers import observe_calls

CONV_OPS = ("Conv", "ConvTranspose")
# Of the norm of the values. Rounding causes about 1e-6 after a deep network; a visible difference is larger.
MAX_RELATIVE_ERROR = 1e-4
TRAINING_HINT = "which happens for a detector with little training: train it longer"


@dataclass(eq=False)
class LayerTrace:
    """One call of a layer in torch.

    Attributes:
        name: Module name.
        scope: Common prefix of the names of its nodes.
        modules: The layer, followed by the normalization that the exporter folds into it.
        input_value: Copy of the input.
        output_value: Copy of the output, after `modules[-1]`.
        input_tensor: The input tensor itself, which identifies the layer that produced it.
        output_tensor: The output tensor itself.
    """

    name: str
    scope: str
    modules: list[nn.Module]
    input_value: Tensor
    output_value: Tensor
    input_tensor: Tensor
    output_tensor: Tensor


@dataclass(frozen=True)
class LayerComparison:
    """Relative errors of one layer of an exported file.

    Attributes:
        name: Module name.
        input_error: Error of the input, with torch and the file each running on their own values.
        output_error: Error of the output, with torch and the file each running on their own values.
        layer_error: Error of the output if the torch layer receives the input of the file.
    """

    name: str
    input_error: float
    output_error: float
    layer_error: float


@dataclass(eq=False)
class _ActiveCall:
    """A module whose forward method is running.

    Attributes:
        module: The module.
        name: Module name.
        input_value: Copy of the input, or None if the input is not one tensor.
        is_leaf: Whether it has called no other module so far.
    """

    module: nn.Module
    name: str
    input_value: Tensor | None
    is_leaf: bool = True


def locate_difference(export_module: ExportModule, path: Path, batch: NDArray[Any]) -> str:
    """Find the first stage and the layer in which an exported file differs from torch.

    Args:
        export_module: The module that was exported.
        path: The ONNX file.
        batch: Batch of one image with a difference, as the graph takes it.

    Returns:
        A clause for an error message.
    """
    rows = export_module.options.batch or 1
    batch = np.repeat(batch, rows, axis=0)
    model = onnx.load(path)
    layers, expected, actual = compare_layers(export_module, model, batch)
    if not layers:
        return "the layer that differs cannot be located, because no node name matches a torch layer"
    box_px, score = compute_max_difference(expected, actual)
    if box_px <= BOX_TOLERANCE_PX and score <= SCORE_TOLERANCE:
        return _explain_fusion(model, batch)
    return f"{_find_first_stage(layers)}; {_find_worst_layer(layers)}"


@torch.no_grad()
def compare_layers(
    export_module: nn.Module, model: Any, batch: NDArray[Any]
) -> tuple[list[LayerComparison], list[NDArray[Any]], list[NDArray[Any]]]:
    """Compare all layers that have matching nodes.

    Intermediate values become graph outputs, which prevents the runtime from fusing operators.

    Args:
        export_module: The module that was exported.
        model: onnx.ModelProto of the exported file.
        batch: Batch as the graph takes it.

    Returns:
        layers: Comparisons in the order of execution in torch.
        expected: Outputs of torch.
        actual: Outputs of the file.
    """
    nodes = _group_nodes_by_scope(model)
    outputs = [output.name for output in model.graph.output]
    with _record_calls(export_module) as calls:
        expected = [value.numpy() for value in export_module(torch.from_numpy(batch))]
    pairs = _find_boundary_values(model, _pair_calls_with_nodes(_merge_folded_norms(calls, nodes), nodes))
    inner_values = sorted({name for _, boundary in pairs for name in boundary} - set(outputs))
    (values,) = run_model(model, [*outputs, *inner_values], [batch])
    layers = [
        _compare_layer(call, values[input_name], values[output_name])
        for call, (input_name, output_name) in pairs
        if values[input_name].shape == call.input_value.shape and values[output_name].shape == call.output_value.shape
    ]
    return layers, expected, [values[name] for name in outputs]


def compute_relative_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Return the norm of the difference divided by the norm of `expected`; infinite if a value is not finite.

    Args:
        expected (array): Values of torch.
        actual (array): Values of the file, of the same shape.
    """
    error = np.linalg.norm((actual - expected).astype(np.float64).ravel())
    ratio = error / max(1e-12, float(np.linalg.norm(expected.astype(np.float64).ravel())))
    return float(ratio) if np.isfinite(ratio) else float("inf")


@contextmanager
def _record_calls(network: nn.Module) -> Iterator[list[LayerTrace]]:
    """Record the calls of all leaf modules with one input tensor and one output tensor, in order."""
    names = {module: name for name, module in network.named_modules()}
    stack: list[_ActiveCall] = []
    calls: list[LayerTrace] = []

    def before_forward(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if stack:
            stack[-1].is_leaf = False
            # A shared module takes the name that its caller gives it.
            child_names = [child_name for child_name, child in stack[-1].module.named_children() if child is module]
            name = f"{stack[-1].name}.{child_names[0]}" if child_names else name
        is_single_tensor = len(inputs) == 1 and isinstance(inputs[0], Tensor)
        stack.append(_ActiveCall(module, name, inputs[0].clone() if is_single_tensor else None))

    def after_forward(_name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        scope = "".join(f"/{_get_scope_segment(names[active.module])}" for active in stack)
        call = stack.pop()
        if call.is_leaf and call.input_value is not None and isinstance(output, Tensor):
            calls.append(LayerTrace(call.name, scope, [module], call.input_value, output.clone(), inputs[0], output))

    with observe_calls(network, on_input=before_forward, on_output=after_forward):
        yield calls


def _get_scope_segment(name: str) -> str:
    """Return the part of a node name that a module contributes: its last name and the indices after it."""
    parts = name.split(".")
    start = next((index for index in reversed(range(len(parts))) if not parts[index].isnumeric()), 0)
    return ".".join(parts[start:])


def _group_nodes_by_scope(model: Any) -> dict[str, list[Any]]:
    nodes: dict[str, list[Any]] = defaultdict(list)
    for node in model.graph.node:
        nodes[node.name.rpartition("/")[0]].append(node)
    return nodes


def _merge_folded_norms(calls: Sequence[LayerTrace], nodes: dict[str, list[Any]]) -> list[LayerTrace]:
    """Merge each normalization without a node into the layer whose output it reads."""
    producers: dict[int, LayerTrace] = {}  # by id of the output tensor, which the trace keeps alive
    merged = []
    for call in calls:
        producer = producers.get(id(call.input_tensor))
        if isinstance(call.modules[0], _BatchNorm) and call.scope not in nodes and producer is not None:
            producer.modules, producer.output_value = [*producer.modules, *call.modules], call.output_value
        else:
            merged.append(call)
            producers[id(call.output_tensor)] = call
    return merged


def _pair_calls_with_nodes(
    calls: Sequence[LayerTrace], nodes: dict[str, list[Any]]
) -> list[tuple[LayerTrace, list[Any]]]:
    """Pair each call with its nodes. The exporter numbers repeated calls of one scope: `/head/conv`, `/head/conv_1`."""
    calls_by_scope: dict[str, list[LayerTrace]] = defaultdict(list)
    for call in calls:
        calls_by_scope[call.scope].append(call)
    nodes_by_call = {}
    for scope, scope_calls in calls_by_scope.items():
        names = [f"{scope}_{index}" if index else scope for index in range(len(scope_calls))]
        if all(name in nodes for name in names):  # otherwise the numbering is ambiguous
            nodes_by_call.update({id(call): nodes[name] for call, name in zip(scope_calls, names, strict=True)})
    return [(call, nodes_by_call[id(call)]) for call in calls if id(call) in nodes_by_call]


def _find_boundary_values(
    model: Any, pairs: Sequence[tuple[LayerTrace, list[Any]]]
) -> list[tuple[LayerTrace, tuple[str, str]]]:
    """Return each call with the names of its input and output values in the graph; omit ambiguous calls."""
    constants = {*find_constants(model), *(graph_input.name for graph_input in model.graph.input), ""}
    boundaries = []
    for call, nodes in pairs:
        # The exporter renames weights that it folds a normalization into.
        is_folded = any(node.op_type in CONV_OPS and node.input[1].startswith("onnx::") for node in nodes)
        produced = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in node.input} - produced - constants
        if len(read) == 1 and is_folded == (len(call.modules) > 1):
            boundaries.append((call, (read.pop(), nodes[-1].output[0])))
    return boundaries


def _compare_layer(call: LayerTrace, input_value: NDArray[Any], output_value: NDArray[Any]) -> LayerComparison:
    expected = torch.tensor(input_value)
    for module in call.modules:
        expected = module(expected)
    return LayerComparison(
        call.name,
        compute_relative_error(call.input_value.numpy(), input_value),
        compute_relative_error(call.output_value.numpy(), output_value),
        compute_relative_error(expected.numpy(), output_value),
    )


def _explain_fusion(model: Any, batch: NDArray[Any]) -> str:
    """Explain a file that differs from torch only while the runtime fuses its operators.

    Fusion changes rounding. If the output layers still agree, the decoding selects differently among nearly equal
    scores. The output layers alone do not prevent the runtime from fusing the layers before them.
    """
    names = [output.name for output in model.graph.output]
    regions = find_graph_regions(model)
    heads = [node.output[0] for node in model.graph.node if node.name in set(regions.output_layers)]
    hidden = [node.output[0] for node in model.graph.node if node.name in set(regions.layers)]
    (fused,) = run_model(model, [*names, *heads], [batch])
    (unfused,) = run_model(model, [*names, *heads, *hidden], [batch])
    error = max((compute_relative_error(unfused[name], fused[name]) for name in heads), default=float("inf"))
    if error <= MAX_RELATIVE_ERROR:
        return (
            f"all layers agree (the output layers by {error:.2g}), and decoding selects differently among scores that "
            f"differ only by rounding, {TRAINING_HINT}"
        )
    return (
        f"without operator fusion the file agrees with torch; with fusion the output layers differ by {error:.2g}: the "
        "runtime fuses operators incorrectly, or proposals with nearly equal scores are in another order, "
        f"{TRAINING_HINT}"
    )


def _find_first_stage(layers: list[LayerComparison]) -> str:
    """Describe the first stage that differs: preprocessing, a part of the detector, or decoding."""
    stage_errors = {"preprocessing": layers[0].input_error}
    for layer in layers:
        stage = _get_stage(layer.name)
        stage_errors[stage] = max(stage_errors.get(stage, 0), layer.output_error)
    for stage, error in stage_errors.items():
        if error > MAX_RELATIVE_ERROR:
            return f"the first stage that differs is {stage} (relative error {error:.2g})"
    # Rounding decides which of two overlapping boxes suppresses the other, and which peaks or proposals are selected,
    # if the scores are nearly equal.
    return (
        f"the first stage that differs is decoding (all {len(layers)} layers before it agree): it selects among nearly "
        f"equal scores, {TRAINING_HINT}"
    )


def _get_stage(name: str) -> str:
    """Return backbone, neck or head; for a sequential detector the index of the layer."""
    parts = name.removeprefix("detector.").split(".")
    return ".".join(parts[:3]) if parts[0] == "network" else parts[0]


def _find_worst_layer(layers: list[LayerComparison]) -> str:
    worst = max(layers, key=lambda layer: layer.layer_error)
    name = worst.name.removeprefix("detector.")
    if worst.layer_error <= MAX_RELATIVE_ERROR:
        return f"given the same input, every layer agrees (largest relative error {worst.layer_error:.2g}, in {name})"
    return f"the worst layer is {name} (given the same input, relative error {worst.layer_error:.2g})"
