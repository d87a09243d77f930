"""Exponential moving average of a detector's weights: what is validated, saved as best and exported."""

import copy

import torch
from torch import Tensor

from hkd_det.models.family import PersonDetector


class MovingAverage:
    """`average` follows a detector with decay rising from 0 to `decay` over the first steps.

    Make it before taps are put into the detector: they would be copied along.
    """

    def __init__(self, detector: PersonDetector, decay: float) -> None:
        self.average = copy.deepcopy(detector).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, detector: PersonDetector) -> None:
        """Move a step towards the detector; running statistics included, whole numbers copied."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current: dict[str, Tensor] = detector.state_dict()
        for name, mean in self.average.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(current[name].to(mean.dtype), 1 - decay)
            else:
                mean.copy_(current[name])
