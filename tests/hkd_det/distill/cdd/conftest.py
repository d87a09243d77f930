"""Tiny networks of all three families, with statistics that are no one's start values."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import ModelSpec, build_from_spec
from hkd_det.models.detector import HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNNSpec
from hkd_det.models.ultralytics import UltralyticsSpec, make_ultralytics_spec

OURS = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=12, head_depth=2)
BOTTLENECK = HKDDetectorSpec("resnet14t", {"channels": (6, 6, 8, 8), "stem_width": 8}, channels=12, head_depth=1)
TWO_STAGE = FasterRCNNSpec("resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256))


def _yolo(name: str) -> UltralyticsSpec:
    layout = deepcopy(make_ultralytics_spec(name).model_yaml)
    layout["scales"][layout["scale"]][1] = 0.0625
    return UltralyticsSpec(name, layout)


SPECS: dict[str, Callable[[], ModelSpec]] = {
    "ours": lambda: OURS,
    "bottleneck": lambda: BOTTLENECK,
    "two-stage": lambda: TWO_STAGE,
    "yolo11n": lambda: _yolo("yolo11n"),
    "yolo26n": lambda: _yolo("yolo26n"),
}


@pytest.fixture(params=SPECS)
def detector(request: pytest.FixtureRequest) -> BaseDetector:
    return lively(build_from_spec(SPECS[request.param]()))


@pytest.fixture
def ours() -> BaseDetector:
    return lively(build_from_spec(OURS))


def lively(network: BaseDetector) -> BaseDetector:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return network.eval()
