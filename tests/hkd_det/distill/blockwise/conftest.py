"""A tiny teacher and images for it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hkd_det.models.base import BaseDetector
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)


def make_images() -> Tensor:
    """Return smooth noise, uint8 [24, 3, 64, 96]: neighboring pixels are correlated."""
    coarse = torch.rand(24, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    return (255 * nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")).to(torch.uint8)


@pytest.fixture
def teacher() -> BaseDetector:
    """Batch statistics are those of the images; scales and shifts differ from the initial values."""
    torch.manual_seed(0)
    detector = HKDDetector(TINY).requires_grad_(False)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = 1.0
    detector.train()(make_images())
    return detector.eval()


@pytest.fixture
def images_path(tmp_path: Path) -> Path:
    path = tmp_path / "images.npy"
    np.save(path, make_images().numpy())
    return path
