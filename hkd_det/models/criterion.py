"""Losses of dense detectors, against the ground truth or a teacher's detections as soft labels, with their assignment.

Task-aligned assignment of anchor points to ground-truth boxes (TOOD, Feng et al. 2021, section 3.2): the alignment
metric of a point and a box is t = score^alpha * IoU^beta. For each box, the `topk` points with the highest metric among
the points inside the box are selected. A point that is selected for several boxes is assigned to the box with the
highest IoU. The target score of a point is its metric, scaled so that the highest target score of a box equals the
highest IoU of that box.

`topk` = 1 is the one-to-one assignment of the end-to-end branch (YOLOv10). There, several points often have nearly the
same metric, so that the assignment would depend on rounding. `center_weight` therefore multiplies the metric by
exp(-center_weight * d). The distance d is the squared distance from the box center in strides, plus the squared
distance in octaves from the level whose cells are an eighth of the box height. CSP (Liu et al. 2019) also assigns a box
to its center and scale.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hkd_det.models.base import BranchOutputs, DenseOutputs, DetectionBatch, Targets
from hkd_det.models.head import bbox2dist
from hkd_det.ops.boxes import CELLS_PER_GT_HEIGHT, batched_box_iou, giou_loss, points_in_boxes
from hkd_det.ops.losses import (
    SCORE_EPS,
    ReduceMean,
    clamp_min_one,
    distribution_focal_loss,
    quality_focal_kd_loss,
    varifocal_loss,
)


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
        shape = scores.shape
        # Pairs of a box and a point inside it: few of all pairs, so that only they are computed.
        box_image, box_gt = targets.valid.nonzero(as_tuple=True)
        gt_boxes = targets.boxes_xyxy[box_image, box_gt]  # [N, 4]
        inside = points_in_boxes(anchor_points, _expand_small_boxes(gt_boxes, strides.min()))  # [N, A]
        box, point = inside.nonzero(as_tuple=True)  # [P]
        iou = batched_box_iou(gt_boxes[box, None], boxes_xyxy[box_image[box], point, None])[:, 0, 0]
        metric = scores[box_image[box], point].pow(self.alpha) * iou.pow(self.beta)
        if self.center_weight:
            distance = _compute_center_distance(gt_boxes[box], anchor_points[point], strides[point])
            metric = metric * (-self.center_weight * distance).exp()
        kept = self._select_topk_points(metric, inside, box, point)
        box, point, iou, metric = box[kept], point[kept], iou[kept], metric[kept]
        kept = _select_highest_iou(box_image[box] * shape[1] + point, box, iou, shape.numel())
        box, point, iou, metric = box[kept], point[kept], iou[kept], metric[kept]
        image = box_image[box]
        fg_mask, gt_idx = inside.new_zeros(shape), box.new_zeros(shape)
        target_scores = metric.new_zeros(shape)
        fg_mask[image, point], gt_idx[image, point] = True, box_gt[box]
        target_scores[image, point] = _normalize_align_metric(metric, iou, box, len(gt_boxes))
        return AssignResult(
            fg_mask=fg_mask,
            target_gt_idx=gt_idx,
            boxes_xyxy=_gather_gt_boxes(targets.boxes_xyxy, gt_idx),
            target_scores=target_scores,
            loss_mask=fg_mask | ~_find_ignored_points(anchor_points, targets),
        )

    def _select_topk_points(self, metric: Tensor, inside: Tensor, box: Tensor, point: Tensor) -> Tensor:
        """Return [P] bool: whether the pair of a box and a point has one of the `topk` best metrics of the box."""
        # At the start of training all IoUs may be 0. Rank points inside the box above all points outside it.
        rank = torch.full_like(inside, -1.0, dtype=metric.dtype).index_put_((box, point), metric)
        best = rank.topk(min(self.topk, inside.shape[1]), dim=1).indices
        return torch.zeros_like(inside).scatter_(1, best, value=True)[box, point]


def _select_highest_iou(point: Tensor, box: Tensor, iou: Tensor, num_points: int) -> Tensor:
    """Return [P] bool: whether the pair has the highest IoU of its point, the first of equal ones."""
    highest = iou.new_full((num_points,), -1.0).scatter_reduce_(0, point, iou, "amax")
    is_highest = iou == highest[point]
    first = box.new_full((num_points,), torch.iinfo(box.dtype).max)
    first.scatter_reduce_(0, point[is_highest], box[is_highest], "amin")
    return is_highest & (box == first[point])


def _find_ignored_points(anchor_points: Tensor, targets: Targets) -> Tensor:
    """Return [B, A] bool: points inside an ignore region."""
    image, region = targets.ignore.nonzero(as_tuple=True)
    inside = points_in_boxes(anchor_points, targets.boxes_xyxy[image, region])
    count = image.new_zeros(len(targets.ignore), len(anchor_points)).index_add_(0, image, inside.long())
    return count > 0


def _compute_center_distance(boxes_xyxy: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    """Return [P]: squared distance from the box center in strides plus squared octaves from the box's level."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    x, y = anchor_points.unbind(-1)
    dx, dy = (x - (x1 + x2) / 2) / strides, (y - (y1 + y2) / 2) / strides
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


def _normalize_align_metric(metric: Tensor, iou: Tensor, box: Tensor, num_boxes: int) -> Tensor:
    """Return [P]: metrics scaled so that the best point of each box has its best IoU."""
    best_metric, best_iou = (
        values.new_zeros(num_boxes).scatter_reduce_(0, box, values, "amax") for values in (metric, iou)
    )
    return metric * best_iou[box] / (best_metric[box] + 1e-9)


MIN_TEACHER_SCORE = 0.05  # A box with a lower teacher score has nearly the same targets as the background.


@dataclass(frozen=True)
class DetectionCriterion:
    """Varifocal, GIoU and distribution focal loss with task-aligned assignment, weighted as in PP-YOLOE.

    Attributes:
        cls_weight: Weight of the score loss.
        box_weight: Weight of the GIoU loss.
        dfl_weight: Weight of the distribution focal loss.
        one2many: Assigner of the branch `one2many`.
        one2one: Assigner of the branch `one2one`.
    """

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
        """Compute the losses of both branches.

        Each loss is a sum over all anchor points, divided by the sum of the target scores over all processes. With
        gradients averaged over processes, the result equals that of one process.

        Args:
            outputs: Outputs of a dense detector.
            targets: Ground truth of the same images.
            reduce_mean: Averages the normalization factor over all processes.

        Returns:
            Weighted scalar losses `cls`, `box` and `dfl` of the branch `one2many`, and with the suffix `_one2one`
            those of the other branch. `box` and `dfl` are missing for a branch that has no such outputs.
        """
        losses = self._compute_branch_losses(outputs, outputs.one2many, self.one2many, targets, reduce_mean)
        if outputs.one2one is not None:
            one2one = self._compute_branch_losses(outputs, outputs.one2one, self.one2one, targets, reduce_mean)
            losses |= {f"{name}_one2one": loss for name, loss in one2one.items()}
        return losses

    def compute_box_losses(
        self, outputs: DenseOutputs, branch: BranchOutputs, assign_result: AssignResult, avg_factor: Tensor
    ) -> dict[str, Tensor]:
        """Compute the box losses of the assigned points, weighted by their target scores.

        Args:
            outputs: Outputs that contain the branch.
            branch: Branch whose boxes are trained.
            assign_result: Assignment of the anchor points.
            avg_factor (Tensor): Scalar that the sums are divided by.

        Returns:
            Weighted scalar losses `box` and, if the branch has distance distributions, `dfl`.
        """
        image_index, point = assign_result.fg_mask.nonzero(as_tuple=True)
        weight = assign_result.target_scores[image_index, point]
        gt_boxes = assign_result.boxes_xyxy[image_index, point]
        giou = giou_loss(branch.boxes_xyxy[image_index, point], gt_boxes)
        losses = {"box": self.box_weight * (giou * weight).sum() / avg_factor}
        if branch.box_logits is not None:
            box_logits = branch.box_logits[image_index, point]
            distances = bbox2dist(
                gt_boxes, outputs.anchor_points[point], outputs.strides[point], reg_max=box_logits.shape[-1]
            )
            dfl = distribution_focal_loss(box_logits, distances).mean(-1)
            losses["dfl"] = self.dfl_weight * (dfl * weight).sum() / avg_factor
        return losses

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
        avg_factor = reduce_mean(assign_result.target_scores.sum())
        cls_loss = varifocal_loss(branch.logits, assign_result.target_scores) * assign_result.loss_mask
        losses = {"cls": self.cls_weight * cls_loss.sum() / avg_factor}
        if branch.has_box_loss:
            losses |= self.compute_box_losses(outputs, branch, assign_result, avg_factor)
        return losses


CRITERION = DetectionCriterion()


def dense_soft_label_losses(
    outputs: DenseOutputs,
    detections: DetectionBatch,
    targets: Targets,
    reduce_mean: ReduceMean,
    background_weight: float = 1.0,
    one2one_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the losses of a dense student with the detections of a teacher as soft labels.

    The assigners of the student assign its anchor points to the boxes of the teacher. The target score of a point is
    its target score for that box times the score that the teacher gives the box. The target of all other points is 0,
    except inside ground-truth boxes: there a missing detection is no evidence of background, and the point is left out.

    Args:
        outputs: Outputs of the student.
        detections: Detections of the teacher for the same images.
        targets: Ground truth of the same images.
        reduce_mean: Averages a normalization factor over all processes.
        background_weight: Weight of the points at which the teacher detects nothing, relative to assigned points.
        one2one_only: Skip the branch `one2many`.

    Returns:
        cls_loss (Tensor): Scalar sum of `quality_focal_kd_loss` over points and branches, divided by the sum of the
            target scores.
        box_loss (Tensor): Scalar sum of GIoU loss plus a fifth of the distribution focal loss, weighted by the target
            scores and divided by their sum.
    """
    teacher_targets, gt_scores = _targets_from_detections(detections)
    in_gt_box = (points_in_boxes(outputs.anchor_points, targets.boxes_xyxy) & targets.valid[..., None]).any(1)
    cls_loss, box_loss = outputs.one2many.logits.new_zeros(()), outputs.one2many.logits.new_zeros(())
    for branch, assigner in (
        (None if one2one_only else outputs.one2many, CRITERION.one2many),
        (outputs.one2one, CRITERION.one2one),
    ):
        if branch is None:
            continue
        assign_result = assign_soft_targets(outputs, branch, assigner, teacher_targets, gt_scores)
        avg_factor = reduce_mean(assign_result.target_scores.sum())
        weight = torch.where(assign_result.fg_mask, 1.0, background_weight * ~in_gt_box)
        error = quality_focal_kd_loss(branch.logits, assign_result.target_scores.logit(eps=SCORE_EPS))
        cls_loss = cls_loss + (weight * error).sum() / avg_factor
        if branch.has_box_loss:
            losses = CRITERION.compute_box_losses(outputs, branch, assign_result, avg_factor)
            box_loss = box_loss + torch.stack(list(losses.values())).sum() / CRITERION.box_weight
    return cls_loss, box_loss


def assign_soft_targets(
    outputs: DenseOutputs, branch: BranchOutputs, assigner: TaskAlignedAssigner, targets: Targets, gt_scores: Tensor
) -> AssignResult:
    """Assign the points of a branch to boxes with scores.

    Args:
        outputs: Outputs that contain the branch.
        branch: Branch whose points are assigned.
        assigner: Assigner of the branch.
        targets: Boxes of the teacher.
        gt_scores (Tensor[B, M]): Score of each box, 0 to 1.

    Returns:
        Assignment whose target scores are multiplied by the scores of the boxes.
    """
    scores, boxes = branch.logits.detach().sigmoid(), branch.boxes_xyxy.detach()
    assign_result = assigner(scores, boxes, outputs.anchor_points, outputs.strides, targets)
    if not gt_scores.shape[1]:
        return assign_result
    return replace(
        assign_result, target_scores=assign_result.target_scores * gt_scores.gather(1, assign_result.target_gt_idx)
    )


def _targets_from_detections(detections: DetectionBatch) -> tuple[Targets, Tensor]:
    """Return the boxes of at least MIN_TEACHER_SCORE as padded targets, and their scores [B, M], 0 in the padding."""
    masks = [scores >= MIN_TEACHER_SCORE for scores in detections.scores]
    max_boxes = max((int(mask.sum()) for mask in masks), default=0)
    boxes = detections.boxes_xyxy[0].new_zeros((len(masks), max_boxes, 4), dtype=torch.float32)
    gt_scores = boxes.new_zeros(boxes.shape[:2])
    for row, (mask, image_boxes, scores) in enumerate(
        zip(masks, detections.boxes_xyxy, detections.scores, strict=True)
    ):
        count = int(mask.sum())
        boxes[row, :count], gt_scores[row, :count] = image_boxes[mask].float(), scores[mask].float()
    valid = gt_scores > 0
    return Targets(boxes, valid, torch.zeros_like(valid)), gt_scores
