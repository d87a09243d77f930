"""Assignment: which points answer for which person. Task-aligned (TOOD, Feng et al. 2021, eq. 1).

A point's claim on a person is t = score^alpha x IoU^beta. A person takes its `top` best-claiming points
among those inside it; a point claimed twice goes to the person it overlaps most. `top` = 1 is the
one-to-one assignment of the end-to-end branch (YOLOv10). The score a point should give is its IoU-scaled
claim. Points inside an ignore region that answer for nobody are left out of the loss.

With `top` = 1 which of several equally good points wins would be a matter of chance, and chance can't be
learnt: `centred` adds a claim for the point nearest the middle, on the level whose cells are an eighth of
the person's height (as CSP, Liu et al. 2019, puts each pedestrian at its centre and scale).

The detector's own loss against the truth: scores of both branches and boxes, ignore regions left out.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hkd_det.models.base import BranchOutputs, DenseOutputs, Targets
from hkd_det.models.head import bbox2dist
from hkd_det.ops.boxes import CELLS_PER_GT_HEIGHT, box_iou, generalized_box_iou_loss, points_in_boxes
from hkd_det.ops.losses import ReduceMean, clamp_min_one, distribution_focal_loss, varifocal_loss


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


"""A sum over this process's pictures to what its losses are divided by, so that the processes' mean is right."""


@dataclass(frozen=True)
class DetectionCriterion:
    """Terms and their weights (PP-YOLOE's), with both assignments."""

    cls_weight: float = 1.0
    box_weight: float = 2.5
    dfl_weight: float = 0.5
    one2many: TaskAlignedAssigner = field(default_factory=lambda: TaskAlignedAssigner(topk=10))
    one2one: TaskAlignedAssigner = field(
        default_factory=lambda: TaskAlignedAssigner(topk=1, beta=2.0, center_weight=1.0)
    )

    def __call__(
        self, outputs: DenseOutputs, targets: Targets, reduce_mean: ReduceMean = clamp_min_one
    ) -> dict[str, Tensor]:
        """The weighted terms `score`, `box`, `distribution` of the branch `many`, `…_one` of the other, each a scalar.

        Each is divided by the summed target quality of the global batch, so that with gradients averaged
        over processes they equal those of one process.
        """
        terms = self._compute_branch_losses(outputs, outputs.one2many, self.one2many, targets, reduce_mean)
        if outputs.one2one is not None:
            once = self._compute_branch_losses(outputs, outputs.one2one, self.one2one, targets, reduce_mean)
            terms |= {f"{name}_one2one": term for name, term in once.items()}
        return terms

    def _compute_branch_losses(
        self,
        outputs: DenseOutputs,
        branch: BranchOutputs,
        assigner: TaskAlignedAssigner,
        targets: Targets,
        reduce_mean: ReduceMean,
    ) -> dict[str, Tensor]:
        scores, boxes = branch.logits.detach().sigmoid(), branch.boxes_xyxy.detach()
        assign_result = assigner(scores, boxes, outputs.anchor_points, outputs.strides, targets)
        norm = reduce_mean(assign_result.target_scores.sum())
        per_point = varifocal_loss(branch.logits, assign_result.target_scores) * assign_result.loss_mask
        terms = {"cls": self.cls_weight * per_point.sum() / norm}
        if branch.has_box_loss:
            terms |= self.compute_box_losses(outputs, branch, assign_result, norm)
        return terms

    def compute_box_losses(
        self, outputs: DenseOutputs, branch: BranchOutputs, assign_result: AssignResult, avg_factor: Tensor
    ) -> dict[str, Tensor]:
        """The weighted terms `box` and, of side distributions, `distribution`: each point counts by its quality."""
        picture, point = assign_result.fg_mask.nonzero(as_tuple=True)
        weight = assign_result.target_scores[picture, point]
        wanted = assign_result.boxes_xyxy[picture, point]
        overlap = generalized_box_iou_loss(branch.boxes_xyxy[picture, point], wanted)
        terms = {"box": self.box_weight * (overlap * weight).sum() / avg_factor}
        if branch.box_logits is not None:
            sides = branch.box_logits[picture, point]
            distances = bbox2dist(wanted, outputs.anchor_points[point], outputs.strides[point], sides.shape[-1])
            shape = distribution_focal_loss(sides, distances).mean(-1)
            terms["dfl"] = self.dfl_weight * (shape * weight).sum() / avg_factor
        return terms
