"""`OnnxDetector` on small graphs with known outputs, and a real model on real images."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper

from hkd_det.datasets.coco import read_coco
from hkd_det.errors import DataError
from hkd_det.image import read_image
from hkd_det.onnxrt.detector import OnnxDetector, open_onnx_detector
from hkd_det.structures import box_iou

TEST_DATA = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
RECIPES = Path(__file__).parents[3] / "recipes" / "onnx"
HW = (64, 96)


def write_brightness_model(
    path: Path, batch: int | str = "b", hw: tuple[Any, Any] = HW, dtype: int = TensorProto.FLOAT
) -> Path:
    """Write a model that returns the box 10, 20, 30, 60 with the mean brightness of the image as score."""
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers"], ["mean"], axes=[1, 2, 3], keepdims=1),  # [B, 1, 1, 1]
        helper.make_node("Div", ["mean", "white"], ["ratio"]),
        helper.make_node("Squeeze", ["ratio", "last"], ["row"]),  # [B, 1, 1]
        helper.make_node("Squeeze", ["row", "last"], ["scores"]),
        helper.make_node("Mul", ["row", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "box"], ["boxes"]),
    ]
    constants = [
        helper.make_tensor("white", TensorProto.FLOAT, [], [255.0]),
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("box", TensorProto.FLOAT, [1, 1, 4], [10.0, 20.0, 30.0, 60.0]),
    ]
    images = helper.make_tensor_value_info("images", dtype, [batch, 3, *hw])
    outputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [batch, 1, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 1]),
    ]
    graph = helper.make_graph(nodes, "brightness", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def open_with_config(path: Path, **values: Any) -> OnnxDetector:
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"output_format": "boxes-scores", **values}))
    return open_onnx_detector(path)


def make_gray(value: int, hw: tuple[int, int] = HW) -> np.ndarray:
    return np.full((*hw, 3), value, np.uint8)


@pytest.mark.parametrize("batch", ["b", 1, 2])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.UINT8])
def test_each_image_has_its_detections_for_any_batch_size(tmp_path: Path, batch: int | str, dtype: int) -> None:
    model = open_with_config(write_brightness_model(tmp_path / "model.onnx", batch, dtype=dtype))
    detections = model([make_gray(51), make_gray(255), make_gray(102)])
    assert [score for image_detections in detections for score in image_detections.scores] == pytest.approx(
        [0.2, 1.0, 0.4]
    )
    assert all(image_detections.boxes_xyxy.tolist() == [[10, 20, 30, 60]] for image_detections in detections)
    assert model([]) == []


def test_boxes_are_in_pixels_of_each_image(tmp_path: Path) -> None:
    model = open_with_config(write_brightness_model(tmp_path / "model.onnx"), resize_mode="center", pad_value=0)
    (large, tall) = model([make_gray(255, (128, 192)), make_gray(255, (64, 48))])
    assert large.boxes_xyxy.tolist() == [[20, 40, 60, 120]]
    assert tall.boxes_xyxy.tolist() == [[0, 20, 6, 60]]  # 24 px of padding on the left; clipped to the image
    assert large.scores == pytest.approx([1.0]) and tall.scores == pytest.approx([0.5])


def test_dynamic_input_size_comes_from_the_config(tmp_path: Path) -> None:
    path = write_brightness_model(tmp_path / "model.onnx", hw=("h", "w"))
    with pytest.raises(DataError, match=r"model\.onnx: the input size is dynamic.* imgsz_hw: \[H, W\]"):
        open_with_config(path)
    assert open_with_config(path, imgsz_hw=[32, 48]).input_hw == (32, 48)
    fixed = write_brightness_model(tmp_path / "fixed.onnx")
    with pytest.raises(DataError, match="imgsz_hw"):
        open_with_config(fixed, imgsz_hw=[32, 48])


def test_error_names_file_and_problem(tmp_path: Path) -> None:
    path = write_brightness_model(tmp_path / "model.onnx")
    with pytest.raises(DataError, match=r"model\.onnx: not exported by hkd-export.*model\.yaml"):
        open_onnx_detector(path)
    with pytest.raises(DataError, match=r"model\.yaml: color_ordr: no such setting\. Did you mean color_order\?"):
        open_with_config(path, color_ordr="bgr")
    with pytest.raises(DataError, match="expected 3 channels in the layout NHWC"):
        open_with_config(path, layout="NHWC")
    with pytest.raises(DataError, match=r"the outputs are not in the format yolo-e2e: expected \[B, N, 6\]"):
        open_with_config(path, output_format="yolo-e2e")([make_gray(9)])
    with pytest.raises(DataError, match=r"other\.yaml: no such file"):
        open_onnx_detector(path, config_path=tmp_path / "other.yaml")
    with pytest.raises(DataError, match=r"gone\.onnx: no such model file"):
        open_onnx_detector(tmp_path / "gone.onnx")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"model\.onnx: ONNX Runtime .* cannot load it"):
        open_onnx_detector(path)


def test_metadata_of_hkd_export_overrides_the_yaml_file(tmp_path: Path) -> None:
    path = write_brightness_model(tmp_path / "model.onnx")
    model = onnx.load(path)
    preprocess = {"layout": "NCHW", "color": "BGR", "letterbox": "top-left", "pad": 7}
    helper.set_model_props(model, {"hkd.format": "1", "hkd.preprocess": json.dumps(preprocess)})
    onnx.save(model, path)
    config = open_with_config(path, conf=0.9).config
    assert (config.color_order, config.pad_value, config.conf) == ("bgr", 7, 0.0)
    helper.set_model_props(model, {"hkd.format": "1", "hkd.preprocess": "{}"})
    onnx.save(model, path)
    with pytest.raises(DataError, match=r"hkd\.preprocess is damaged"):
        open_onnx_detector(path)


@pytest.mark.skipif(not TEST_DATA.is_dir(), reason="HKD_TEST_DATA is not set")
def test_yolox_detects_persons_in_real_images() -> None:
    model = open_onnx_detector(TEST_DATA / "models" / "yolox_nano.onnx", config_path=RECIPES / "yolox.yaml", threads=1)
    samples = read_coco(TEST_DATA / "inria" / "test.json", TEST_DATA / "inria")[:8]
    num_gt = num_matched = 0
    for sample in samples:
        detections = model([read_image(sample.path)])[0].filter(0.3)
        gt = sample.ground_truth
        gt_boxes = gt.boxes_xyxy[~gt.ignore & (gt.heights_px >= 100)]
        num_gt += len(gt_boxes)
        num_matched += int((box_iou(gt_boxes, detections.boxes_xyxy) >= 0.5).any(1).sum()) if len(detections) else 0
    assert num_gt >= 8 and num_matched >= 0.8 * num_gt
