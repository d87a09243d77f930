"""Loss functions of detection and distillation on tensors, not reduced unless stated."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SCORE_EPS = 1e-4  # Scores are clamped to [eps, 1 - eps]. An ONNX teacher can return exactly 0 or 1.
EPS = 1e-5  # added to the variance of a channel

ReduceMean = Callable[[Tensor], Tensor]
"""Maps a scalar of this process to its mean over all processes, at least 1: the divisor of a summed loss."""


def clamp_min_one(total: Tensor) -> Tensor:
    """Return `total`, at least 1: the `ReduceMean` of a single process."""
    return total.clamp(min=1.0)


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """Return the sum of scalar losses."""
    return torch.stack(list(losses.values())).sum()


def varifocal_loss(logits: Tensor, target_scores: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """Compute the varifocal loss (Zhang et al. 2021, eq. 2): scores learn the quality q of their boxes.

    q * BCE(p, q) where q > 0, else alpha * p^gamma * BCE(p, 0). The weights do not have gradients.

    Args:
        logits (Tensor[...]): Score logits.
        target_scores (Tensor[...]): Target scores q, 0 to 1.
        alpha: Weight of the background.
        gamma: Exponent that reduces the weight of easy background.

    Returns:
        loss (Tensor[...]): Loss per element.
    """
    with torch.no_grad():
        weight = torch.where(target_scores > 0, target_scores, alpha * logits.sigmoid().pow(gamma))
    return F.binary_cross_entropy_with_logits(logits, target_scores, reduction="none") * weight


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Compute the distribution focal loss (GFL, Li et al. 2020, eq. 6).

    The loss is the cross-entropy with the two bins next to the distance, weighted linearly.

    Args:
        logits (Tensor[..., reg_max]): Logits of the distance bins.
        distances (Tensor[...]): Target distances in bins, 0 <= d < reg_max - 1.

    Returns:
        loss (Tensor[...]): Loss per distance.
    """
    lower = distances.long()
    upper_weight = distances - lower
    flat_logits, flat_lower = logits.flatten(0, -2), lower.flatten()
    lower_loss = F.cross_entropy(flat_logits, flat_lower, reduction="none").view_as(distances)
    upper_loss = F.cross_entropy(flat_logits, flat_lower + 1, reduction="none").view_as(distances)
    return lower_loss * (1 - upper_weight) + upper_loss * upper_weight


def localization_distillation_loss(
    student_box_logits: Tensor, teacher_box_logits: Tensor, temperature: float = 2.0
) -> Tensor:
    """Compute the localization distillation loss (LD, Zheng et al. 2022).

    T^2 * KL(teacher || student) of the distance distributions at temperature T, averaged over the four sides.

    Args:
        student_box_logits (Tensor[..., 4, reg_max]): Logits of the student.
        teacher_box_logits (Tensor[..., 4, reg_max]): Logits of the teacher; no gradient.
        temperature: T.

    Returns:
        loss (Tensor[...]): Loss per box.
    """
    student = F.log_softmax(student_box_logits / temperature, -1)
    teacher = F.log_softmax(teacher_box_logits.detach() / temperature, -1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return divergence.mean(-1) * temperature**2


def quality_focal_kd_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """Compute |t - s|^beta * KL(t || s) of Bernoulli distributions (quality focal loss, Li et al. 2020, eq. 2).

    The entropy of the teacher score t is subtracted from the cross-entropy, so that the loss is 0 for equal scores.
    Scores are sigmoids: a softmax over one class would always be 1.

    Args:
        student_logits (Tensor[...]): Score logits of the student.
        teacher_logits (Tensor[...]): Score logits of the teacher; no gradient.
        beta: Exponent of the weight. The weight does not have a gradient.

    Returns:
        loss (Tensor[...]): Loss per element.
    """
    target = teacher_logits.detach().sigmoid()
    with torch.no_grad():
        weight = (target - student_logits.sigmoid()).abs().pow(beta)
    cross_entropy = F.binary_cross_entropy_with_logits(student_logits, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher_logits.detach(), target, reduction="none")
    return weight * (cross_entropy - entropy)


def pkd_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Compute half the squared error of standardized features, averaged over channels (PKD, Cao et al. 2022).

    Each channel of each item is standardized to mean 0 and variance 1 over its positions. The mean over the positions
    is then 1 - r with Pearson's correlation r: 0 for equal patterns of any scale and offset, 2 for opposite ones.

    Args:
        student_features (Tensor[N, C, ...]): Features of the student.
        teacher_features (Tensor[N, C, ...]): Features of the teacher; no gradient.

    Returns:
        loss (Tensor[N, ...]): float32, loss per position.
    """
    errors: Tensor = _PKDFunction.apply(_flatten_positions(student_features), _flatten_positions(teacher_features))
    return errors.view(len(student_features), *student_features.shape[2:])


def fg_balanced_mean(error: Tensor, fg_weights: Tensor, fg_ratio: float) -> Tensor:
    """Compute the mean of an error map with a fixed total weight of the foreground.

    Args:
        error (Tensor[B, H, W]): Errors per cell.
        fg_weights (Tensor[B, H, W]): Relative weights of the foreground cells, 0 for background. A bool mask gives all
            foreground cells the same weight.
        fg_ratio: Total weight of the foreground cells, 0 to 1. Has no effect for an image with only foreground or only
            background.

    Returns:
        mean (Tensor[B]): Weighted mean per image.
    """
    background = fg_weights == 0
    num_bg = background.sum((1, 2), keepdim=True)
    has_fg = num_bg < background[0].numel()
    fg_total = torch.where(num_bg > 0, torch.where(has_fg, fg_ratio, 0.0), 1.0)
    fg_weights = fg_weights.to(error.dtype)
    fg_weights = fg_weights / fg_weights.sum((1, 2), keepdim=True).clamp(min=torch.finfo(error.dtype).tiny)
    weight = torch.where(background, (1 - fg_total) / num_bg.clamp(min=1), fg_total * fg_weights)
    return (error * weight).sum((1, 2))


class _PKDFunction(torch.autograd.Function):
    """Computes the errors [N, T] of float32 features [N, T, C] at T positions.

    The backward pass is manual, because this loss is a large part of the cost of feature distillation. The
    normalizations of torch are slow unless each channel is contiguous, and autograd would store twice as many feature
    maps.
    """

    @staticmethod
    def forward(ctx: Any, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        student, scale = _standardize(student_features)
        teacher, _ = _standardize(teacher_features)
        difference = torch.sub(student, teacher, out=teacher)
        ctx.save_for_backward(student, scale, difference)
        return torch.linalg.vector_norm(difference, dim=2).square() * (0.5 / difference.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        student, scale, difference = ctx.saved_tensors
        grad = difference * (grad_output / difference.shape[2])[..., None]
        projection = (grad * student).mean(1, keepdim=True)
        # Remove the components that only shift or scale the channel: they do not change its standardized values.
        return grad.sub_(grad.mean(1, keepdim=True)).addcmul_(student, projection, value=-1).mul_(scale), None


def _flatten_positions(features: Tensor) -> Tensor:
    """Return features [N, C, ...] as [N, T, C] float32; without a copy of the layout if they are channels last."""
    return features.movedim(1, -1).flatten(1, -2).float()


def _standardize(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return features [N, T, C] with mean 0 and variance 1 over T, and the scale [N, 1, C] that was applied."""
    centered = features - features.mean(1, keepdim=True)
    scale = (centered.square().mean(1, keepdim=True) + EPS).rsqrt()
    return centered.mul_(scale), scale
