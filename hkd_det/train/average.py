"""Exponential moving average of a detector's weights: what is validated, saved as best and exported."""

import torch
from torch import Tensor

from hkd_det.models.detector import Detector


class MovingAverage:
    """`average` follows a detector with decay rising from 0 to `decay` over the first steps."""

    def __init__(self, detector: Detector, decay: float) -> None:
        # Built anew: a deep copy would bring the distiller's taps along.
        self.average = Detector(detector.spec).eval().requires_grad_(False)
        self.average.load_state_dict(detector.state_dict())
        self.average.to(next(detector.parameters()).device).to(memory_format=torch.channels_last)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, detector: Detector) -> None:
        """Move a step towards the detector; running statistics included, whole numbers copied."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current: dict[str, Tensor] = detector.state_dict()
        for name, mean in self.average.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(current[name].to(mean.dtype), 1 - decay)
            else:
                mean.copy_(current[name])
