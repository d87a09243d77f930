"""Task-aligned assignment of anchor points to ground-truth boxes (TOOD, Feng et al. 2021, section 3.2).

The alignment metric of a point and a box is t = score^alpha * IoU^beta. For each box, the `topk` points with the
highest metric among the points inside the box are selected. A point that is selected for several boxes is assigned to
the box with the highest IoU. The target score of a point is its metric, scaled so that the highest target score of a
box equals the highest IoU of that box.

`topk` = 1 is the one-to-one assignment of the end-to-end branch (YOLOv10). There, several points often have nearly the
same metric, so that the assignment would depend on rounding. `center_weight` therefore multiplies the metric by
exp(-center_weight * d). The distance d is the squared distance from the box center in strides, plus the squared
distance in octaves from the level whose cells are an eighth of the box height. CSP (Liu et al. 2019) also assigns a box
to its center and scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hkd_det.models.base import Targets
from hkd_det.ops.boxes import CELLS_PER_GT_HEIGHT, batched_box_iou, points_in_boxes


@dataclass(frozen=True, eq=False)
class AssignResult:
    """Training targets of A anchor points.

    Attributes:
        fg_mask (Tensor[B, A]): bool, the point is assigned to a ground-truth box.
        target_gt_idx (Tensor[B, A]): int64, index of that box in the targets. Arbitrary outside `fg_mask`.
        boxes_xyxy (Tensor[B, A, 4]): That box, input pixels. Arbitrary outside `fg_mask`.
        target_scores (Tensor[B, A]): Target score, 0 to 1. 0 outside `fg_mask`.
        loss_mask (Tensor[B, A]): bool, the point counts in the score loss. False for background in ignore regions.
    """

    fg_mask: Tensor
    target_gt_idx: Tensor
    boxes_xyxy: Tensor
    target_scores: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class TaskAlignedAssigner:
    """Assigns anchor points to ground-truth boxes.

    Attributes:
        topk: Maximum number of points per ground-truth box.
        alpha: Exponent of the score.
        beta: Exponent of the IoU.
        center_weight: Strength of the preference for the box center and its level. 0 gives the metric of the paper.
    """

    topk: int
    alpha: float = 0.5
    beta: float = 6.0
    center_weight: float = 0.0

    @torch.no_grad()
    def __call__(
        self, scores: Tensor, boxes_xyxy: Tensor, anchor_points: Tensor, strides: Tensor, targets: Targets
    ) -> AssignResult:
        """Assign the anchor points of a batch.

        Args:
            scores (Tensor[B, A]): Predicted scores, 0 to 1.
            boxes_xyxy (Tensor[B, A, 4]): Predicted boxes, input pixels.
            anchor_points (Tensor[A, 2]): (x, y), input pixels.
            strides (Tensor[A]): Strides of the points, input pixels.
            targets: Ground truth of the batch.

        Returns:
            Training targets of all points.
        """
        inside = (
            points_in_boxes(anchor_points, _expand_small_boxes(targets.boxes_xyxy, strides.min()))
            & targets.valid[..., None]
        )  # [B, M, A]
        iou = batched_box_iou(targets.boxes_xyxy, boxes_xyxy).clamp(min=0) * inside  # [B, M, A]
        metric = scores[:, None].pow(self.alpha) * iou.pow(self.beta) * inside
        if self.center_weight:
            distance = _compute_center_distance(targets.boxes_xyxy, anchor_points, strides)
            metric = metric * (-self.center_weight * distance).exp()
        assigned = self._select_topk_points(metric, iou, inside)
        fg_mask = assigned.any(1)
        gt_idx = assigned.float().argmax(1) if assigned.shape[1] else torch.zeros_like(fg_mask, dtype=torch.long)
        ignored = (points_in_boxes(anchor_points, targets.boxes_xyxy) & targets.ignore[..., None]).any(1)
        return AssignResult(
            fg_mask=fg_mask,
            target_gt_idx=gt_idx,
            boxes_xyxy=_gather_gt_boxes(targets.boxes_xyxy, gt_idx),
            target_scores=_normalize_align_metric(metric * assigned, iou * assigned),
            loss_mask=fg_mask | ~ignored,
        )

    def _select_topk_points(self, align_metric: Tensor, iou: Tensor, inside_mask: Tensor) -> Tensor:
        """Return [B, M, A] bool: the best points of each box, each point for at most one box."""
        num_gt, num_points = align_metric.shape[1:]
        if num_gt == 0:
            return inside_mask
        # At the start of training all IoUs may be 0. Rank points inside the box above all points outside it.
        rank = torch.where(inside_mask, align_metric, -1.0)
        best = rank.topk(min(self.topk, num_points), dim=2).indices
        selected = torch.zeros_like(inside_mask).scatter_(2, best, value=True) & inside_mask
        is_contested = selected.sum(1, keepdim=True) > 1
        highest_iou = torch.where(selected, iou, -1.0).argmax(1, keepdim=True)  # [B, 1, A]
        winner = torch.zeros_like(selected).scatter(1, highest_iou, value=True)
        return torch.where(is_contested, selected & winner, selected)


def _compute_center_distance(boxes_xyxy: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    """Return [B, M, A]: squared distance from the box center in strides plus squared octaves from the box's level."""
    x1, y1, x2, y2 = boxes_xyxy[..., None, :].unbind(-1)  # [B, M, 1]
    x, y = anchor_points.unbind(-1)  # [A]
    dx, dy = (x - (x1 + x2) / 2) / strides, (y - (y1 + y2) / 2) / strides  # [B, M, A]
    octaves = torch.log2((y2 - y1).clamp(min=1.0)) - torch.log2(CELLS_PER_GT_HEIGHT * strides)
    return dx.square() + dy.square() + octaves.square()


def _expand_small_boxes(boxes_xyxy: Tensor, min_side_px: Tensor) -> Tensor:
    """Expand boxes about their centers to a minimum side, so that even a tiny box contains a point."""
    center = (boxes_xyxy[..., :2] + boxes_xyxy[..., 2:]) / 2
    half = ((boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]) / 2).clamp(min=float(min_side_px) / 2 + 1e-3)
    return torch.cat([center - half, center + half], -1)


def _gather_gt_boxes(boxes_xyxy: Tensor, target_gt_idx: Tensor) -> Tensor:
    if boxes_xyxy.shape[1] == 0:
        return boxes_xyxy.new_zeros((*target_gt_idx.shape, 4))
    return boxes_xyxy.gather(1, target_gt_idx[..., None].expand(-1, -1, 4))


def _normalize_align_metric(align_metric: Tensor, iou: Tensor) -> Tensor:
    """Return [B, A]: metrics scaled so that the best point of each box has its best IoU."""
    if align_metric.shape[1] == 0:
        return align_metric.new_zeros((align_metric.shape[0], align_metric.shape[2]))
    best_metric = align_metric.amax(2, keepdim=True)
    best_iou = iou.amax(2, keepdim=True)
    return (align_metric * best_iou / (best_metric + 1e-9)).amax(1)
