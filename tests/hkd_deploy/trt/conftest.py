"""The fixture `graph`: a small network with three convolutions, in any precision, with the input of hkd-export."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 32
FLOAT_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def write_graph(
    path: Path, precision: str = "fp32", batch: int | None = 1, metadata_precision: str | None = None
) -> Path:
    """Write a model from images uint8 [batch, 32, 64, 3] to out [batch, 32, 32, 64].

    INT8 has the form that TensorRT expects: Q/DQ around each convolution, zero points of 0, one weight scale per
    channel, bias in FP32.

    Args:
        path: The file to write.
        precision: fp32, fp16, bf16 or int8.
        batch: Batch size, or None for a free batch.
        metadata_precision: Precision in the metadata, by default `precision`.
    """
    rng = np.random.default_rng(0)
    float_type = FLOAT_TYPES.get(precision, TensorProto.FLOAT)
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=float_type, name="/Cast"),
        helper.make_node("Transpose", ["float"], ["x0"], perm=[0, 3, 1, 2], name="/Transpose"),
    ]
    constants: list[onnx.TensorProto] = []
    for index in range(3):
        weight = rng.normal(0, 0.1, (CHANNELS, CHANNELS if index else 3, 3, 3))
        source, kernel = f"x{index}", f"w{index}"
        if precision == "int8":
            source, kernel = _add_quantization(index, weight, nodes, constants)
        else:
            constants.append(_make_tensor(kernel, weight, float_type))
        constants.append(_make_tensor(f"b{index}", rng.normal(size=CHANNELS), float_type))
        inputs = [source, kernel, f"b{index}"]
        nodes.append(helper.make_node("Conv", inputs, [f"c{index}"], pads=[1, 1, 1, 1], name=f"/{index}/Conv"))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"x{index + 1}"], name=f"/{index}/Relu"))
    nodes.append(helper.make_node("Cast", ["x3"], ["out"], to=TensorProto.FLOAT, name="/Out"))
    batch_dim = batch or "batch"
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [batch_dim, 32, 64, 3])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch_dim, CHANNELS, 32, 64])
    graph = helper.make_graph(nodes, "small", [images], [out], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"hkd.precision": metadata_precision or precision, "imgsz": "[32, 64]"})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def _make_tensor(name: str, value: NDArray[np.float64], data_type: int) -> onnx.TensorProto:
    return helper.make_tensor(name, data_type, value.shape, value.astype(np.float32).ravel().tolist())


def _add_quantization(
    index: int, weight: NDArray[np.float64], nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]
) -> tuple[str, str]:
    """Add Q/DQ for the input and DQ for the weights of a convolution, and return the names of both."""
    names = {part: f"{part}{index}" for part in ("scale", "zero", "scales", "zeros", "kernel", "q", "dq", "wdq")}
    values = {
        "scale": np.float32(0.02),
        "zero": np.int8(0),
        "scales": np.full(CHANNELS, 0.002, np.float32),
        "zeros": np.zeros(CHANNELS, np.int8),
        "kernel": np.clip(weight / 0.002, -127, 127).astype(np.int8),
    }
    constants.extend(numpy_helper.from_array(np.asarray(value), names[part]) for part, value in values.items())
    nodes.extend(
        [
            helper.make_node("QuantizeLinear", [f"x{index}", names["scale"], names["zero"]], [names["q"]]),
            helper.make_node("DequantizeLinear", [names["q"], names["scale"], names["zero"]], [names["dq"]]),
            helper.make_node(
                "DequantizeLinear", [names["kernel"], names["scales"], names["zeros"]], [names["wdq"]], axis=0
            ),
        ]
    )
    return names["dq"], names["wdq"]


@pytest.fixture
def graph(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that takes the arguments of `write_graph`, writes a file and returns its path."""

    def write(name: str = "small.onnx", **options: object) -> Path:
        return write_graph(tmp_path / name, **options)  # type: ignore[arg-type]

    return write
