"""Which node of an exported graph is which layer in torch, and what both make of the same picture.

torch's exporter names nodes by the modules they come from: `/neck/outputs.0/outputs.0.0/Conv` is of the layer
`neck.outputs.0.0`, and `/head/many_1/Conv` of the second call of `head.many`. So layers of every family pair.

Where inside an exported file the difference begins: stage by stage against torch, and the worst layer.
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
from hkd_deploy.export.parity import BOX_TOLERANCE_PX, SCORE_TOLERANCE, max_abs_difference
from hkd_deploy.precision.calibration import run_model
from hkd_deploy.precision.graph_regions import find_constants
from hkd_det.ops.hooks import observe_calls

CONV_OPS = ("Conv", "ConvTranspose")


@dataclass(eq=False)
class LayerTrace:
    """One call of a layer in torch.

    scope: the beginning of its nodes' names. parts: the layer, then the normalisation that the exporter folds into it.
    entered, left: values as they were. read, given: the tensors themselves, to see who reads whose.
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
    """How far a layer in the file is from torch's, as shares of the size of the values (norms).

    entered, left: of what goes in and comes out, each running on its own values. alone: of what comes out where torch's
    layer is given the file's input: what this layer does wrong itself.
    """

    name: str
    input_error: float
    output_error: float
    layer_error: float


@torch.no_grad()
def compare_layers(
    export_module: nn.Module, model: Any, batch: NDArray[Any]
) -> tuple[list[LayerComparison], list[NDArray[Any]], list[NDArray[Any]]]:
    """The layers that pair, in torch's order, and the outputs of both for a batch: torch's, the file's.

    model: an onnx.ModelProto. Looking at its inside keeps the runtime from fusing operators.
    """
    nodes = _group_nodes_by_scope(model)
    outputs = [output.name for output in model.graph.output]
    with _record_calls(export_module) as calls:
        wanted = [value.numpy() for value in export_module(torch.from_numpy(batch))]
    pairs = _find_boundary_values(model, _pair_calls_with_nodes(_merge_folded_norms(calls, nodes), nodes))
    inside = sorted({name for _, ends in pairs for name in ends} - set(outputs))
    (values,) = run_model(model, [*outputs, *inside], [batch])
    layers = [
        _compare_layer(call, values[entry], values[end])
        for call, (entry, end) in pairs
        if values[entry].shape == call.input_value.shape and values[end].shape == call.output_value.shape
    ]
    return layers, wanted, [values[name] for name in outputs]


def relative_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """The norm of the difference over the norm of what is wanted; infinite where a value is no number."""
    error = np.linalg.norm((actual - expected).astype(np.float64).ravel())
    share = error / max(1e-12, float(np.linalg.norm(expected.astype(np.float64).ravel())))
    return float(share) if np.isfinite(share) else float("inf")


@dataclass(eq=False)
class _ActiveCall:
    """A module that has been called and has not answered. leaf: it has called no other so far."""

    module: nn.Module
    name: str
    input_value: Tensor | None
    is_leaf: bool = True


@contextmanager
def _record_calls(network: nn.Module) -> Iterator[list[LayerTrace]]:
    """While it lasts, every call of a layer that takes one tensor and gives one is noted, in order."""
    known = {module: name for name, module in network.named_modules()}
    stack: list[_ActiveCall] = []
    calls: list[LayerTrace] = []

    def enter(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if stack:
            stack[-1].is_leaf = False
            # A module that several share has the name that it has with its caller.
            own = [part for part, child in stack[-1].module.named_children() if child is module]
            name = f"{stack[-1].name}.{own[0]}" if own else name
        plain = len(given) == 1 and isinstance(given[0], Tensor)
        stack.append(_ActiveCall(module, name, given[0].clone() if plain else None))

    def leave(_name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        scope = "".join(f"/{_get_scope_segment(known[one.module])}" for one in stack)
        call = stack.pop()
        if call.is_leaf and call.input_value is not None and isinstance(output, Tensor):
            calls.append(LayerTrace(call.name, scope, [module], call.input_value, output.clone(), given[0], output))

    with observe_calls(network, on_input=enter, on_output=leave):
        yield calls


def _get_scope_segment(name: str) -> str:
    """A module's part of a node's name: its own last name, with the numbers behind it."""
    atoms = name.split(".")
    start = next((at for at in reversed(range(len(atoms))) if not atoms[at].isnumeric()), 0)
    return ".".join(atoms[start:])


def _group_nodes_by_scope(model: Any) -> dict[str, list[Any]]:
    nodes: dict[str, list[Any]] = defaultdict(list)
    for node in model.graph.node:
        nodes[node.name.rpartition("/")[0]].append(node)
    return nodes


def _merge_folded_norms(calls: Sequence[LayerTrace], nodes: dict[str, list[Any]]) -> list[LayerTrace]:
    """The calls, each normalisation that left no node joined to the layer whose output it reads."""
    givers: dict[int, LayerTrace] = {}  # by the tensor, which its call keeps alive
    kept = []
    for call in calls:
        giver = givers.get(id(call.input_tensor))
        if isinstance(call.modules[0], _BatchNorm) and call.scope not in nodes and giver is not None:
            giver.modules, giver.output_value = [*giver.modules, *call.modules], call.output_value
        else:
            kept.append(call)
            givers[id(call.output_tensor)] = call
    return kept


def _pair_calls_with_nodes(
    calls: Sequence[LayerTrace], nodes: dict[str, list[Any]]
) -> list[tuple[LayerTrace, list[Any]]]:
    """Each call with its nodes; calls of one scope are told apart by the number behind it."""
    by_scope: dict[str, list[LayerTrace]] = defaultdict(list)
    for call in calls:
        by_scope[call.scope].append(call)
    found = {}
    for scope, same in by_scope.items():
        names = [f"{scope}_{number}" if number else scope for number in range(len(same))]
        if all(name in nodes for name in names):  # else it can't be told which call left no node
            found.update({id(call): nodes[name] for call, name in zip(same, names, strict=True)})
    return [(call, found[id(call)]) for call in calls if id(call) in found]


def _find_boundary_values(
    model: Any, pairs: Sequence[tuple[LayerTrace, list[Any]]]
) -> list[tuple[LayerTrace, tuple[str, str]]]:
    """Each call with the names of the value that enters its nodes and of the one that leaves them.

    Without those of which this is not plain.
    """
    fixed = {*find_constants(model), *(entry.name for entry in model.graph.input), ""}
    found = []
    for call, nodes in pairs:
        # Of another name than in torch: something was folded into it.
        folded = any(node.op_type in CONV_OPS and node.input[1].startswith("onnx::") for node in nodes)
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in node.input} - made - fixed
        if len(read) == 1 and folded == (len(call.modules) > 1):
            found.append((call, (read.pop(), nodes[-1].output[0])))
    return found


def _compare_layer(call: LayerTrace, input_value: NDArray[Any], output_value: NDArray[Any]) -> LayerComparison:
    alone = torch.tensor(input_value)
    for part in call.modules:
        alone = part(alone)
    return LayerComparison(
        call.name,
        relative_error(call.input_value.numpy(), input_value),
        relative_error(call.output_value.numpy(), output_value),
        relative_error(alone.numpy(), output_value),
    )


# Share of the values' size. Rounding alone gives some 1e-6 behind a deep network; what shows in an answer is more.
MAX_RELATIVE_ERROR = 1e-4


def locate_difference(export_module: ExportModule, path: Path, batch: NDArray[Any]) -> str:
    """Which stage is the first that differs, and which layer is the worst: part of a sentence.

    batch: one picture, on which the difference shows.
    """
    rows = export_module.options.batch or 1
    layers, wanted, found = compare_layers(export_module, onnx.load(path), np.repeat(batch, rows, axis=0))
    if not layers:
        return "where the difference begins can't be told: no node's name says of which of torch's layers it is"
    box_px, score = max_abs_difference(wanted, found)
    if box_px <= BOX_TOLERANCE_PX and score <= SCORE_TOLERANCE:
        return "it agrees as soon as its inside is looked at, so it is the runtime that fuses its operators wrongly"
    return f"{_find_first_stage(layers)}; {_find_worst_layer(layers)}"


def _find_first_stage(layers: list[LayerComparison]) -> str:
    """preprocessing ends where the first layer begins, decoding begins where the last ends."""
    stages = {"preprocessing": layers[0].input_error}
    for layer in layers:
        stage = _get_stage(layer.name)
        stages[stage] = max(stages.get(stage, 0), layer.output_error)
    for stage, apart in stages.items():
        if apart > MAX_RELATIVE_ERROR:
            return f"the first stage that differs is {stage} (by {apart:.2g} of its values)"
    # Which of two overlapping boxes suppresses the other, or which peaks or proposals are best, is rounding's
    # choice where scores are that close: of a detector that has learnt for a minute they all are.
    return (
        f"the first stage that differs is decoding (all {len(layers)} layers before it agree): of a hardly trained "
        "detector rounding chooses among scores that are all alike, then train it longer or say --no-verify"
    )


def _get_stage(name: str) -> str:
    """backbone, neck, head; of a detector that is one row of layers, the layer's place in the row."""
    parts = name.removeprefix("detector.").split(".")
    return ".".join(parts[:3]) if parts[0] == "network" else parts[0]


def _find_worst_layer(layers: list[LayerComparison]) -> str:
    worst = max(layers, key=lambda layer: layer.layer_error)
    if worst.layer_error <= MAX_RELATIVE_ERROR:
        return f"given the same input, every layer agrees (the worst, {_strip_detector_prefix(worst)}, by {worst.layer_error:.2g})"
    return f"the worst layer is {_strip_detector_prefix(worst)} (given the same input, by {worst.layer_error:.2g} of its values)"


def _strip_detector_prefix(layer: LayerComparison) -> str:
    return layer.name.removeprefix("detector.")
