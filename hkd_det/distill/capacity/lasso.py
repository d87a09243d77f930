"""Lasso on a compactor's rows, and guided gradient resetting: how a channel fades (Xie et al. 2023)."""

from torch import Tensor

EPS = 1e-8  # a row of zeros has no direction; without this its gradient would be NaN


def group_lasso(rows: Tensor) -> Tensor:
    """sum_i ||W_i||_2 over the rows of [C, K], a scalar."""
    return rows.norm(dim=1).sum()


def group_lasso_gradient(rows: Tensor) -> Tensor:
    """[C, K] the gradient of `lasso`, W_i / (||W_i|| + eps): finite everywhere, 0 at a row of zeros."""
    return rows / (rows.norm(dim=1, keepdim=True) + EPS)


def reset_gradient(grad: Tensor, rows: Tensor, masked: Tensor, weight: float) -> Tensor:
    """[C, K] M grad + lambda W_i / (||W_i|| + eps): a masked row hears the lasso alone. masked: [C] bool."""
    return grad * ~masked[:, None] + weight * group_lasso_gradient(rows)


def proximal_step(rows: Tensor, threshold: float) -> Tensor:
    """[C, K] rows shortened by `force`, those shorter than it exactly 0: the lasso's proximal step.

    It is where a gradient step of that length would lead, without its swinging to and fro around 0.
    """
    norm = rows.norm(dim=1, keepdim=True)
    return rows * ((norm - threshold).clamp(min=0) / (norm + EPS))
