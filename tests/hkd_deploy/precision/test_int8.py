"""INT8: the numbers that stand in the file, and who reads it."""

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
from hkd_deploy.precision.graph_regions import LAYER_OPS, find_graph_regions
from hkd_deploy.precision.int8 import convert_to_int8, fold_norms
from hkd_deploy.precision.model import read_fp32_model

REACH = {"normal": 1.0, "first_relu": 1.0}
LAYERS_HERE = ("first_node", "second_node")


def weights() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of both layers, channels of very different size."""
    chance = np.random.default_rng(3)
    sizes = np.array([0.01, 5], np.float32).reshape(2, 1, 1, 1)
    first = (chance.normal(size=(2, 3, 1, 1)) * sizes).astype(np.float32)
    return first, (chance.normal(size=(2, 2, 1, 1)) * sizes).astype(np.float32)


@pytest.fixture
def quantised(box_net: Callable[..., Path]) -> onnx.ModelProto:
    first, second = weights()
    return convert_to_int8(read_fp32_model(box_net(first=first, second=second)).model, LAYERS_HERE, REACH)


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def test_weights_have_a_scale_a_channel_and_come_back_within_half_a_step(quantised: onnx.ModelProto) -> None:
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    made = producers(quantised)
    for layer, exact in zip(LAYERS_HERE, weights(), strict=True):
        (node,) = (node for node in quantised.graph.node if node.name == layer)
        whole, scale, zero = (stored[name] for name in made[node.input[1]].input)
        np.testing.assert_allclose(scale, np.abs(exact).max((1, 2, 3)) / 127, rtol=1e-6)
        assert whole.dtype == np.int8 and not zero.any()
        step = scale.reshape(-1, 1, 1, 1)
        assert (np.abs(whole * step - exact) <= step * 0.5001).all()


def test_features_reach_as_far_as_was_measured(quantised: onnx.ModelProto) -> None:
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    pairs = [node for node in quantised.graph.node if node.op_type == "QuantizeLinear"]
    assert {node.input[0] for node in pairs} == set(REACH)
    for node in pairs:
        assert stored[node.input[1]] == pytest.approx(1 / 127, rel=1e-6)
        assert stored[node.input[2]].dtype == np.int8 and stored[node.input[2]] == 0


def test_all_else_stays_float(quantised: onnx.ModelProto) -> None:
    """No INT32 bias, no pair behind a layer, none at the last layer or in decoding; opset and IR as they were."""
    made = producers(quantised)
    for node in quantised.graph.node:
        if node.op_type in LAYER_OPS:
            wanted = node.name in LAYERS_HERE
            read = [made[name].op_type if name in made else "weight" for name in node.input]
            assert [kind == "DequantizeLinear" for kind in read] == [wanted, wanted, False]
    assert quantised.opset_import[0].version == 17 and quantised.ir_version == 8
    kinds = {tensor.data_type for tensor in quantised.graph.initializer}
    assert TensorProto.INT32 not in kinds
    assert all("w_first" != tensor.name != "w_second" for tensor in quantised.graph.initializer)


def test_a_layer_left_out_is_as_it_was(box_net: Callable[..., Path]) -> None:
    model = convert_to_int8(read_fp32_model(box_net()).model, ["second_node"], REACH)
    made = producers(model)
    (first,) = (node for node in model.graph.node if node.name == "first_node")
    assert made[first.input[0]].op_type == "Div"
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 1


def sharing() -> onnx.ModelProto:
    """Two layers with the same weights, then a last one."""
    shared = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    weights = {"w": shared, "w_last": np.ones((1, 4, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "one", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "w"], ["c"], "two", pads=[1] * 4),
        helper.make_node("Conv", ["c", "w_last"], ["y"], "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "sharing",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_shared_weights_stay_shared_and_a_layer_left_out_keeps_the_exact_ones() -> None:
    reach = {"x": 1.0, "b": 4.0}
    both, one = convert_to_int8(sharing(), ["one", "two"], reach), convert_to_int8(sharing(), ["one"], reach)
    first, second = ({node.name: node for node in both.graph.node}[name] for name in ("one", "two"))
    assert first.input[1] == second.input[1]
    assert sum(tensor.dims == [4, 4, 3, 3] for tensor in both.graph.initializer) == 1
    (left_out,) = (node for node in one.graph.node if node.name == "two")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in one.graph.initializer}
    before = numpy_helper.to_array(sharing().graph.initializer[0])
    np.testing.assert_array_equal(stored[left_out.input[1]], before)


def test_no_layer_at_all_is_the_same_model(box_net: Callable[..., Path]) -> None:
    model = read_fp32_model(box_net()).model
    assert convert_to_int8(model, [], REACH) == model


def test_answers_are_those_of_whole_numbers(box_net: Callable[..., Path]) -> None:
    """Against int8 arithmetic written out."""
    first, second = weights()
    source = read_fp32_model(box_net(first=np.abs(first), second=np.abs(second)))
    model = convert_to_int8(source.model, LAYERS_HERE, {"normal": 1.0, "first_relu": 20.0})
    picture = np.random.default_rng(4).integers(0, 256, (1, 96, 96, 3), np.uint8)

    def layer(values: NDArray[np.float64], weight: NDArray[np.float32], reach: float) -> NDArray[np.float64]:
        flat = np.abs(weight[:, :, 0, 0]).astype(np.float64)
        scale = flat.max(1, keepdims=True) / 127
        whole = np.clip(np.round(values / (reach / 127)), -128, 127) @ np.round(flat / scale).T
        return np.maximum(whole * scale[:, 0] * reach / 127, 0)

    wanted = layer(layer(picture[0] / 255, first, 1.0), second, 20.0)[..., 0].max()
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(["scores"], {"images": picture})[0]
    # One step of the second layer's input where rounding falls the other way in float32.
    assert found[0, 0] == pytest.approx(wanted, rel=2e-2)


def test_normalisation_is_folded_first(box_net: Callable[..., Path]) -> None:
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
    picture = np.random.default_rng(5).integers(0, 256, (1, 96, 96, 3), np.uint8)
    exact, found = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(["scores"], {"images": picture})[0]
        for model in (source.model, folded.model)
    )
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_openvino_reads_it(box_net: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = convert_to_int8(read_fp32_model(box_net()).model, LAYERS_HERE, REACH)
    onnx.save(model, tmp_path / "int8.onnx")
    picture = np.full((1, 96, 96, 3), 30, np.uint8)
    picture[:, 10:80, 20:50] = 240
    with open_openvino(tmp_path / "int8.onnx") as runtime:
        answer = runtime.run(picture)
    boxes, scores, count = answer
    assert boxes.tolist() == [[[20, 10, 50, 80]]] and count.tolist() == [1]
    assert scores[0, 0] == pytest.approx(240 / 255, abs=2 / 127)


@pytest.mark.slow
def test_tensorrt_builds_it(
    tensorrt_builds: Callable[..., dict[str, Any]], quantised: onnx.ModelProto, tmp_path: Path
) -> None:
    onnx.save(quantised, tmp_path / "int8.onnx")
    assert tensorrt_builds(tmp_path / "int8.onnx")["quantize_layers"] == 2


@pytest.mark.slow
def test_tensorrt_refuses_the_quantisers_own_choice(
    tensorrt_builds: Callable[..., dict[str, Any]], box_net: Callable[..., Path], tmp_path: Path
) -> None:
    """Why biases stay FP32 here: with ONNX Runtime's default the parser gives up. Once it does not, drop the option."""
    quantization = importlib.import_module("onnxruntime.quantization")
    source = box_net()

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.left = [np.full((1, 96, 96, 3), 200, np.uint8)]

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            return {"images": self.left.pop()} if self.left else None

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
