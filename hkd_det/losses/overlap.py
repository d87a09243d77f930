"""Overlap of boxes as tensors: IoU between all pairs, generalised IoU between partners."""

import torch
from torch import Tensor


def pairwise_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """[B, M, A] IoU of boxes [B, M, 4] with boxes [B, A, 4]; 0 where both are empty."""
    low = torch.maximum(a_xyxy[:, :, None, :2], b_xyxy[:, None, :, :2])  # [B, M, A, 2]
    high = torch.minimum(a_xyxy[:, :, None, 2:], b_xyxy[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = _area(a_xyxy)[:, :, None] + _area(b_xyxy)[:, None] - shared
    return shared / union.clamp(min=1e-9)


def giou_loss(predicted_xyxy: Tensor, target_xyxy: Tensor) -> Tensor:
    """[...] 1 - GIoU of partner boxes [..., 4], 0..2 (Rezatofighi et al. 2019)."""
    low = torch.maximum(predicted_xyxy[..., :2], target_xyxy[..., :2])
    high = torch.minimum(predicted_xyxy[..., 2:], target_xyxy[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = (_area(predicted_xyxy) + _area(target_xyxy) - shared).clamp(min=1e-9)
    hull_low = torch.minimum(predicted_xyxy[..., :2], target_xyxy[..., :2])
    hull_high = torch.maximum(predicted_xyxy[..., 2:], target_xyxy[..., 2:])
    hull = (hull_high - hull_low).prod(-1).clamp(min=1e-9)
    return 1 - shared / union + (hull - union) / hull


def _area(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0).prod(-1)
