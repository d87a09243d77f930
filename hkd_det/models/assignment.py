"""Assignment: which points answer for which person. Task-aligned (TOOD, Feng et al. 2021, eq. 1).

A point's claim on a person is t = score^alpha x IoU^beta. A person takes its `top` best-claiming points
among those inside it; a point claimed twice goes to the person it overlaps most. `top` = 1 is the
one-to-one assignment of the end-to-end branch (YOLOv10). The score a point should give is its IoU-scaled
claim. Points inside an ignore region that answer for nobody are left out of the loss.

With `top` = 1 which of several equally good points wins would be a matter of chance, and chance can't be
learnt: `centred` adds a claim for the point nearest the middle, on the level whose cells are an eighth of
the person's height (as CSP, Liu et al. 2019, puts each pedestrian at its centre and scale).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hkd_det.losses.overlap import box_iou

CELLS_PER_GT_HEIGHT = 8  # in height, on the level a person belongs to


@dataclass(frozen=True, eq=False)
class AssignResult:
    """What the A points of each picture should say.

    positive: [B, A] bool, the point answers for a person.
    owner: [B, A] that person's place in the truth; anything where not positive.
    boxes_xyxy: [B, A, 4] that person's box, input pixels; anything where not positive.
    quality: [B, A] the score it should give, 0..1; 0 where not positive.
    counted: [B, A] bool, the point's score is judged: false inside ignore regions.
    """

    fg_mask: Tensor
    target_gt_idx: Tensor
    boxes_xyxy: Tensor
    target_scores: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class TaskAlignedAssigner:
    """Claims with the paper's exponents; `top` points a person; `centred` 0 is the paper's own claim."""

    topk: int
    alpha: float = 0.5
    beta: float = 6.0
    center_weight: float = 0.0

    @torch.no_grad()
    def __call__(
        self, scores: Tensor, boxes_xyxy: Tensor, anchor_points: Tensor, strides: Tensor, targets: "Targets"
    ) -> AssignResult:
        """Scores [B, A] 0..1 and boxes [B, A, 4] of points [A, 2] against the truth."""
        inside = (
            points_in_boxes(anchor_points, _expand_small_boxes(targets.boxes_xyxy, strides.min()))
            & targets.valid[..., None]
        )  # [B, M, A]
        iou = box_iou(targets.boxes_xyxy, boxes_xyxy).clamp(min=0) * inside  # [B, M, A]
        claim = scores[:, None].pow(self.alpha) * iou.pow(self.beta) * inside
        if self.center_weight:
            claim = (
                claim
                * (-self.center_weight * _compute_center_distance(targets.boxes_xyxy, anchor_points, strides)).exp()
            )
        mine = self._select_topk_points(claim, iou, inside)
        positive = mine.any(1)
        owner = mine.float().argmax(1) if mine.shape[1] else torch.zeros_like(positive, dtype=torch.long)
        ignored = (points_in_boxes(anchor_points, targets.boxes_xyxy) & targets.ignore[..., None]).any(1)
        return AssignResult(
            fg_mask=positive,
            target_gt_idx=owner,
            boxes_xyxy=_gather_gt_boxes(targets.boxes_xyxy, owner),
            target_scores=_normalize_align_metric(claim * mine, iou * mine),
            loss_mask=positive | ~ignored,
        )

    def _select_topk_points(self, align_metric: Tensor, iou: Tensor, inside_mask: Tensor) -> Tensor:
        """[B, M, A] bool: each person's best points, each point with one person at most."""
        persons, count = align_metric.shape[1:]
        if persons == 0:
            return inside_mask
        # At the start every IoU may be 0: then the first points inside the box serve, never a point outside it.
        rank = torch.where(inside_mask, align_metric, -1.0)
        best = rank.topk(min(self.topk, count), dim=2).indices
        chosen = torch.zeros_like(inside_mask).scatter_(2, best, value=True) & inside_mask
        contested = chosen.sum(1, keepdim=True) > 1
        favourite = torch.where(chosen, iou, -1.0).argmax(1, keepdim=True)  # [B, 1, A]
        winner = torch.zeros_like(chosen).scatter(1, favourite, value=True)
        return torch.where(contested, chosen & winner, chosen)


@dataclass(frozen=True, eq=False)
class Targets:
    """The people of B pictures, padded to the largest number M.

    boxes_xyxy: [B, M, 4] input pixels. real: [B, M] bool, a person to find. ignore: [B, M] bool, a region
    to leave alone. Padding is neither.
    """

    boxes_xyxy: Tensor
    valid: Tensor
    ignore: Tensor

    def to(self, device: torch.device) -> "Targets":
        """The same truth on another device."""
        return Targets(self.boxes_xyxy.to(device), self.valid.to(device), self.ignore.to(device))


def points_in_boxes(points: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """[B, M, A] bool: point [A, 2] lies strictly inside box [B, M, 4]."""
    x1, y1, x2, y2 = boxes_xyxy[..., None, :].unbind(-1)  # [B, M, 1]
    x, y = points.unbind(-1)  # [A]
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def _compute_center_distance(boxes_xyxy: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    """[B, M, A] squared distance from a box's middle, in strides, plus squared octaves from the level of its height."""
    x1, y1, x2, y2 = boxes_xyxy[..., None, :].unbind(-1)  # [B, M, 1]
    x, y = anchor_points.unbind(-1)  # [A]
    across, down = (x - (x1 + x2) / 2) / strides, (y - (y1 + y2) / 2) / strides  # [B, M, A]
    octaves = torch.log2((y2 - y1).clamp(min=1.0)) - torch.log2(CELLS_PER_GT_HEIGHT * strides)
    return across.square() + down.square() + octaves.square()


def _expand_small_boxes(boxes_xyxy: Tensor, min_side_px: Tensor) -> Tensor:
    """Boxes grown about their centres to `side` pixels, so that a distant person still holds a point."""
    centre = (boxes_xyxy[..., :2] + boxes_xyxy[..., 2:]) / 2
    half = ((boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]) / 2).clamp(min=float(min_side_px) / 2 + 1e-3)
    return torch.cat([centre - half, centre + half], -1)


def _gather_gt_boxes(boxes_xyxy: Tensor, target_gt_idx: Tensor) -> Tensor:
    if boxes_xyxy.shape[1] == 0:
        return boxes_xyxy.new_zeros((*target_gt_idx.shape, 4))
    return boxes_xyxy.gather(1, target_gt_idx[..., None].expand(-1, -1, 4))


def _normalize_align_metric(align_metric: Tensor, iou: Tensor) -> Tensor:
    """[B, A]: claims scaled so that each person's best point is asked for its best IoU (TOOD, eq. 4)."""
    if align_metric.shape[1] == 0:
        return align_metric.new_zeros((align_metric.shape[0], align_metric.shape[2]))
    best_claim = align_metric.amax(2, keepdim=True)
    best_iou = iou.amax(2, keepdim=True)
    return (align_metric * best_iou / (best_claim + 1e-9)).amax(1)
