"""Exports of torchvision against its own forward pass, with random weights."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from hkd_deploy import open_detector

pytestmark = pytest.mark.slow
INPUT_HW = (160, 224)
PERSON, NUM_CLASSES = 1, 2


def build_ssdlite() -> torch.nn.Module:
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    for layer in model.modules():  # the default weights give equal scores to all boxes
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(layer.weight)
    return model.eval()


def export(model: torch.nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.rand(1, 3, *INPUT_HW),), path, opset_version=17, dynamo=False, input_names=["images"]
        )


def test_ssdlite_detections_equal_those_of_torchvision(tmp_path: Path) -> None:
    """The image has the aspect ratio of the input, and twice its size."""
    model, path = build_ssdlite(), tmp_path / "ssdlite.onnx"
    export(model, path)
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (10, 14, 3), np.uint8), (448, 320), interpolation=cv2.INTER_CUBIC)
    resized = cv2.resize(image, INPUT_HW[::-1], interpolation=cv2.INTER_LINEAR)
    with torch.no_grad():
        (expected,) = model(torch.from_numpy(resized).permute(2, 0, 1)[None].float() / 255)
    is_person = expected["labels"] == PERSON
    boxes, scores = expected["boxes"][is_person].numpy() * 2, expected["scores"][is_person].numpy()
    with open_detector(path, model_config="torchvision") as detector:
        assert detector.metadata.license == "BSD-3-Clause (torchvision)"
        found = detector(image)
    assert len(found) == len(scores) >= 5
    for box, score in zip(boxes, scores, strict=True):
        errors = np.abs(found.boxes_xyxy - box).max(axis=1)
        assert np.any((errors < 0.1) & (np.abs(found.scores - score) < 1e-3)), (box, score)
