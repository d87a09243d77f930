"""Distribution focal loss (GFL, Li et al. 2020, eq. 6): a side's distance as a distribution over whole strides."""

from torch import Tensor
from torch.nn import functional as F


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """[...] cross-entropy of [..., bins] logits with the two bins around each distance [...], 0 <= d < bins - 1."""
    low = distances.long()
    upper_share = distances - low
    flat, below = logits.flatten(0, -2), low.flatten()
    to_low = F.cross_entropy(flat, below, reduction="none").view_as(distances)
    to_high = F.cross_entropy(flat, below + 1, reduction="none").view_as(distances)
    return to_low * (1 - upper_share) + to_high * upper_share
