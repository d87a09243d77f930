"""What was really built: an engine's layers and the precision each computes in.

From the inspector's JSON (TensorRT 10 names a tensor's type in "Format/Datatype", 11 in "Datatype"), or from the one
line a layer that the builder logs, which is all there is where no GPU can open the engine.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# NVIDIA's words to ours, searched in this order; "Row major linear FP16 format" and "Half" are the same.
TYPES = {
    "bf16": r"\b(bf16|bfloat16)\b",
    "fp16": r"\b(fp16|half|float16)\b",
    "fp8": r"\bfp8\b",
    "int8": r"\bint8\b",
    "fp32": r"\b(fp32|float|float32)\b",
}
# Layers that multiply by weights: where the time goes, and what a precision is asked for.
HEAVY = re.compile(r"conv|correlation|gemm|matmul|matrixmultiply|fullyconnected|fusion|dla", re.IGNORECASE)
# Layers that move or wait, and compute nothing.
IDLE = ("signal", "wait", "NoOp", "Constant", "Shape", "Reformat")


@dataclass(frozen=True)
class Layer:
    """One layer of an engine. precision: fp32, fp16, bf16, fp8, int8, or "other" (integers, or not said).

    shape: of its first output; -1 where free.
    """

    name: str
    kind: str
    precision: str
    shape: tuple[int, ...]
    heavy: bool


def layers_of_inspector(text: str) -> list[Layer]:
    """From `EngineInspector.get_engine_information` in JSON.

    Raises ValueError if the engine was not built with detailed profiling verbosity: then layers are mere names.
    """
    found = json.loads(text)["Layers"]
    if any(isinstance(layer, str) for layer in found):
        raise ValueError("the engine names its layers but does not describe them")
    return [_layer(layer) for layer in found if _computes(layer)]


def layers_of_log(message: str) -> list[Layer]:
    """From the builder's verbose message that begins with "Layers:"."""
    found = [_parsed_line(line) for line in message.splitlines() if line.startswith("Name: ")]
    return [_layer(layer) for layer in found if _computes(layer)]


def histogram(layers: Iterable[Layer]) -> dict[str, int]:
    """Layers in each precision, of those that multiply by weights; of all where none is known to."""
    layers = list(layers)
    heavy = [layer for layer in layers if layer.heavy]
    return dict(Counter(layer.precision for layer in heavy or layers).most_common())


def table(layers: Sequence[Layer]) -> str:
    """A line a layer: precision, shape, kind, name."""
    rows = [(layer.precision, "x".join(map(str, layer.shape)), layer.kind, layer.name) for layer in layers]
    rows = [("precision", "shape", "kind", "layer"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)


def _computes(layer: Mapping[str, Any]) -> bool:
    return layer.get("LayerType") not in IDLE and bool(layer.get("Outputs"))


def _layer(layer: Mapping[str, Any]) -> Layer:
    kind = str(layer.get("LayerType", ""))
    tensors = [*layer.get("Inputs", ()), *layer["Outputs"]]
    known = (found for found in map(_precision, tensors) if found)
    return Layer(
        name=str(layer["Name"]),
        kind=kind,
        precision=next(known, "other"),  # of what comes in: an INT8 convolution may write FP16
        shape=tuple(layer["Outputs"][0].get("Dimensions", ())),
        heavy=bool(HEAVY.search(f"{kind} {layer.get('ParameterType', '')}")),
    )


def _precision(tensor: Mapping[str, Any]) -> str | None:
    said = next((str(tensor[key]) for key in ("Datatype", "DataType", "Format/Datatype") if key in tensor), "")
    return next((ours for ours, theirs in TYPES.items() if re.search(theirs, said, re.IGNORECASE)), None)


def _parsed_line(line: str) -> dict[str, Any]:
    """A logged layer in the inspector's form; it reads `Name: x, LayerType: y, Inputs: [ { Name: ... } ], ...`."""
    match = re.match(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)", line)
    if not match:
        return {}
    inputs = re.search(r"Inputs: \[(.*?)\], (?:Constants|Outputs): ", match["rest"])
    outputs = re.search(
        r"Outputs: \[(.*?)\], (?:ParameterType|TacticName|TacticValue|StreamId|Metadata)", match["rest"]
    )
    return {
        "Name": match["name"],
        "LayerType": match["kind"],
        "Inputs": _tensors(inputs[1] if inputs else ""),
        "Outputs": _tensors(outputs[1] if outputs else ""),
    }


def _tensors(text: str) -> list[dict[str, Any]]:
    """Of `{ Name: a, Dimensions: [1,3], ..., Datatype: Half, Format: ... }, { ... }`."""
    found = re.findall(r"Dimensions: \[([-0-9,]*)\].*?(?:Format/Datatype|Datatype): ([^,}]+)", text)
    return [{"Dimensions": [int(n) for n in dims.split(",") if n], "Datatype": said} for dims, said in found]
