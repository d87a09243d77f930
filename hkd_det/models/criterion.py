"""Detection losses: of dense detectors, and of Faster R-CNN what torchvision lacks.

The targets are the ground truth, or the detections of a teacher as soft labels.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_area, box_iou

from hkd_det.models.assigner import AssignResult, TaskAlignedAssigner
from hkd_det.models.base import BaseDetector, BranchOutputs, DenseOutputs, DetectionBatch, ProposalOutputs, Targets
from hkd_det.models.head import bbox2dist
from hkd_det.ops.boxes import giou_loss, pairwise_intersection, points_in_boxes
from hkd_det.ops.losses import (
    SCORE_EPS,
    ReduceMean,
    clamp_min_one,
    distribution_focal_loss,
    quality_focal_kd_loss,
    varifocal_loss,
)

MIN_TEACHER_SCORE = 0.05  # A box with a lower teacher score has nearly the same targets as the background.


@dataclass(frozen=True)
class DetectionCriterion:
    """Varifocal, GIoU and distribution focal loss with task-aligned assignment; weights of PP-YOLOE.

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


IGNORE_LABEL = -1  # torchvision's label of boxes that are sampled neither as foreground nor as background


IGNORE_IOA_THRESHOLD = 0.5  # Ratio of a box inside an ignore region from which it is ignored.


POSITIVE_IOU = 0.5  # IoU from which a proposal belongs to a box, as in the training of the second stage.


MAX_ROIS = 100  # Highest-scoring proposals per image that soft labels consider.


def mark_ignored_anchors(labels: Tensor, boxes_xyxy: Tensor, ignore_regions_xyxy: Tensor) -> Tensor:
    """Relabel background boxes that are mostly inside one ignore region, so that they are not sampled.

    Args:
        labels (Tensor[A]): 0 for background, above 0 for foreground.
        boxes_xyxy (Tensor[A, 4]): Anchors or proposals.
        ignore_regions_xyxy (Tensor[M, 4]): Ignore regions.

    Returns:
        labels (Tensor[A]): `labels` with IGNORE_LABEL for these boxes.
    """
    min_area = IGNORE_IOA_THRESHOLD * box_area(boxes_xyxy)[:, None]
    is_inside = pairwise_intersection(boxes_xyxy, ignore_regions_xyxy) >= min_area  # [A, M]
    return torch.where((labels == 0) & is_inside.any(1), IGNORE_LABEL, labels)


def smooth_l1_sum(box_deltas: Tensor, target_deltas: Tensor) -> Tensor:
    """Compute the sum of the smooth L1 loss of box deltas [R, 4] with torchvision's beta of 1/9."""
    return F.smooth_l1_loss(box_deltas, target_deltas, beta=1 / 9, reduction="sum")


def roi_soft_label_losses(
    student: BaseDetector, outputs: ProposalOutputs, detections: DetectionBatch, reduce_mean: ReduceMean
) -> tuple[Tensor, Tensor]:
    """Compute the losses of the second stage of a student with the detections of a teacher as soft labels.

    Scores are trained at the boxes of the teacher. Boxes are trained there and at the proposals of the student that
    overlap one of them. Without these proposals, the target of every RoI would be the RoI itself.

    A teacher with a one-to-one branch predicts scores near 0 for duplicates of its best boxes. These scores do not
    describe the content of a box, which the second stage classifies. Duplicates are therefore suppressed first.

    Args:
        student: Detector with the capability "rois".
        outputs: First-stage outputs of the student.
        detections: Detections of the teacher for the same images.
        reduce_mean: Averages a normalization factor over all processes.

    Returns:
        cls_loss (Tensor): Scalar mean of `quality_focal_kd_loss` with beta 0 over the boxes of the teacher.
        box_loss (Tensor): Scalar mean of the GIoU loss, weighted by the scores of the teacher.
    """
    detections = detections.suppress(POSITIVE_IOU)
    rois, box_indices = zip(
        *(
            _append_positive_proposals(proposals[:MAX_ROIS], boxes)
            for proposals, boxes in zip(outputs.proposals, detections.boxes_xyxy, strict=True)
        ),
        strict=True,
    )
    roi_outputs = student.forward_rois(outputs, rois)
    # scores [R] and boxes [R, 4] of the teacher box that each RoI belongs to
    scores = torch.cat([score[index] for score, index in zip(detections.scores, box_indices, strict=True)]).detach()
    boxes = torch.cat([box[index] for box, index in zip(detections.boxes_xyxy, box_indices, strict=True)]).detach()
    is_teacher_box = torch.cat(
        [
            torch.arange(len(index), device=index.device) < len(box)
            for box, index in zip(detections.boxes_xyxy, box_indices, strict=True)
        ]
    )
    teacher_logits = scores[is_teacher_box].logit(eps=SCORE_EPS)
    cls_loss = quality_focal_kd_loss(roi_outputs.logits[is_teacher_box], teacher_logits, beta=0)
    box_loss = scores * giou_loss(roi_outputs.boxes_xyxy, boxes)
    return cls_loss.sum() / reduce_mean(is_teacher_box.sum().float()), box_loss.sum() / reduce_mean(scores.sum())


def _append_positive_proposals(proposals: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return RoIs [R, 4], the boxes [N, 4] and then the proposals near one of them, and the box index [R] of each."""
    box_index = torch.arange(len(boxes), device=boxes.device)
    if not len(boxes):
        return boxes, box_index
    best_iou, nearest = box_iou(proposals, boxes).max(1)
    is_positive = best_iou >= POSITIVE_IOU
    return torch.cat([boxes, proposals[is_positive]]), torch.cat([box_index, nearest[is_positive]])
