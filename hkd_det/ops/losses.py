"""Varifocal loss (Zhang et al. 2021, eq. 2): scores learn the quality of their box.

Distribution focal loss (GFL, Li et al. 2020, eq. 6): a side's distance as a distribution over whole strides.

Localisation distillation (LD, Zheng et al. 2022): a student's side distributions learn the teacher's.

Learning a teacher's scores: binary cross-entropy where student and teacher disagree.

Imitation of feature maps: standardised mean squared error (PKD, Cao et al. 2022).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def varifocal_loss(logits: Tensor, target_scores: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """[...] loss of score logits against quality targets 0..1, not reduced.

    Where quality q > 0: q x BCE(p, q), so that good examples count most. Elsewhere: alpha p^gamma BCE(p, 0),
    so that easy background counts least. The weights are constants of the step.
    """
    with torch.no_grad():
        weight = torch.where(target_scores > 0, target_scores, alpha * logits.sigmoid().pow(gamma))
    return F.binary_cross_entropy_with_logits(logits, target_scores, reduction="none") * weight


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """[...] cross-entropy of [..., bins] logits with the two bins around each distance [...], 0 <= d < bins - 1."""
    low = distances.long()
    upper_share = distances - low
    flat, below = logits.flatten(0, -2), low.flatten()
    to_low = F.cross_entropy(flat, below, reduction="none").view_as(distances)
    to_high = F.cross_entropy(flat, below + 1, reduction="none").view_as(distances)
    return to_low * (1 - upper_share) + to_high * upper_share


def localization_distillation_loss(
    student_box_logits: Tensor, teacher_box_logits: Tensor, temperature: float = 2.0
) -> Tensor:
    """[...] KL divergence of [..., 4, bins] logits at a temperature, summed over bins, averaged over the four sides."""
    student = F.log_softmax(student_box_logits / temperature, -1)
    teacher = F.log_softmax(teacher_box_logits.detach() / temperature, -1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return divergence.mean(-1) * temperature**2


SCORE_EPS = 1e-4  # scores this near to 0 and 1 are no nearer: a black box may round


def quality_focal_kd_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """[...] BCE of the student's score s against the teacher's score t, weighted by |t - s|^power, not reduced.

    Sigmoid, never softmax: over one class a softmax is identically 1. The teacher's own entropy is
    subtracted, so that agreement costs 0.
    """
    target = teacher_logits.detach().sigmoid()
    with torch.no_grad():
        weight = (target - student_logits.sigmoid()).abs().pow(beta)
    cross = F.binary_cross_entropy_with_logits(student_logits, target, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher_logits.detach(), target, reduction="none")
    return weight * (cross - entropy)


EPS = 1e-5  # added to a channel's variance


def pkd_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """[N, ...] half the squared difference of standardised [N, C, ...] features, averaged over channels.

    Standardised: mean 0 and variance 1 in each channel of each item. The mean of what comes back is 1 - Pearson's
    correlation: 0 for equal patterns of any scale and offset, 1 for unrelated ones, 2 for opposite ones. The student
    alone gets a gradient.
    """
    errors: Tensor = _PKDFunction.apply(_flatten_cells(student_features), _flatten_cells(teacher_features))
    return errors.view(len(student_features), *student_features.shape[2:])


def fg_balanced_mean(error: Tensor, fg_mask: Tensor, fg_ratio: float) -> Tensor:
    """[B] means of error maps [B, H, W]: `share` of the weight on foreground cells [B, H, W], the rest on the others.

    A picture with only one of the two kinds gets the plain mean of that kind.
    """
    inside = fg_mask.sum((1, 2))
    outside = fg_mask[0].numel() - inside
    part = torch.where(inside > 0, fg_ratio, 0.0)
    part = torch.where(outside > 0, part, 1.0)
    of_inside, of_outside = part / inside.clamp(min=1), (1 - part) / outside.clamp(min=1)
    weight = torch.where(fg_mask, of_inside[:, None, None], of_outside[:, None, None])
    return (error * weight).sum((1, 2))


class _PKDFunction(torch.autograd.Function):
    """[N, T] errors of [N, T, C] float32 features at T cells.

    By hand, as this is much of what the levels cost: torch's normalisations are slow unless a channel lies in one
    piece, which maps, channels last, would first have to be brought to, and autograd would keep twice as many of them.
    """

    @staticmethod
    def forward(ctx: Any, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        mine, scale = _standardize(student_features)
        theirs, _ = _standardize(teacher_features)
        difference = torch.sub(mine, theirs, out=theirs)
        ctx.save_for_backward(mine, scale, difference)
        return torch.linalg.vector_norm(difference, dim=2).square() * (0.5 / difference.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        mine, scale, difference = ctx.saved_tensors
        of_mine = difference * (grad_output / difference.shape[2])[..., None]
        along = (of_mine * mine).mean(1, keepdim=True)
        # What would only shift or stretch the channel changes nothing of its standardised form.
        return of_mine.sub_(of_mine.mean(1, keepdim=True)).addcmul_(mine, along, value=-1).mul_(scale), None


def _flatten_cells(features: Tensor) -> Tensor:
    """[N, C, ...] as [N, T, C] float32, cell by cell: as they lie in memory, if they are channels last."""
    return features.movedim(1, -1).flatten(1, -2).float()


def _standardize(features: Tensor) -> tuple[Tensor, Tensor]:
    """[N, T, C] with mean 0 and variance 1 over the cells, and the factor [N, 1, C] that it took."""
    centred = features - features.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + EPS).rsqrt()
    return centred.mul_(scale), scale


ReduceMean = Callable[[Tensor], Tensor]


def clamp_min_one(total: Tensor) -> Tensor:
    """The norm of the only process: the sum itself, at least 1."""
    return total.clamp(min=1.0)


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the terms."""
    return torch.stack(list(losses.values())).sum()
