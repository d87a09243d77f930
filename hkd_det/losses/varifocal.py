"""Varifocal loss (Zhang et al. 2021, eq. 2): scores learn the quality of their box."""

import torch
from torch import Tensor
from torch.nn import functional as F


def varifocal_loss(logits: Tensor, target_scores: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """[...] loss of score logits against quality targets 0..1, not reduced.

    Where quality q > 0: q x BCE(p, q), so that good examples count most. Elsewhere: alpha p^gamma BCE(p, 0),
    so that easy background counts least. The weights are constants of the step.
    """
    with torch.no_grad():
        weight = torch.where(target_scores > 0, target_scores, alpha * logits.sigmoid().pow(gamma))
    return F.binary_cross_entropy_with_logits(logits, target_scores, reduction="none") * weight
