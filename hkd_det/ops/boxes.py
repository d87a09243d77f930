"""Overlap of boxes as tensors: IoU between all pairs, generalised IoU between partners."""

import torch
from torch import Tensor


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """[B, M, A] IoU of boxes [B, M, 4] with boxes [B, A, 4]; 0 where both are empty."""
    # Coordinate by coordinate: a trailing axis of two costs several times as much.
    ax1, ay1, ax2, ay2 = a_xyxy[:, :, None].unbind(-1)  # [B, M, 1]
    bx1, by1, bx2, by2 = b_xyxy[:, None].unbind(-1)  # [B, 1, A]
    across = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)  # [B, M, A]
    down = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    shared = across * down
    union = _box_area(a_xyxy)[:, :, None] + _box_area(b_xyxy)[:, None] - shared
    return shared / union.clamp(min=1e-9)


def generalized_box_iou_loss(predicted_xyxy: Tensor, target_xyxy: Tensor) -> Tensor:
    """[...] 1 - GIoU of partner boxes [..., 4], 0..2 (Rezatofighi et al. 2019)."""
    low = torch.maximum(predicted_xyxy[..., :2], target_xyxy[..., :2])
    high = torch.minimum(predicted_xyxy[..., 2:], target_xyxy[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = (_box_area(predicted_xyxy) + _box_area(target_xyxy) - shared).clamp(min=1e-9)
    hull_low = torch.minimum(predicted_xyxy[..., :2], target_xyxy[..., :2])
    hull_high = torch.maximum(predicted_xyxy[..., 2:], target_xyxy[..., 2:])
    hull = (hull_high - hull_low).prod(-1).clamp(min=1e-9)
    return 1 - shared / union + (hull - union) / hull


def _box_area(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0).prod(-1)


CELLS_PER_GT_HEIGHT = 8  # in height, on the level a person belongs to


def points_in_boxes(points: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """[B, M, A] bool: point [A, 2] lies strictly inside box [B, M, 4]."""
    x1, y1, x2, y2 = boxes_xyxy[..., None, :].unbind(-1)  # [B, M, 1]
    x, y = points.unbind(-1)  # [A]
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def clip_boxes_traceable(boxes_xyxy: Tensor, image_hw: Tensor) -> Tensor:
    """Boxes [..., 4] cut at the borders of pictures of picture_hw [2] pixels."""
    return torch.minimum(boxes_xyxy.clamp(min=0), image_hw.flip(0).repeat(2))
