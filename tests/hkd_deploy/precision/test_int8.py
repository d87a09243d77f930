"""Conversion to INT8: stored values, graph structure, and the runtimes that accept it."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hkd_deploy.backends.openvino import open_openvino
from hkd_deploy.precision.graph import LAYER_OPS, find_graph_regions, fold_norms
from hkd_deploy.precision.int8 import convert_to_int8
from hkd_deploy.precision.model import read_fp32_model

RANGES = {"normal": 1.0, "first_relu": 1.0}
LAYERS = ("first_node", "second_node")


def weights() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return weights of both layers whose channels differ strongly in magnitude."""
    rng = np.random.default_rng(3)
    magnitudes = np.array([0.01, 5], np.float32).reshape(2, 1, 1, 1)
    first = (rng.normal(size=(2, 3, 1, 1)) * magnitudes).astype(np.float32)
    return first, (rng.normal(size=(2, 2, 1, 1)) * magnitudes).astype(np.float32)


@pytest.fixture
def quantized(box_net: Callable[..., Path]) -> onnx.ModelProto:
    first, second = weights()
    return convert_to_int8(read_fp32_model(box_net(first=first, second=second)).model, LAYERS, RANGES)


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def test_convert_to_int8_stores_weights_with_scale_per_channel(quantized: onnx.ModelProto) -> None:
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    producer_of = producers(quantized)
    for layer, weight in zip(LAYERS, weights(), strict=True):
        (node,) = (node for node in quantized.graph.node if node.name == layer)
        values, scale, zero_point = (stored[name] for name in producer_of[node.input[1]].input)
        np.testing.assert_allclose(scale, np.abs(weight).max((1, 2, 3)) / 64, rtol=1e-6)
        assert values.dtype == np.int8 and not zero_point.any()
        # Two products of features and weights fit into 16 bits.
        assert 2 * 255 * int(np.abs(values.astype(int)).max()) < 1 << 15
        step = scale.reshape(-1, 1, 1, 1)
        assert (np.abs(values * step - weight) <= step * 0.5001).all()


def test_convert_to_int8_scales_features_by_calibrated_range(quantized: onnx.ModelProto) -> None:
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    quantize_nodes = [node for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    assert {node.input[0] for node in quantize_nodes} == set(RANGES)
    for node in quantize_nodes:
        assert stored[node.input[1]] == pytest.approx(1 / 127, rel=1e-6)
        assert stored[node.input[2]].dtype == np.int8 and stored[node.input[2]] == 0


def test_convert_to_int8_keeps_other_values_fp32(quantized: onnx.ModelProto) -> None:
    """No INT32 bias, and no Q/DQ pair after a layer, at the output layer or in decoding."""
    producer_of = producers(quantized)
    for node in quantized.graph.node:
        if node.op_type in LAYER_OPS:
            is_quantized = node.name in LAYERS
            input_ops = [producer_of[name].op_type if name in producer_of else "weight" for name in node.input]
            assert [op == "DequantizeLinear" for op in input_ops] == [is_quantized, is_quantized, False]
    assert quantized.opset_import[0].version == 17 and quantized.ir_version == 8
    dtypes = {tensor.data_type for tensor in quantized.graph.initializer}
    assert TensorProto.INT32 not in dtypes
    assert all("w_first" != tensor.name != "w_second" for tensor in quantized.graph.initializer)


def test_convert_to_int8_keeps_excluded_layer(box_net: Callable[..., Path]) -> None:
    model = convert_to_int8(read_fp32_model(box_net()).model, ["second_node"], RANGES)
    producer_of = producers(model)
    (first,) = (node for node in model.graph.node if node.name == "first_node")
    assert producer_of[first.input[0]].op_type == "Div"
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 1


def shared_weight_model() -> onnx.ModelProto:
    """Build two layers with the same weights and an output layer."""
    weight = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    weights = {"w": weight, "w_last": np.ones((1, 4, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "one", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w"], ["c"], "two", pads=[1] * 4),
        helper.make_node("Conv", ["c", "w_last"], ["y"], "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "shared",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_convert_to_int8_keeps_fp32_copy_of_shared_weights() -> None:
    ranges = {"x": 1.0, "b": 4.0}
    both = convert_to_int8(shared_weight_model(), ["one", "two"], ranges)
    one = convert_to_int8(shared_weight_model(), ["one"], ranges)
    first, second = ({node.name: node for node in both.graph.node}[name] for name in ("one", "two"))
    assert first.input[1] == second.input[1]
    assert sum(tensor.dims == [4, 4, 3, 3] for tensor in both.graph.initializer) == 1
    (excluded,) = (node for node in one.graph.node if node.name == "two")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in one.graph.initializer}
    before = numpy_helper.to_array(shared_weight_model().graph.initializer[0])
    np.testing.assert_array_equal(stored[excluded.input[1]], before)


def test_convert_to_int8_without_layers_returns_equal_model(box_net: Callable[..., Path]) -> None:
    model = read_fp32_model(box_net()).model
    assert convert_to_int8(model, [], RANGES) == model


def test_convert_to_int8_matches_integer_arithmetic(box_net: Callable[..., Path]) -> None:
    first, second = weights()
    source = read_fp32_model(box_net(first=np.abs(first), second=np.abs(second)))
    model = convert_to_int8(source.model, LAYERS, {"normal": 1.0, "first_relu": 20.0})
    image = np.random.default_rng(4).integers(0, 256, (1, 96, 96, 3), np.uint8)

    def layer(values: NDArray[np.float64], weight: NDArray[np.float32], limit: float) -> NDArray[np.float64]:
        flat = np.abs(weight[:, :, 0, 0]).astype(np.float64)
        scale = flat.max(1, keepdims=True) / 64
        products = np.clip(np.round(values / (limit / 127)), -128, 127) @ np.round(flat / scale).T
        return np.maximum(products * scale[:, 0] * limit / 127, 0)

    expected = layer(layer(image[0] / 255, first, 1.0), second, 20.0)[..., 0].max()
    session = onnxruntime.InferenceSession(model.SerializeToString())
    scores = session.run(["scores"], {"images": image})[0]
    # Tolerance: one quantization step of the second layer input, where FP32 rounds in the other direction.
    assert scores[0, 0] == pytest.approx(expected, rel=2e-2)


def test_fold_norms_keeps_all_layers_of_a_model_with_hard_swish() -> None:
    """ONNX Runtime replaces HardSwish, which has no kernel, by nodes without names."""
    weights = [np.full((2, 2, 1, 1), index, np.float32) for index in range(3)]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "conv0"),
        helper.make_node("HardSwish", ["a"], ["b"], "act0"),
        helper.make_node("Conv", ["b", "w1"], ["c"], "conv1"),
        helper.make_node("HardSwish", ["c"], ["d"], "act1"),
        helper.make_node("Conv", ["d", "w2"], ["y"], "conv2"),
    ]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2, 4, 4]) for name in "xy"]
    initializers = [numpy_helper.from_array(weight, f"w{index}") for index, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folded = fold_norms(model)
    assert find_graph_regions(folded).layers == ("conv0", "conv1")
    assert len({node.name for node in folded.graph.node}) == len(folded.graph.node)


def test_fold_norms_removes_batch_normalization(box_net: Callable[..., Path]) -> None:
    source = read_fp32_model(box_net())
    graph = source.model.graph
    for name, value in {"scale": [2, 3], "shift": [0.5, 1], "mean": [0.1, 0], "variance": [4, 1]}.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    (relu,) = (node for node in graph.node if node.name == "first_relu_node")
    relu.input[0] = "normed"
    norm = helper.make_node("BatchNormalization", ["first", "scale", "shift", "mean", "variance"], ["normed"], "norm")
    graph.node.insert(list(graph.node).index(relu), norm)
    folded = replace(source, model=fold_norms(source.model))
    assert "BatchNormalization" not in {node.op_type for node in folded.model.graph.node}
    assert {entry.domain for entry in folded.model.opset_import} == {""}
    assert len(find_graph_regions(folded.model).layers) == 2
    image = np.random.default_rng(5).integers(0, 256, (1, 96, 96, 3), np.uint8)
    expected, actual = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(["scores"], {"images": image})[0]
        for model in (source.model, folded.model)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_convert_to_int8_output_runs_on_openvino(box_net: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = convert_to_int8(read_fp32_model(box_net()).model, LAYERS, RANGES)
    onnx.save(model, tmp_path / "int8.onnx")
    image = np.full((1, 96, 96, 3), 30, np.uint8)
    image[:, 10:80, 20:50] = 240
    with open_openvino(tmp_path / "int8.onnx") as runtime:
        outputs = runtime.run(image)
    boxes, scores, count = outputs
    assert boxes.tolist() == [[[20, 10, 50, 80]]] and count.tolist() == [1]
    assert scores[0, 0] == pytest.approx(240 / 255, abs=2 / 127)


@pytest.mark.slow
def test_convert_to_int8_output_builds_on_tensorrt(
    tensorrt_builds: Callable[..., dict[str, Any]], quantized: onnx.ModelProto, tmp_path: Path
) -> None:
    onnx.save(quantized, tmp_path / "int8.onnx")
    assert tensorrt_builds(tmp_path / "int8.onnx")["quantize_layers"] == 2


@pytest.mark.slow
def test_default_quantizer_output_is_rejected_by_tensorrt(
    tensorrt_builds: Callable[..., dict[str, Any]], box_net: Callable[..., Path], tmp_path: Path
) -> None:
    """Reason for QuantizeBias=False: the parser rejects INT32 biases. If this test fails, remove the option."""
    quantization = importlib.import_module("onnxruntime.quantization")
    source = box_net()

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches = [np.full((1, 96, 96, 3), 200, np.uint8)]

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            return {"images": self.batches.pop()} if self.batches else None

    quantization.quantize_static(
        source,
        tmp_path / "default.onnx",
        Reader(),
        per_channel=True,
        op_types_to_quantize=["Conv"],
        extra_options={"ActivationSymmetric": True},
    )
    with pytest.raises(ValueError, match="Int32"):
        tensorrt_builds(tmp_path / "default.onnx")
