"""INT8 convolutions in OpenVINO, compared with integer arithmetic in NumPy."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hkd_det.onnxrt.openvino import create_core, read_model

IN_CHANNELS, OUT_CHANNELS, SIZE = 128, 256, 10
SCALE, WEIGHT_SCALE = np.float32(0.07), np.float32(0.005)


def make_weights() -> NDArray[np.int8]:
    return np.random.default_rng(0).integers(-64, 65, (OUT_CHANNELS, 2 * IN_CHANNELS, 1, 1)).astype(np.int8)


def write_model(path: Path, is_dequantized_twice: bool = False) -> Path:
    """Write a 1x1 convolution behind a concatenation of two inputs, as hkd-export quantizes it."""
    constants = {
        "w": make_weights(),
        "ws": np.full(OUT_CHANNELS, WEIGHT_SCALE, np.float32),
        "wz": np.zeros(OUT_CHANNELS, np.int8),
        "s": SCALE,
        "z": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["c"], axis=1),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["d", "wd"], ["y"], kernel_shape=[1, 1]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, OUT_CHANNELS, SIZE, SIZE])]
    if is_dequantized_twice:
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s"], ["d2"]))  # without a zero point
        outputs.append(helper.make_tensor_value_info("d2", TensorProto.FLOAT, [1, 2 * IN_CHANNELS, SIZE, SIZE]))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, IN_CHANNELS, SIZE, SIZE]) for name in "ab"]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def run(path: Path, inputs: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    model = read_model(path)
    types = [node.get_output_element_type(0).get_type_name() for node in model.get_ordered_ops() if is_convert(node)]
    assert "u8" in types and "i8" not in types
    compiled = create_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(compiled(inputs).values())


def is_convert(node: object) -> bool:
    return node.get_type_name() == "Convert"  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("is_dequantized_twice", [False, True])
def test_convolution_of_concatenated_activations(tmp_path: Path, is_dequantized_twice: bool) -> None:
    rng = np.random.default_rng(1)
    inputs = {name: rng.normal(0, 2, (1, IN_CHANNELS, SIZE, SIZE)).astype(np.float32) for name in "ab"}
    quantized = np.clip(np.rint(np.concatenate([inputs["a"], inputs["b"]], axis=1) / SCALE), -128, 127).astype(np.int64)
    sums = np.einsum("oc,bcyx->boyx", make_weights()[:, :, 0, 0].astype(np.int64), quantized)

    outputs = run(write_model(tmp_path / "model.onnx", is_dequantized_twice), inputs)

    # One rounding step of one activation is the largest accepted difference.
    assert np.abs(outputs[0] - sums * SCALE * WEIGHT_SCALE).max() <= 64 * SCALE * WEIGHT_SCALE * 1.01
    if is_dequantized_twice:
        assert np.abs(outputs[1] - quantized * SCALE).max() <= SCALE * 1.01
