"""Export of Ultralytics models, with NMS in the graph or without for a one-to-one head."""

import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hkd_deploy.export.exporter import export_onnx
from hkd_deploy.model_metadata import ExportOptions
from hkd_det.models.checkpoint import DetectorCheckpoint
from hkd_det.models.ultralytics import UltralyticsDetector, UltralyticsSpec, make_ultralytics_spec

IMGSZ_HW = (64, 96)


def make_detector(name: str) -> UltralyticsDetector:
    torch.manual_seed(0)
    model_yaml = deepcopy(make_ultralytics_spec(name).model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    detector = UltralyticsDetector(UltralyticsSpec(name, model_yaml))
    for part, module in detector.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.2, 1.0)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.weight, 0.8, 1.6)
        elif re.search(r"cv[23]\.\d\.2$", part):  # output layers: every anchor point has another score
            torch.nn.init.normal_(module.weight, std=0.5)  # type: ignore[arg-type]
    return detector.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "has_nms"), [("yolo11n", True), ("yolo26n", False)])
def test_ultralytics_export_agrees_with_torch(tmp_path: Path, name: str, has_nms: bool) -> None:
    detector = make_detector(name)
    config = {"data": "street.yaml", "imgsz_hw": list(IMGSZ_HW)}
    checkpoint = DetectorCheckpoint(name, detector.spec, detector.state_dict(), config, 1, 0.5)
    export_onnx(checkpoint, tmp_path / "best.onnx", ExportOptions(IMGSZ_HW, batch=None))
    images = np.random.default_rng(0).integers(0, 256, (3, *IMGSZ_HW, 3)).astype(np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "best.onnx", providers=["CPUExecutionProvider"])
    boxes, scores, count = session.run(None, {"images": images})
    with torch.no_grad():
        expected_boxes, expected_scores = detector.predict(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert (count > 3).all() and (count < scores.shape[1]).all() == has_nms
    np.testing.assert_allclose(scores, expected_scores.numpy(), atol=1e-4)
    for index, num_valid in enumerate(count):
        np.testing.assert_allclose(boxes[index, :num_valid], expected_boxes[index, :num_valid].numpy(), atol=1e-2)
    model = onnx.load(tmp_path / "best.onnx")
    assert not any(
        node.op_type == "NonMaxSuppression" for node in model.graph.node
    )  # TensorRT for RTX does not support it
    assert any(node.op_type == "Less" for node in model.graph.node) == has_nms  # of the iterative cluster NMS
    weights = [weight.name for weight in model.graph.initializer]
    assert any(".cv3." in name for name in weights) == has_nms  # scores of the one-to-many head
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["license"].startswith("AGPL-3.0") and "NMS-free" not in metadata["description"]
