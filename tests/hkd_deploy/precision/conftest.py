"""Fixture `box_net`: a detector with three layers whose values can be computed by hand.

It returns the bounding box of all bright pixels. Convolutions compute the gray level, and the rest is decoding.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIDE = 96
METADATA = {
    "date": "2026-01-02T03:04:05+00:00",
    "version": "0.1.0",
    "license": "Apache-2.0",
    "task": "detect",
    "batch": "1",
    "imgsz": f"[{SIDE}, {SIDE}]",
    "hkd.format": "1",
    "hkd.model": "box-net",
    "hkd.parameters": "12",
    "hkd.flops": "3456",
    "hkd.preprocess": json.dumps(
        {"layout": "NHWC", "color": "RGB", "dtype": "uint8", "letterbox": "top-left", "pad": 114}
    ),
    "hkd.weights_sha256": "0f" * 32,
    "hkd.data": "nothing.yaml",
    "hkd.max_imgsz": f"[{SIDE}, {SIDE}]",
    "hkd.dynamic": "false",
    "hkd.raw": "false",
}
GRAY = np.array([[1 / 3, 1 / 3, 1 / 3], [1, -1, 0]], np.float32).reshape(2, 3, 1, 1)
IDENTITY = np.array([[1, 0], [0, 1]], np.float32).reshape(2, 2, 1, 1)
# One weight is 1000 times the others, on a channel that is 0 in gray images. INT8 rounds the other weights to 0.
OUTLIER = np.array([[1, 1000], [0, 1]], np.float32).reshape(2, 2, 1, 1)
# The same, on channels that cancel out in gray images.
CANCELLING = np.array([[1000 + 1 / 3, 1 / 3 - 1000, 1 / 3], [1, -1, 0]], np.float32).reshape(2, 3, 1, 1)


def box_model(
    first: NDArray[np.float32] = GRAY, second: NDArray[np.float32] = IDENTITY, opset: int = 17
) -> onnx.ModelProto:
    """Build preprocessing, two body layers, the output layer `score`, and decoding, as hkd-export writes them."""
    weights = {
        "w_first": first,
        "b_first": np.zeros(2, np.float32),
        "w_second": second,
        "b_second": np.zeros(2, np.float32),
        "w_score": np.array([1, 0], np.float32).reshape(1, 2, 1, 1),
        "b_score": np.zeros(1, np.float32),
        "white": np.array(255, np.float32),
        "bright": np.array(0.75, np.float32),
        "one": np.array(1, np.float32),
        "axis_1": np.array([1], np.int64),
    }

    def node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=f"{output}_node", **attributes)

    nodes = [
        node("Cast", ["images"], "float", to=TensorProto.FLOAT),
        node("Transpose", ["float"], "planes", perm=[0, 3, 1, 2]),
        node("Div", ["planes", "white"], "normal"),
        node("Conv", ["normal", "w_first", "b_first"], "first"),
        node("Relu", ["first"], "first_relu"),
        node("Conv", ["first_relu", "w_second", "b_second"], "second"),
        node("Relu", ["second"], "second_relu"),
        node("Conv", ["second_relu", "w_score", "b_score"], "score"),  # [1, 1, H, W]
        node("Squeeze", ["score", "axis_1"], "gray"),
        node("GreaterOrEqual", ["gray", "bright"], "is_bright"),
        node("Cast", ["is_bright"], "mask", to=TensorProto.FLOAT),
        node("ReduceMax", ["mask"], "rows", axes=[2], keepdims=0),
        node("ReduceMax", ["mask"], "columns", axes=[1], keepdims=0),
        *[
            step
            for name, line, last in (("x1", "columns", 0), ("y1", "rows", 0), ("x2", "columns", 1), ("y2", "rows", 1))
            for step in (
                node("ArgMax", [line], f"{name}_at", axis=1, keepdims=1, select_last_index=last),
                node("Cast", [f"{name}_at"], f"{name}_low", to=TensorProto.FLOAT),
            )
        ],
        node("Add", ["x2_low", "one"], "x2_high"),
        node("Add", ["y2_low", "one"], "y2_high"),
        node("Concat", ["x1_low", "y1_low", "x2_high", "y2_high"], "box", axis=1),
        node("Unsqueeze", ["box", "axis_1"], "boxes"),
        node("ReduceMax", ["gray"], "scores_row", axes=[1, 2], keepdims=0),
        node("Unsqueeze", ["scores_row", "axis_1"], "scores"),
        node("ReduceMax", ["mask"], "any", axes=[1, 2], keepdims=0),
        node("Cast", ["any"], "count", to=TensorProto.INT64),
    ]
    outputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 1, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 1]),
        helper.make_tensor_value_info("count", TensorProto.INT64, [1]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [1, SIDE, SIDE, 3])
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "box-net", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(model, METADATA)
    return model


@pytest.fixture
def box_net(tmp_path: Path) -> Callable[..., Path]:
    """Write a box net, `box_net(second=OUTLIER, changes={...})`, return its path; `changes` updates the metadata."""

    def write(name: str = "net.onnx", changes: Mapping[str, str] | None = None, **kwargs: object) -> Path:
        model = box_model(**kwargs)  # type: ignore[arg-type]
        helper.set_model_props(model, {**METADATA, **(changes or {})})
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return write


@pytest.fixture
def outlier() -> dict[str, NDArray[np.float32]]:
    """Arguments of `box_net` with which INT8 loses all information in the second layer."""
    return {"second": OUTLIER}


@pytest.fixture
def two_outliers() -> dict[str, NDArray[np.float32]]:
    """Arguments of `box_net` with which INT8 loses all information in both layers."""
    return {"first": CANCELLING, "second": OUTLIER}


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """Write a dataset of gray images with one bright person each; return its data YAML."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / "street" / "images" / split).mkdir(parents=True)
        (tmp_path / "street" / "labels" / split).mkdir(parents=True)
        for number in range(6):
            left, top = rng.integers(4, 40), rng.integers(2, 20)
            image = np.repeat(rng.integers(0, 120, (SIDE, SIDE, 1), np.uint8), 3, 2)
            image[top : top + 64, left : left + 26] = 230
            cv2.imwrite(str(tmp_path / "street" / "images" / split / f"{number}.png"), image)
            line = f"0 {(left + 13) / SIDE:.6f} {(top + 32) / SIDE:.6f} {26 / SIDE:.6f} {64 / SIDE:.6f}\n"
            (tmp_path / "street" / "labels" / split / f"{number}.txt").write_text(line)
    path = tmp_path / "street.yaml"
    path.write_text("path: street\ntrain: images/train\nval: images/val\nnames: {0: person}\n")
    return path
