"""A teacher small enough to take apart in a test, and views for it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hkd_det.models.base import BaseDetector
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)


def pictures() -> Tensor:
    """24 pictures of 64 x 96: smooth noise, so that neighbouring pixels have to do with each other."""
    coarse = torch.rand(24, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    return (255 * nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")).to(torch.uint8)


@pytest.fixture
def teacher() -> BaseDetector:
    """Its normalisations hold the pictures' statistics, and scales and shifts that are not those of a fresh network."""
    torch.manual_seed(0)
    detector = HKDDetector(TINY).requires_grad_(False)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = 1.0
    detector.train()(pictures())
    return detector.eval()


@pytest.fixture
def views(tmp_path: Path) -> Path:
    np.save(tmp_path / "views.npy", pictures().numpy())
    return tmp_path / "views.npy"
