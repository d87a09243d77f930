"""Layers of a built engine and the precision of each.

There are two sources: the JSON of the engine inspector, and the verbose log of the builder. Without a GPU only the log
is available, because an engine can be opened on a GPU only. TensorRT 10 stores the data type of a tensor under
"Format/Datatype", TensorRT 11 under "Datatype".
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hkd_det.text_table import format_table

# Data types as TensorRT writes them, in search order. "Row major linear FP16 format" and "Half" are the same type.
PRECISION_PATTERNS = {
    "bf16": r"\b(bf16|bfloat16)\b",
    "fp16": r"\b(fp16|half|float16)\b",
    "fp8": r"\bfp8\b",
    "int8": r"\bint8\b",
    "fp32": r"\b(fp32|float|float32)\b",
}
# Layers with weights, which take most of the time and which a precision is chosen for.
COMPUTE_PATTERN = re.compile(r"conv|correlation|gemm|matmul|matrixmultiply|fullyconnected|fusion|dla", re.IGNORECASE)
# Layers that move data or synchronize, and compute nothing.
NO_COMPUTE = ("signal", "wait", "NoOp", "Constant", "Shape", "Reformat")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: Name in the engine. It contains the names of the fused ONNX nodes.
        layer_type: Type of the layer in TensorRT.
        precision: fp32, fp16, bf16, fp8 or int8. "other" for integer types and unknown ones.
        shape: Shape of the first output. Free dimensions are -1.
        is_compute: Whether the layer multiplies by weights.
    """

    name: str
    layer_type: str
    precision: str
    shape: tuple[int, ...]
    is_compute: bool


def parse_inspector_json(text: str) -> list[EngineLayer]:
    """Parse the layers from the JSON of the engine inspector.

    Args:
        text: Result of `EngineInspector.get_engine_information`.

    Returns:
        All layers that compute.

    Raises:
        ValueError: If the engine was built without detailed profiling verbosity. Its layers are names only.
    """
    layers = json.loads(text)["Layers"]
    if any(isinstance(layer, str) for layer in layers):
        raise ValueError("the engine contains the names of its layers only")
    return [_make_layer(layer) for layer in layers if _has_compute(layer)]


def parse_build_log(message: str) -> list[EngineLayer]:
    """Parse the layers from the log of the builder.

    Args:
        message: The verbose message that starts with "Layers:".

    Returns:
        All layers that compute.
    """
    layers = [_parse_log_line(line) for line in message.splitlines() if line.startswith("Name: ")]
    return [_make_layer(layer) for layer in layers if _has_compute(layer)]


def count_precisions(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """Count compute layers by precision.

    Args:
        layers: Layers of an engine. If none of them is a compute layer, all are counted.

    Returns:
        Number of layers by precision, in descending order.
    """
    layers = list(layers)
    compute_layers = [layer for layer in layers if layer.is_compute]
    return dict(Counter(layer.precision for layer in compute_layers or layers).most_common())


def format_precision_counts(counts: Mapping[str, int]) -> str:
    """Format the result of `count_precisions`, for example "40 int8, 7 fp16".

    Args:
        counts: Number of layers by precision.

    Returns:
        One line, "none" if there are no layers.
    """
    return ", ".join(f"{count} {precision}" for precision, count in counts.items()) or "none"


def format_layer_table(layers: Sequence[EngineLayer]) -> str:
    """Format layers as a table with one line per layer.

    Args:
        layers: Layers of an engine.

    Returns:
        Header and lines with precision, output shape, type and name.
    """
    rows = [(layer.precision, "x".join(map(str, layer.shape)), layer.layer_type, layer.name) for layer in layers]
    return format_table(rows, ("precision", "shape", "type", "layer"), left_columns=4)


def _has_compute(layer: Mapping[str, Any]) -> bool:
    return layer.get("LayerType") not in NO_COMPUTE and bool(layer.get("Outputs"))


def _make_layer(layer: Mapping[str, Any]) -> EngineLayer:
    layer_type = str(layer.get("LayerType", ""))
    tensors = [*layer.get("Inputs", ()), *layer["Outputs"]]
    precisions = (precision for precision in map(_parse_precision, tensors) if precision)
    return EngineLayer(
        name=str(layer["Name"]),
        layer_type=layer_type,
        precision=next(precisions, "other"),  # the type of the inputs: an INT8 convolution can write FP16
        shape=tuple(layer["Outputs"][0].get("Dimensions", ())),
        is_compute=bool(COMPUTE_PATTERN.search(f"{layer_type} {layer.get('ParameterType', '')}")),
    )


def _parse_precision(tensor: Mapping[str, Any]) -> str | None:
    dtype = next((str(tensor[key]) for key in ("Datatype", "DataType", "Format/Datatype") if key in tensor), "")
    return next(
        (name for name, pattern in PRECISION_PATTERNS.items() if re.search(pattern, dtype, re.IGNORECASE)), None
    )


def _parse_log_line(line: str) -> dict[str, Any]:
    """Convert a line `Name: x, LayerType: y, Inputs: [ { Name: ... } ], ...` to the form of the inspector."""
    match = re.match(r"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), (?P<rest>.*)", line)
    if not match:
        return {}
    inputs = re.search(r"Inputs: \[(.*?)\], (?:Constants|Outputs): ", match["rest"])
    outputs = re.search(
        r"Outputs: \[(.*?)\], (?:ParameterType|TacticName|TacticValue|StreamId|Metadata)", match["rest"]
    )
    return {
        "Name": match["name"],
        "LayerType": match["type"],
        "Inputs": _parse_log_tensors(inputs[1] if inputs else ""),
        "Outputs": _parse_log_tensors(outputs[1] if outputs else ""),
    }


def _parse_log_tensors(text: str) -> list[dict[str, Any]]:
    """Parse `{ Name: a, Dimensions: [1,3], ..., Datatype: Half, Format: ... }, { ... }`."""
    tensors = re.findall(r"Dimensions: \[([-0-9,]*)\].*?(?:Format/Datatype|Datatype): ([^,}]+)", text)
    return [{"Dimensions": [int(n) for n in dims.split(",") if n], "Datatype": dtype} for dims, dtype in tensors]
