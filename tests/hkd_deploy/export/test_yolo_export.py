"""YOLO models as ONNX files: with the one-to-one head alone, or with suppression in the graph, for any batch size."""

import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hkd_deploy.export.exporter import export_onnx
from hkd_deploy.export.options import ExportOptions
from hkd_det.models.checkpoint import DetectorCheckpoint
from hkd_det.models.ultralytics import UltralyticsDetector, UltralyticsSpec, make_ultralytics_spec

SIZE_HW = (64, 96)


def lively(name: str) -> UltralyticsDetector:
    torch.manual_seed(0)
    layout = deepcopy(make_ultralytics_spec(name).model_yaml)
    layout["scales"][layout["scale"]][1] = 0.0625
    detector = UltralyticsDetector(UltralyticsSpec(name, layout))
    for part, module in detector.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.2, 1.0)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.weight, 0.8, 1.6)
        elif re.search(r"cv[23]\.\d\.2$", part):  # the last layers: no two points shall say the same
            torch.nn.init.normal_(module.weight, std=0.5)  # type: ignore[arg-type]
    return detector.eval()


@pytest.mark.parametrize(("name", "suppresses"), [("yolo11n", True), ("yolo26n", False)])
def test_an_exported_yolo_model_says_what_torch_says(tmp_path: Path, name: str, suppresses: bool) -> None:
    detector = lively(name)
    config = {"data": "street.yaml", "imgsz_hw": list(SIZE_HW)}
    checkpoint = DetectorCheckpoint(name, detector.spec, detector.state_dict(), config, 1, 0.5)
    export_onnx(checkpoint, tmp_path / "best.onnx", ExportOptions(SIZE_HW, batch=None))
    pictures = np.random.default_rng(0).integers(0, 256, (3, *SIZE_HW, 3)).astype(np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "best.onnx", providers=["CPUExecutionProvider"])
    boxes, scores, count = session.run(None, {"images": pictures})
    with torch.no_grad():
        wanted_boxes, wanted_scores = detector.predict(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert (count > 3).all() and (count < scores.shape[1]).all() == suppresses
    np.testing.assert_allclose(scores, wanted_scores.numpy(), atol=1e-4)
    for b, alive in enumerate(count):
        np.testing.assert_allclose(boxes[b, :alive], wanted_boxes[b, :alive].numpy(), atol=1e-2)
    model = onnx.load(tmp_path / "best.onnx")
    assert not any(node.op_type == "NonMaxSuppression" for node in model.graph.node)  # TensorRT for RTX has it not
    assert any(node.op_type == "Less" for node in model.graph.node) == suppresses  # by rounds instead
    weights = [weight.name for weight in model.graph.initializer]
    assert any(".cv3." in name for name in weights) == suppresses  # the one-to-many head's scores
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["license"].startswith("AGPL-3.0") and "NMS-free" not in said["description"]
