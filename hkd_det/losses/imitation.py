"""Imitation of feature maps: standardised mean squared error (PKD, Cao et al. 2022)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def standardise(features: Tensor, eps: float = 1e-5) -> Tensor:
    """[N, C, ...] with mean 0 and variance 1 in each channel of each item."""
    # A group a channel; contiguous, since other layouts take torch several times as long.
    plain = features.to(torch.float32, memory_format=torch.contiguous_format)
    return torch.group_norm(plain, features.shape[1], eps=eps)


def imitation_error(student: Tensor, teacher: Tensor) -> Tensor:
    """[N, ...] half the squared difference of standardised [N, C, ...] features, averaged over channels.

    Its mean is 1 - Pearson's correlation: 0 for equal patterns of any scale and offset, 1 for unrelated
    ones, 2 for opposite ones.
    """
    return 0.5 * F.mse_loss(standardise(student), standardise(teacher), reduction="none").mean(1)


def balanced_mean(error: Tensor, foreground: Tensor, share: float) -> Tensor:
    """[B] means of error maps [B, H, W]: `share` of the weight on foreground cells [B, H, W], the rest on the others.

    A picture with only one of the two kinds gets the plain mean of that kind.
    """
    mask = foreground.to(error.dtype)
    inside = (error * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
    outside = (error * (1 - mask)).sum((1, 2)) / (1 - mask).sum((1, 2)).clamp(min=1)
    part = torch.where(mask.sum((1, 2)) > 0, share, 0.0)
    part = torch.where((1 - mask).sum((1, 2)) > 0, part, 1.0)
    return part * inside + (1 - part) * outside
