"""An ONNX graph without one of its outputs."""

import importlib
from pathlib import Path
from typing import Any

from hkd_det.errors import UnavailableError


def without_output(source: Path, name: str, target: Path) -> None:
    """Write `source` to `target` without the output `name` and all that only it needs. Needs onnx.

    nvinfer takes the first side of every output for the batch and gives memory for the rest: of a number a
    picture, [B], nothing is left, and TensorRT would write to no address.
    """
    try:
        onnx = importlib.import_module("onnx")  # not on a device
    except ModuleNotFoundError:
        raise UnavailableError(
            "onnx is not installed; DeepStream's files are made where the weights are, with it: pip install onnx"
        ) from None
    model = onnx.load(source)
    kept = [output for output in model.graph.output if output.name != name]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    _drop_unused(model.graph)
    onnx.checker.check_model(model)
    onnx.save(model, target)


def _drop_unused(graph: Any) -> None:
    """Nodes stand in order, so one walk from the end sees every reader before what it reads."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            needed.update(_captured(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _captured(node: Any) -> set[str]:
    """What the bodies of an If or a Loop read from outside: all they read is enough to keep."""
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {name for body in bodies for inner in body.node for name in (*inner.input, *_captured(inner))} | {
        output.name for body in bodies for output in body.output
    }
