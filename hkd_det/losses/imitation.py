"""Imitation of feature maps: standardised mean squared error (PKD, Cao et al. 2022)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
