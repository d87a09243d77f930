"""Tests of the layer parsers on the formats of TensorRT 10 and 11.

The format of TensorRT 10 follows NVIDIA's documentation and user reports. The format of TensorRT 11 follows the log of
the real builder, which test_cli.py reads, and the JSON keys of NVIDIA's migration guide.
"""

import json
from typing import Any

import pytest

from hkd_deploy.trt.engine import (
    EngineLayer,
    count_precisions,
    format_layer_table,
    format_precision_counts,
    parse_build_log,
    parse_inspector_json,
)


def tensor(dtype: str, key: str = "Format/Datatype", **more: Any) -> dict[str, Any]:
    return {"Name": "t", "Location": "Device", "Dimensions": [1, 32, 80, 112], key: dtype, **more}


def layer(layer_type: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"Name": f"/{layer_type}", "LayerType": layer_type, "Inputs": inputs, "Outputs": outputs, **more}


TENSORRT_10 = {
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
TENSORRT_11 = {
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


def test_inspector_json_of_tensorrt_10() -> None:
    layers = parse_inspector_json(json.dumps(TENSORRT_10))
    precisions = {layer.layer_type: layer.precision for layer in layers}
    assert precisions == {"CaskConvolution": "int8", "gemm": "fp16", "kgen": "bf16", "TopK": "fp32"}
    assert count_precisions(layers) == {"int8": 1, "fp16": 1}  # compute layers only
    assert layers[0].shape == (1, 32, 80, 112)


def test_inspector_json_of_tensorrt_11() -> None:
    layers = parse_inspector_json(json.dumps(TENSORRT_11))
    assert [(layer.layer_type, layer.precision) for layer in layers] == [("correlation", "int8"), ("kgen", "other")]
    assert count_precisions(layers) == {"int8": 1}


def test_unknown_data_type_is_other() -> None:
    unknown = layer("CaskConvolution", [tensor("N/A due to dynamic shapes")], [tensor("N/A due to dynamic shapes")])
    assert count_precisions(parse_inspector_json(json.dumps({"Layers": [unknown], "Bindings": []}))) == {"other": 1}


def test_inspector_json_with_names_only_raises() -> None:
    with pytest.raises(ValueError, match="names of its layers only"):
        parse_inspector_json(json.dumps({"Layers": ["conv1", "conv2"], "Bindings": ["images"]}))


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("FP8", "fp8"), ("BF16", "bf16"), ("Row major linear BF16 format", "bf16"), ("UINT8", "other"), ("INT32", "other"),
     ("Two wide channel vectorized row major FP16 format", "fp16"), ("Float", "fp32"), ("", "other")],
)  # fmt: skip
def test_precision_of_data_type_names(dtype: str, precision: str) -> None:
    (parsed,) = parse_inspector_json(json.dumps({"Layers": [layer("gemm", [tensor(dtype)], [tensor("Int64")])]}))
    assert parsed.precision == precision


def test_count_precisions_without_compute_layers_counts_all() -> None:
    assert count_precisions([EngineLayer("a", "kgen", "fp32", (1,), False)]) == {"fp32": 1}
    assert count_precisions([]) == {}


def test_build_log_without_layers_is_empty() -> None:
    assert parse_build_log("") == [] and parse_build_log("Layers:\nName: nothing more") == []


def test_layer_table_has_one_line_per_layer() -> None:
    lines = format_layer_table(parse_inspector_json(json.dumps(TENSORRT_10))).splitlines()
    assert len(lines) == 5 and lines[0].split() == ["precision", "shape", "type", "layer"]
    assert lines[1].split() == ["int8", "1x32x80x112", "CaskConvolution", "/CaskConvolution"]


def test_format_precision_counts() -> None:
    assert format_precision_counts({"int8": 40, "fp16": 7}) == "40 int8, 7 fp16"
    assert format_precision_counts({}) == "none"
