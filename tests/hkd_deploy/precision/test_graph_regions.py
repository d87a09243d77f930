"""Regions of a graph: body layers and output layers of one-stage and two-stage detectors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hkd_deploy.precision.graph import find_graph_regions
from hkd_deploy.precision.model import read_fp32_model


def test_find_graph_regions_of_one_stage_detector(box_net: Callable[..., Path]) -> None:
    regions = find_graph_regions(read_fp32_model(box_net()).model)
    assert regions.layers == ("first_node", "second_node")
    assert regions.output_layers == ("score_node",)
    assert regions.body == {"first_node", "first_relu_node", "second_node", "second_relu_node"}


@pytest.mark.parametrize("sampling_op", ["RoiAlign", "GridSample"])
def test_find_graph_regions_of_two_stage_detector(sampling_op: str) -> None:
    """The proposal layers are output layers, because only indices and coordinates reach the second stage."""
    constants = {
        "w": np.ones((4, 3, 1, 1), np.float32),
        "w_objectness": np.ones((1, 4, 1, 1), np.float32),
        "w_fc": np.ones((4, 4), np.float32),
        "w_class": np.ones((4, 2), np.float32),
        "flat": np.array([-1], np.int64),
        "rows": np.array([-1, 4], np.int64),
        "two": np.array([2], np.int64),
        "boxes": np.ones((64, 4), np.float32),
        "zeros": np.zeros(2, np.int64),
        "grid_shape": np.array([1, 2, 2, 2], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["map"], "backbone"),
        helper.make_node("Conv", ["map", "w_objectness"], ["objectness"], "rpn"),
        helper.make_node("Reshape", ["objectness", "flat"], ["all"], "flatten"),
        helper.make_node("TopK", ["all", "two"], ["best", "index"], "topk"),
        helper.make_node("Gather", ["boxes", "index"], ["chosen"], "gather"),
        helper.make_node("Sigmoid", ["best"], ["weight"], "sigmoid"),
        helper.make_node("Unsqueeze", ["weight", "axis"], ["column"], "column"),
        helper.make_node("Mul", ["chosen", "column"], ["regions"], "move"),
        helper.make_node("Reshape", ["regions", "grid_shape"], ["grid"], "grid"),
        helper.make_node("RoiAlign", ["map", "regions", "zeros"], ["pooled"], "roi")
        if sampling_op == "RoiAlign"
        else helper.make_node("GridSample", ["map", "grid"], ["pooled"], "roi"),
        helper.make_node("Reshape", ["pooled", "rows"], ["row"], "row"),
        helper.make_node("Gemm", ["row", "w_fc"], ["hidden"], "fc"),
        helper.make_node("Relu", ["hidden"], ["active"], "relu"),
        helper.make_node("MatMul", ["active", "w_class"], ["y"], "class"),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    initializers.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["R", 2])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    regions = find_graph_regions(model)
    assert regions.layers == ("backbone", "fc")
    assert regions.output_layers == ("rpn", "class")
    assert regions.body == {"backbone", "roi", "row", "fc", "relu"}
