"""The precision of layers as TensorRT 10 and 11 word it.

The forms of 10 are those NVIDIA's documentation and its users' reports show; 11's is what the real builder logs
(test_checking.py reads it from there), with the JSON keys of NVIDIA's migration guide.
"""

import json
from typing import Any

import pytest

from hkd_deploy.trt.engine import (
    EngineLayer,
    count_precisions,
    format_layer_table,
    parse_build_log,
    parse_inspector_json,
)


def tensor(said: str, key: str = "Format/Datatype", **more: Any) -> dict[str, Any]:
    return {"Name": "t", "Location": "Device", "Dimensions": [1, 32, 80, 112], key: said, **more}


def layer(kind: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"Name": f"/{kind}", "LayerType": kind, "Inputs": inputs, "Outputs": outputs, **more}


TEN = {
    "Layers": [
        layer(
            "Reformat", [tensor("Row major linear FP32")], [tensor("Row major Int8 format")], ParameterType="Reformat"
        ),
        layer(
            "CaskConvolution",
            [tensor("Thirty-two wide channel vectorized row major Int8 format")],
            [tensor("Channel major FP16 format where channel % 4 == 0")],
            ParameterType="Convolution",
            Weights={"Type": "Int8", "Count": 131072},
        ),
        layer("gemm", [tensor("Half"), tensor("Half")], [tensor("Float")]),
        layer("kgen", [tensor("UInt8")], [tensor("BFloat16")]),
        layer("TopK", [tensor("Row major linear FP32")], [tensor("Row major linear INT32")]),
        layer("NoOp", [tensor("N/A due to dynamic shapes")], [tensor("N/A due to dynamic shapes")]),
    ],
    "Bindings": ["images", "boxes"],
}
ELEVEN = {
    "Layers": [
        layer("signal", [], [], Constants=[], StreamId=0, EventId=19),
        layer(
            "correlation",
            [tensor("Int8", "Datatype", Format="(NHWC) Channel major format", StrideOrder=[3, 0, 2, 1])],
            [tensor("Float", "Datatype", Format="(NHWC) Channel major format")],
            Constants=[tensor("Float", "Datatype")],
        ),
        layer("kgen", [tensor("Int64", "Datatype")], [tensor("Bool", "Datatype")]),
    ],
    "I/O Tensors": [{"Name": "images", "IOMode": "Input", "DataType": "UInt8", "Dimensions": [1, 160, 224, 3]}],
}


def test_the_form_of_ten() -> None:
    found = parse_inspector_json(json.dumps(TEN))
    precisions = {layer.layer_type: layer.precision for layer in found}
    assert precisions == {"CaskConvolution": "int8", "gemm": "fp16", "kgen": "bf16", "TopK": "fp32"}
    assert count_precisions(found) == {"int8": 1, "fp16": 1}  # those that multiply
    assert found[0].shape == (1, 32, 80, 112)


def test_the_form_of_eleven() -> None:
    found = parse_inspector_json(json.dumps(ELEVEN))
    assert [(layer.layer_type, layer.precision) for layer in found] == [("correlation", "int8"), ("kgen", "other")]
    assert count_precisions(found) == {"int8": 1}


def test_a_type_that_is_not_said_counts_as_none() -> None:
    unsaid = layer("CaskConvolution", [tensor("N/A due to dynamic shapes")], [tensor("N/A due to dynamic shapes")])
    assert count_precisions(parse_inspector_json(json.dumps({"Layers": [unsaid], "Bindings": []}))) == {"other": 1}


def test_mere_names_are_an_error() -> None:
    with pytest.raises(ValueError, match="does not describe them"):
        parse_inspector_json(json.dumps({"Layers": ["conv1", "conv2"], "Bindings": ["images"]}))


@pytest.mark.parametrize(
    ("said", "precision"),
    [("FP8", "fp8"), ("BF16", "bf16"), ("Row major linear BF16 format", "bf16"), ("UINT8", "other"), ("INT32", "other"),
     ("Two wide channel vectorized row major FP16 format", "fp16"), ("Float", "fp32"), ("", "other")],
)  # fmt: skip
def test_words_for_types(said: str, precision: str) -> None:
    (found,) = parse_inspector_json(json.dumps({"Layers": [layer("gemm", [tensor(said)], [tensor("Int64")])]}))
    assert found.precision == precision


def test_without_layers_that_multiply_all_count() -> None:
    assert count_precisions([EngineLayer("a", "kgen", "fp32", (1,), False)]) == {"fp32": 1}
    assert count_precisions([]) == {}


def test_a_message_without_layers() -> None:
    assert parse_build_log("") == [] and parse_build_log("Layers:\nName: nothing more") == []


def test_the_table_is_a_line_a_layer() -> None:
    lines = format_layer_table(parse_inspector_json(json.dumps(TEN))).splitlines()
    assert len(lines) == 5 and lines[0].split() == ["precision", "shape", "kind", "layer"]
    assert lines[1].split() == ["int8", "1x32x80x112", "CaskConvolution", "/CaskConvolution"]
