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
PRECISION_PATTERNS = {
    "bf16": r"\b(bf16|bfloat16)\b",
    "fp16": r"\b(fp16|half|float16)\b",
    "fp8": r"\bfp8\b",
    "int8": r"\bint8\b",
    "fp32": r"\b(fp32|float|float32)\b",
}
# Layers that multiply by weights: where the time goes, and what a precision is asked for.
COMPUTE_PATTERN = re.compile(r"conv|correlation|gemm|matmul|matrixmultiply|fullyconnected|fusion|dla", re.IGNORECASE)
# Layers that move or wait, and compute nothing.
NO_COMPUTE = ("signal", "wait", "NoOp", "Constant", "Shape", "Reformat")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine. precision: fp32, fp16, bf16, fp8, int8, or "other" (integers, or not said).

    shape: of its first output; -1 where free.
    """

    name: str
    layer_type: str
    precision: str
    shape: tuple[int, ...]
    is_compute: bool


def parse_inspector_json(text: str) -> list[EngineLayer]:
    """From `EngineInspector.get_engine_information` in JSON.

    Raises ValueError if the engine was not built with detailed profiling verbosity: then layers are mere names.
    """
    found = json.loads(text)["Layers"]
    if any(isinstance(layer, str) for layer in found):
        raise ValueError("the engine names its layers but does not describe them")
    return [_make_layer(layer) for layer in found if _has_compute(layer)]


def parse_build_log(message: str) -> list[EngineLayer]:
    """From the builder's verbose message that begins with "Layers:"."""
    found = [_parse_log_line(line) for line in message.splitlines() if line.startswith("Name: ")]
    return [_make_layer(layer) for layer in found if _has_compute(layer)]


def count_precisions(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """Layers in each precision, of those that multiply by weights; of all where none is known to."""
    layers = list(layers)
    heavy = [layer for layer in layers if layer.is_compute]
    return dict(Counter(layer.precision for layer in heavy or layers).most_common())


def format_layer_table(layers: Sequence[EngineLayer]) -> str:
    """A line a layer: precision, shape, kind, name."""
    rows = [(layer.precision, "x".join(map(str, layer.shape)), layer.layer_type, layer.name) for layer in layers]
    rows = [("precision", "shape", "kind", "layer"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)


def _has_compute(layer: Mapping[str, Any]) -> bool:
    return layer.get("LayerType") not in NO_COMPUTE and bool(layer.get("Outputs"))


def _make_layer(layer: Mapping[str, Any]) -> EngineLayer:
    kind = str(layer.get("LayerType", ""))
    tensors = [*layer.get("Inputs", ()), *layer["Outputs"]]
    known = (found for found in map(_parse_precision, tensors) if found)
    return EngineLayer(
        name=str(layer["Name"]),
        layer_type=kind,
        precision=next(known, "other"),  # of what comes in: an INT8 convolution may write FP16
        shape=tuple(layer["Outputs"][0].get("Dimensions", ())),
        is_compute=bool(COMPUTE_PATTERN.search(f"{kind} {layer.get('ParameterType', '')}")),
    )


def _parse_precision(tensor: Mapping[str, Any]) -> str | None:
    said = next((str(tensor[key]) for key in ("Datatype", "DataType", "Format/Datatype") if key in tensor), "")
    return next((ours for ours, theirs in PRECISION_PATTERNS.items() if re.search(theirs, said, re.IGNORECASE)), None)


def _parse_log_line(line: str) -> dict[str, Any]:
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
        "Inputs": _parse_tensors(inputs[1] if inputs else ""),
        "Outputs": _parse_tensors(outputs[1] if outputs else ""),
    }


def _parse_tensors(text: str) -> list[dict[str, Any]]:
    """Of `{ Name: a, Dimensions: [1,3], ..., Datatype: Half, Format: ... }, { ... }`."""
    found = re.findall(r"Dimensions: \[([-0-9,]*)\].*?(?:Format/Datatype|Datatype): ([^,}]+)", text)
    return [{"Dimensions": [int(n) for n in dims.split(",") if n], "Datatype": said} for dims, said in found]
