"""Anchor points: the centres of the pyramid's cells, and boxes as distances from them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def make_anchors(
    input_hw: tuple[int, int], strides: Sequence[int], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Centres [A, 2] (x, y) in input pixels and strides [A] of all cells, fine level first, row by row."""
    points, steps = [], []
    for stride in strides:
        rows = torch.arange(input_hw[0] // stride, device=device)
        columns = torch.arange(input_hw[1] // stride, device=device)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points.append((torch.stack([x, y], -1).reshape(-1, 2).float() + 0.5) * stride)
        # shape[0], not len(), stays free when exported.
        steps.append(torch.full((points[-1].shape[0],), float(stride), device=device))
    return torch.cat(points), torch.cat(steps)


def dist2bbox(box_logits: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    """Side distributions [B, A, 4, bins] at points [A, 2] to boxes [B, A, 4] xyxy in input pixels.

    The distance is the distribution's mean (GFL, Li et al. 2020, eq. 5) times the point's stride.
    """
    bins = torch.arange(box_logits.shape[-1], device=box_logits.device, dtype=box_logits.dtype)
    distances = (box_logits.softmax(-1) * bins).sum(-1) * strides[..., None]  # [B, A, 4]
    return torch.cat([anchor_points - distances[..., :2], anchor_points + distances[..., 2:]], -1)


def bbox2dist(boxes_xyxy: Tensor, anchor_points: Tensor, strides: Tensor, reg_max: int) -> Tensor:
    """Boxes [..., 4] to the distances [..., 4] of their sides from the points, in strides, 0 .. bins - 1.01."""
    left_up = anchor_points - boxes_xyxy[..., :2]
    right_down = boxes_xyxy[..., 2:] - anchor_points
    return (torch.cat([left_up, right_down], -1) / strides[..., None]).clamp(0, reg_max - 1.01)
