"""Float16 and bfloat16: the body in half, everything around it in float32, and a real TensorRT builds it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hkd_deploy.precision.float16 import HalfPrecision, convert_to_half
from hkd_deploy.precision.graph_regions import find_graph_regions
from hkd_deploy.precision.model import Fp32Model, read_fp32_model
from hkd_det.errors import DataError


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {info.name: info.type.tensor_type.elem_type for info in [*graph.input, *graph.output, *graph.value_info]}


def halved(source: Fp32Model, kind: HalfPrecision) -> onnx.ModelProto:
    return convert_to_half(source.model, find_graph_regions(source.model), kind)


@pytest.mark.parametrize(("kind", "wanted"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_only_the_body_is_half(kind: HalfPrecision, wanted: int, box_net: Callable[..., Path]) -> None:
    source = read_fp32_model(box_net())
    before, after = types_of(source.model), types_of(halved(source, kind))
    body = {"first", "first_relu", "second", "second_relu"}
    for name, was in before.items():
        if name in body - {"second_relu"}:  # the last is read by the last layer, in float32
            assert name not in after and after[f"{name}_{kind}"] == wanted
        else:
            assert after[name] == was
    assert before["scores"] == TensorProto.FLOAT and before["count"] == TensorProto.INT64


def test_weights_are_halved_once_and_the_old_ones_are_gone(box_net: Callable[..., Path]) -> None:
    model = halved(read_fp32_model(box_net()), "fp16")
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {name for name, kind in weights.items() if kind == TensorProto.FLOAT16} == {
        f"{name}_fp16" for name in ("w_first", "b_first", "w_second", "b_second")
    }
    assert "w_first" not in weights and weights["w_score"] == TensorProto.FLOAT


def test_equal_weights_that_torch_writes_once_are_halved_in_the_file(box_net: Callable[..., Path]) -> None:
    source = read_fp32_model(box_net())
    graph = source.model.graph
    graph.node.insert(0, helper.make_node("Identity", ["b_first"], ["b_again"], "again"))
    (second,) = (node for node in graph.node if node.name == "second_node")
    second.input[2] = "b_again"
    model = halved(source, "fp16")
    added = [node for node in model.graph.node if node.op_type == "Cast" and node.name.endswith("_cast")]
    assert {node.output[0] for node in added} == {"normal_fp16", "second_relu"}
    assert "Identity" not in {node.op_type for node in model.graph.node}


def test_what_an_inner_graph_takes_from_around_it_is_still_there(box_net: Callable[..., Path]) -> None:
    """An If reads `first_relu` without naming it among its inputs, and in float32."""
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
    model = halved(source, "fp16")
    picture = np.full((1, 96, 96, 3), 51, np.uint8)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(["extra"], {"images": picture})[0]
    np.testing.assert_allclose(found[:, 0], 0.2, atol=1e-3)


@pytest.mark.parametrize(("kind", "step"), [("fp16", 2**-10), ("bf16", 2**-7)])
def test_answers_differ_by_rounding(kind: HalfPrecision, step: float, box_net: Callable[..., Path]) -> None:
    source = read_fp32_model(box_net())
    picture = np.random.default_rng(1).integers(0, 256, (1, 96, 96, 3), np.uint8)
    exact = ReferenceEvaluator(source.model).run(None, {"images": picture})
    rough = ReferenceEvaluator(halved(source, kind)).run(None, {"images": picture})
    assert [value.dtype for value in rough] == [value.dtype for value in exact]
    # Three roundings: of the picture, and after each layer; the weights a third and one add one each.
    assert 0 < np.abs(exact[1] - rough[1]).max() <= 4 * step


def test_onnx_runtime_runs_float16(box_net: Callable[..., Path], tmp_path: Path) -> None:
    source = read_fp32_model(box_net())
    onnx.save(halved(source, "fp16"), tmp_path / "half.onnx")
    picture = np.full((1, 96, 96, 3), 30, np.uint8)
    picture[:, 10:80, 20:50] = 240
    boxes, scores, count = onnxruntime.InferenceSession(tmp_path / "half.onnx").run(None, {"images": picture})
    assert boxes.tolist() == [[[20, 10, 50, 80]]] and count.tolist() == [1]
    assert scores[0, 0] == pytest.approx(240 / 255, abs=2e-3)


def test_a_weight_beyond_float16_is_refused(box_net: Callable[..., Path]) -> None:
    second = np.array([[1, 70000], [0, 1]], np.float32).reshape(2, 2, 1, 1)
    source = read_fp32_model(box_net(second=second))
    with pytest.raises(DataError, match=r"weight w_second reaches 7e\+04, more than float16 can hold; use --precision"):
        halved(source, "fp16")
    halved(source, "bf16")


def test_bfloat16_says_the_opset_that_has_it(box_net: Callable[..., Path]) -> None:
    source = read_fp32_model(box_net())
    model = halved(source, "bf16")
    assert model.opset_import[0].version == 22 and model.ir_version == 10
    assert {entry.key: entry.value for entry in model.metadata_props} == source.get_metadata()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "other"), [("fp16", "BF16"), ("bf16", "HALF")])
def test_tensorrt_builds_what_is_written(
    kind: HalfPrecision,
    other: str,
    tensorrt_builds: Callable[..., dict[str, Any]],
    box_net: Callable[..., Path],
    tmp_path: Path,
) -> None:
    onnx.save(halved(read_fp32_model(box_net()), kind), tmp_path / "half.onnx")
    types = tensorrt_builds(tmp_path / "half.onnx")["layer_types"]
    assert {"HALF" if kind == "fp16" else "BF16", "FLOAT"} <= set(types) and other not in types
