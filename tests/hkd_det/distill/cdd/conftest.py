"""Tiny networks of all model families, with batch statistics that differ from the initial values."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from hkd_det.models.base import BaseDetector, ModelSpec
from hkd_det.models.checkpoint import build_from_spec
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNNSpec
from hkd_det.models.ultralytics import UltralyticsSpec, make_ultralytics_spec
from hkd_det.models.yolox import YOLOXSpec

NATIVE = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=12, head_depth=2)
BOTTLENECK = HKDDetectorSpec("resnet14t", {"channels": (6, 6, 8, 8), "stem_width": 8}, channels=12, head_depth=1)
TWO_STAGE = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))


def _make_tiny_yolo(name: str) -> UltralyticsSpec:
    model_yaml = deepcopy(make_ultralytics_spec(name).model_yaml)
    model_yaml["scales"][model_yaml["scale"]][1] = 0.0625
    return UltralyticsSpec(name, model_yaml)


SPECS: dict[str, Callable[[], ModelSpec]] = {
    "native": lambda: NATIVE,
    "bottleneck": lambda: BOTTLENECK,
    "two-stage": lambda: TWO_STAGE,
    "yolo11n": lambda: _make_tiny_yolo("yolo11n"),
    "yolo26n": lambda: _make_tiny_yolo("yolo26n"),
    "yolox": lambda: YOLOXSpec(width=0.125, act="hardswish"),
    "yolox, dense": lambda: YOLOXSpec(width=0.125, depthwise=False),
}


@pytest.fixture(params=SPECS)
def detector(request: pytest.FixtureRequest) -> BaseDetector:
    return randomize_batch_norm(build_from_spec(SPECS[request.param]()))


@pytest.fixture
def native_detector() -> BaseDetector:
    return randomize_batch_norm(build_from_spec(NATIVE))


def randomize_batch_norm(network: BaseDetector) -> BaseDetector:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]  # stubs: may be None
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]  # stubs: may be None
    return network.eval()
