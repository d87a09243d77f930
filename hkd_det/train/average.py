"""Exponential moving average of a detector's weights: what is validated, saved as best and exported."""

import copy

import torch
from torch import Tensor

from hkd_det.models.family import BaseDetector


class ModelEma:
    """`average` follows a detector with decay rising from 0 to `decay` over the first steps.

    Make it before taps are put into the detector: they would be copied along.
    """

    def __init__(self, detector: BaseDetector, decay: float) -> None:
        self.module = copy.deepcopy(detector).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, detector: BaseDetector) -> None:
        """Move a step towards the detector; running statistics included, whole numbers copied."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current: dict[str, Tensor] = detector.state_dict()
        for name, mean in self.module.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(current[name].to(mean.dtype), 1 - decay)
            else:
                mean.copy_(current[name])
