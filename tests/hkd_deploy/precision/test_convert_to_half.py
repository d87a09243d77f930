"""Conversion to float16 and bfloat16: half-precision body, FP32 elsewhere, accepted by TensorRT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hkd_deploy.precision.graph import HalfPrecision, convert_to_half, find_graph_regions
from hkd_deploy.precision.model import Fp32Model, read_fp32_model
from hkd_det.errors import DataError


def infer_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {info.name: info.type.tensor_type.elem_type for info in [*graph.input, *graph.output, *graph.value_info]}


def convert(source: Fp32Model, precision: HalfPrecision) -> onnx.ModelProto:
    return convert_to_half(source.model, find_graph_regions(source.model), precision)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_convert_to_half_converts_only_the_body(
    precision: HalfPrecision, dtype: int, box_net: Callable[..., Path]
) -> None:
    source = read_fp32_model(box_net())
    before, after = infer_types(source.model), infer_types(convert(source, precision))
    body = {"first", "first_relu", "second", "second_relu"}
    for name, before_dtype in before.items():
        if name in body - {"second_relu"}:  # the output layer reads second_relu in FP32
            assert name not in after and after[f"{name}_{precision}"] == dtype
        else:
            assert after[name] == before_dtype
    assert before["scores"] == TensorProto.FLOAT and before["count"] == TensorProto.INT64


def test_convert_to_half_replaces_fp32_weights(box_net: Callable[..., Path]) -> None:
    model = convert(read_fp32_model(box_net()), "fp16")
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {name for name, dtype in weights.items() if dtype == TensorProto.FLOAT16} == {
        f"{name}_fp16" for name in ("w_first", "b_first", "w_second", "b_second")
    }
    assert "w_first" not in weights and weights["w_score"] == TensorProto.FLOAT


def test_convert_to_half_converts_identity_of_weight_as_constant(box_net: Callable[..., Path]) -> None:
    source = read_fp32_model(box_net())
    graph = source.model.graph
    graph.node.insert(0, helper.make_node("Identity", ["b_first"], ["b_again"], "again"))
    (second,) = (node for node in graph.node if node.name == "second_node")
    second.input[2] = "b_again"
    model = convert(source, "fp16")
    casts = [node for node in model.graph.node if node.op_type == "Cast" and node.name.endswith("_cast")]
    assert {node.output[0] for node in casts} == {"normal_fp16", "second_relu"}
    assert "Identity" not in {node.op_type for node in model.graph.node}


def test_convert_to_half_restores_fp32_values_for_subgraphs(box_net: Callable[..., Path]) -> None:
    """The If node reads `first_relu` in FP32 although it is not among its inputs."""
    source = read_fp32_model(box_net())
    graph = source.model.graph
    inner = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branches = [
        helper.make_graph([helper.make_node(op, ["first_relu"], ["inner"], op)], op, [], [inner])
        for op in ("Abs", "Neg")
    ]
    graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    node = helper.make_node("If", ["yes"], ["extra"], "if", then_branch=branches[0], else_branch=branches[1])
    graph.node.append(node)
    graph.output.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, [1, 2, 96, 96]))
    model = convert(source, "fp16")
    image = np.full((1, 96, 96, 3), 51, np.uint8)
    values = onnxruntime.InferenceSession(model.SerializeToString()).run(["extra"], {"images": image})[0]
    np.testing.assert_allclose(values[:, 0], 0.2, atol=1e-3)


@pytest.mark.parametrize(("precision", "step"), [("fp16", 2**-10), ("bf16", 2**-7)])
def test_convert_to_half_changes_outputs_by_rounding(
    precision: HalfPrecision, step: float, box_net: Callable[..., Path]
) -> None:
    source = read_fp32_model(box_net())
    image = np.random.default_rng(1).integers(0, 256, (1, 96, 96, 3), np.uint8)
    expected = ReferenceEvaluator(source.model).run(None, {"images": image})
    actual = ReferenceEvaluator(convert(source, precision)).run(None, {"images": image})
    assert [value.dtype for value in actual] == [value.dtype for value in expected]
    # Rounding of the input, after each layer, and of the weight 1/3.
    assert 0 < np.abs(expected[1] - actual[1]).max() <= 4 * step


def test_convert_to_half_output_runs_on_onnx_runtime(box_net: Callable[..., Path], tmp_path: Path) -> None:
    source = read_fp32_model(box_net())
    onnx.save(convert(source, "fp16"), tmp_path / "half.onnx")
    image = np.full((1, 96, 96, 3), 30, np.uint8)
    image[:, 10:80, 20:50] = 240
    boxes, scores, count = onnxruntime.InferenceSession(tmp_path / "half.onnx").run(None, {"images": image})
    assert boxes.tolist() == [[[20, 10, 50, 80]]] and count.tolist() == [1]
    assert scores[0, 0] == pytest.approx(240 / 255, abs=2e-3)


def test_convert_to_half_weight_beyond_float16_raises(box_net: Callable[..., Path]) -> None:
    second = np.array([[1, 70000], [0, 1]], np.float32).reshape(2, 2, 1, 1)
    source = read_fp32_model(box_net(second=second))
    with pytest.raises(DataError, match=r"weight w_second: 7e\+04 exceeds the range of float16\. Set --precision bf16"):
        convert(source, "fp16")
    convert(source, "bf16")


def test_convert_to_half_bf16_sets_opset_and_keeps_metadata(box_net: Callable[..., Path]) -> None:
    source = read_fp32_model(box_net())
    model = convert(source, "bf16")
    assert model.opset_import[0].version == 22 and model.ir_version == 10
    assert {entry.key: entry.value for entry in model.metadata_props} == source.get_metadata()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "absent"), [("fp16", "BF16"), ("bf16", "HALF")])
def test_convert_to_half_output_builds_on_tensorrt(
    precision: HalfPrecision,
    absent: str,
    tensorrt_builds: Callable[..., dict[str, Any]],
    box_net: Callable[..., Path],
    tmp_path: Path,
) -> None:
    onnx.save(convert(read_fp32_model(box_net()), precision), tmp_path / "half.onnx")
    types = tensorrt_builds(tmp_path / "half.onnx")["layer_types"]
    assert {"HALF" if precision == "fp16" else "BF16", "FLOAT"} <= set(types) and absent not in types
