"""A foreign model from file to detections: tiny graphs whose answers are known, and a real one on real pictures."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper

from hkd_det.boxes import box_iou
from hkd_det.datasets.coco import read_coco
from hkd_det.errors import DataError
from hkd_det.image import read_image
from hkd_det.onnxrt.detector import OnnxDetector, open_onnx_detector

SHARED = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
RECIPES = Path(__file__).parents[3] / "recipes" / "foreign"
HW = (64, 96)


def write_light_meter(
    path: Path, batch: int | str = "b", hw: tuple[Any, Any] = HW, kind: int = TensorProto.FLOAT
) -> Path:
    """A model that finds one person in the box 10, 20, 30, 60 of its input, as surely as the picture is bright."""
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers"], ["mean"], axes=[1, 2, 3], keepdims=1),  # [B, 1, 1, 1]
        helper.make_node("Div", ["mean", "white"], ["share"]),
        helper.make_node("Squeeze", ["share", "last"], ["row"]),  # [B, 1, 1]
        helper.make_node("Squeeze", ["row", "last"], ["scores"]),
        helper.make_node("Mul", ["row", "nothing"], ["none"]),
        helper.make_node("Add", ["none", "box"], ["boxes"]),
    ]
    constants = [
        helper.make_tensor("white", TensorProto.FLOAT, [], [255.0]),
        helper.make_tensor("nothing", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("box", TensorProto.FLOAT, [1, 1, 4], [10.0, 20.0, 30.0, 60.0]),
    ]
    images = helper.make_tensor_value_info("images", kind, [batch, 3, *hw])
    outputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [batch, 1, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 1]),
    ]
    graph = helper.make_graph(nodes, "light meter", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def described(path: Path, **values: Any) -> OnnxDetector:
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"output_format": "boxes-scores", **values}))
    return open_onnx_detector(path)


def grey(value: int, hw: tuple[int, int] = HW) -> np.ndarray:
    return np.full((*hw, 3), value, np.uint8)


@pytest.mark.parametrize("batch", ["b", 1, 2])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8])
def test_each_picture_gets_its_own_answer_whatever_the_graphs_batch(
    tmp_path: Path, batch: int | str, kind: int
) -> None:
    model = described(write_light_meter(tmp_path / "meter.onnx", batch, kind=kind))
    found = model([grey(51), grey(255), grey(102)])
    assert [score for one in found for score in one.scores] == pytest.approx([0.2, 1.0, 0.4])
    assert all(one.boxes_xyxy.tolist() == [[10, 20, 30, 60]] for one in found)
    assert model([]) == []


def test_boxes_come_back_in_each_pictures_own_pixels(tmp_path: Path) -> None:
    model = described(write_light_meter(tmp_path / "meter.onnx"), resize_mode="center", pad_value=0)
    (large, tall) = model([grey(255, (128, 192)), grey(255, (64, 48))])
    assert large.boxes_xyxy.tolist() == [[20, 40, 60, 120]]
    assert tall.boxes_xyxy.tolist() == [[0, 20, 6, 60]]  # 24 px of grey on the left; cut at the border
    assert large.scores == pytest.approx([1.0]) and tall.scores == pytest.approx([0.5])


def test_a_size_that_the_file_leaves_open_is_the_descriptions(tmp_path: Path) -> None:
    path = write_light_meter(tmp_path / "meter.onnx", hw=("h", "w"))
    with pytest.raises(DataError, match=r"meter\.onnx: leaves the size .* imgsz_hw: \[H, W\]"):
        described(path)
    assert described(path, imgsz_hw=[32, 48]).input_hw == (32, 48)
    fixed = write_light_meter(tmp_path / "fixed.onnx")
    with pytest.raises(DataError, match="imgsz_hw"):
        described(fixed, imgsz_hw=[32, 48])


def test_what_is_wrong_is_one_line_with_the_file(tmp_path: Path) -> None:
    path = write_light_meter(tmp_path / "meter.onnx")
    with pytest.raises(DataError, match=r"meter\.onnx: none of hkd-export's models.*meter\.yaml"):
        open_onnx_detector(path)
    with pytest.raises(DataError, match=r"meter\.yaml: color_ordr: no such setting; did you mean color_order\?"):
        described(path, color_ordr="bgr")
    with pytest.raises(DataError, match="no three colours in the layout NHWC"):
        described(path, layout="NHWC")
    with pytest.raises(DataError, match=r"not what its description says of yolo-e2e: expected \[B, N, 6\]"):
        described(path, output_format="yolo-e2e")([grey(9)])
    with pytest.raises(DataError, match=r"other\.yaml: no such description"):
        open_onnx_detector(path, config_path=tmp_path / "other.yaml")
    with pytest.raises(DataError, match=r"gone\.onnx: no such model file"):
        open_onnx_detector(tmp_path / "gone.onnx")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"meter\.onnx: ONNX Runtime .* cannot load it"):
        open_onnx_detector(path)


def test_metadata_of_our_exports_goes_before_a_file_beside_it(tmp_path: Path) -> None:
    path = write_light_meter(tmp_path / "meter.onnx")
    model = onnx.load(path)
    asked = {"layout": "NCHW", "color": "BGR", "letterbox": "top-left", "pad": 7}
    helper.set_model_props(model, {"hkd.format": "1", "hkd.preprocess": json.dumps(asked)})
    onnx.save(model, path)
    found = described(path, conf=0.9).config
    assert (found.color_order, found.pad_value, found.conf) == ("bgr", 7, 0.0)
    helper.set_model_props(model, {"hkd.format": "1", "hkd.preprocess": "{}"})
    onnx.save(model, path)
    with pytest.raises(DataError, match=r"hkd\.preprocess is damaged"):
        open_onnx_detector(path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="HKD_TEST_DATA is not set")
def test_a_real_foreign_detector_finds_the_people_of_real_pictures() -> None:
    model = open_onnx_detector(SHARED / "models" / "yolox_nano.onnx", config_path=RECIPES / "yolox.yaml", threads=1)
    samples = read_coco(SHARED / "inria" / "test.json", SHARED / "inria")[:8]
    people = met = 0
    for sample in samples:
        found = model([read_image(sample.path)])[0].filter(0.3)
        tall = sample.ground_truth.boxes_xyxy[~sample.ground_truth.ignore & (sample.ground_truth.heights_px >= 100)]
        people += len(tall)
        met += int((box_iou(tall, found.boxes_xyxy) >= 0.5).any(1).sum()) if len(found) else 0
    assert people >= 8 and met >= 0.8 * people
