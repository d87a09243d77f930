"""Exports of Ultralytics against its own prediction on the same file, with random weights.

The export runs in another process: importing ultralytics changes the threads of torch and OpenCV.
"""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_deploy import open_detector
from hkd_deploy.external import ExternalDetector

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed"),
]
MIN_SCORE = 0.25
# A narrow image: the letterbox has padding on both sides. 96 is 3/5 of 160: the letterbox has no rounding.
IMAGE_HW, IMGSZ = (320, 192), 160
PREDICT = """
import sys
import cv2, numpy as np, torch
from ultralytics import RTDETR, YOLO

name, format_name, nms, image, folder = sys.argv[1:]
torch.manual_seed(0)
model = (RTDETR if "detr" in name else YOLO)(f"{name}.yaml")
net = model.model
net.names = {index: "person" if index == 0 else f"class{index}" for index in range(80)}
for layer in net.modules():
    if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)) and layer.weight.shape[0] == 80 and layer.bias is not None:
        layer.weight.data *= 3
        layer.bias.data[:], layer.bias.data[0] = -6, 0  # persons only
path = model.export(format=format_name, imgsz=160, nms=nms == "nms", verbose=False)
exported = RTDETR(path) if "detr" in name else YOLO(path, task="detect")
results = exported.predict(cv2.imread(image), conf=0.25, iou=0.7, imgsz=160, classes=[0], verbose=False)
boxes = results[0].boxes
np.savez("expected.npz", boxes=boxes.xyxy.cpu().numpy(), scores=boxes.conf.cpu().numpy(), path=path)
"""


def make_image(path: Path) -> Path:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (20, 12, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(small, IMAGE_HW[::-1], interpolation=cv2.INTER_CUBIC))
    return path


@pytest.mark.parametrize(
    ("name", "format_name", "nms", "output_format"),
    [
        ("yolov8n", "onnx", "", "yolo-raw"),
        ("yolov8n", "onnx", "nms", "yolo-e2e"),
        ("yolov8n", "openvino", "", "yolo-raw"),
        ("yolov5n", "onnx", "", "yolo-raw"),
        ("yolo11n", "onnx", "nms", "yolo-e2e"),
        ("yolov10n", "onnx", "", "yolo-e2e"),
        ("yolo26n", "onnx", "", "yolo-e2e"),
        ("rtdetr-l", "onnx", "", "yolo-e2e"),
    ],
)
def test_detections_equal_those_of_ultralytics(
    tmp_path: Path, name: str, format_name: str, nms: str, output_format: str
) -> None:
    image = make_image(tmp_path / "image.png")
    command = [sys.executable, "-W", "ignore", "-c", PREDICT, name, format_name, nms, str(image), str(tmp_path)]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    expected = np.load(tmp_path / "expected.npz")
    with open_detector(tmp_path / str(expected["path"])) as detector:
        assert isinstance(detector, ExternalDetector) and detector.metadata.license.startswith("AGPL-3.0")
        assert name.removesuffix("n")[-2:].upper() in detector.metadata.model.upper()
        model = detector._get_model()
        assert model.config.output_format == output_format
        model.config = replace(model.config, conf=MIN_SCORE)
        found = detector(image)
    assert len(expected["scores"]) >= 5
    assert len(found) == len(expected["scores"])
    for box, score in zip(expected["boxes"], expected["scores"], strict=True):  # equal scores have any order
        box_errors = np.abs(found.boxes_xyxy - box).max(axis=1)
        assert np.any((box_errors < 0.05) & (np.abs(found.scores - score) < 1e-4)), (box, score)
