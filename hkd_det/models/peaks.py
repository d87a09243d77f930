"""Peaks: of neighbouring points that see one person only the best keeps its score (CenterNet, Zhou et al. 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SUPPRESSED_LOGIT = -20.0  # a logit: a score of 2e-9
# Over flat ground neighbours differ by rounding alone, and each runtime would choose another: such ties all stay.
TIE_TOLERANCE = 1e-3


def peak_nms(logits: Tensor, input_hw: tuple[int, int], strides: Sequence[int]) -> Tensor:
    """[B, A] score logits with those silenced that a point next to them, on their own level, exceeds.

    A max-pooling, not a suppression by boxes: every runtime has it, and it costs nothing.
    """
    kept, start = [], 0
    for stride in strides:
        height, width = input_hw[0] // stride, input_hw[1] // stride
        level = logits[:, start : start + height * width].reshape(-1, 1, height, width)
        highest = F.max_pool2d(level, 3, stride=1, padding=1)
        kept.append(
            torch.where(level >= highest - TIE_TOLERANCE, level, torch.full_like(level, SUPPRESSED_LOGIT)).flatten(1)
        )
        start += height * width
    return torch.cat(kept, 1)
