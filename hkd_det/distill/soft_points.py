"""A teacher's detections as soft targets of a dense student's points: any teacher's, a black box's too.

The student's own assignment says which points answer for which of the teacher's boxes, as if they were the truth. A
point's score learns the quality its box would have there, times the teacher's score: a box that the teacher is sure of
by 0.6 asks its best point for 0.6, no more. Every other point learns that the teacher sees nobody there, save where
the truth knows better: a teacher's silence is no evidence against an annotated person.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hkd_det.losses.detection import DetectionCriterion, ReduceMean
from hkd_det.losses.soft_score import SCORE_EPS, quality_focal_kd_loss
from hkd_det.models.assignment import AssignResult, Targets, TaskAlignedAssigner, points_in_boxes
from hkd_det.models.prediction import BranchOutputs, DenseOutputs, DetectionBatch

MIN_TEACHER_SCORE = (
    0.05  # teacher's score from which a box is somebody; one below it would ask for what silence asks for
)
CRITERION = DetectionCriterion()  # its assigners, and the form of its box terms


def dense_soft_label_losses(
    student_outputs: DenseOutputs,
    detections: DetectionBatch,
    targets: Targets,
    reduce_mean: ReduceMean,
    background_weight: float = 1.0,
    one2one_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """The score term and the box term, scalars, summed over the student's branches, or of its branch `one` alone.

    Score: the binary divergence of the student's score from its target, weighted by how far they are apart, `silence`
    times that where nobody is to be found. Box: 1 - GIoU to the teacher's box, and a fifth of the distribution's
    cross-entropy, weighted by the target score. Both are divided by the summed target scores.
    """
    people, certainty = _targets_from_detections(detections)
    known = (points_in_boxes(student_outputs.anchor_points, targets.boxes_xyxy) & targets.valid[..., None]).any(1)
    scores, boxes = student_outputs.one2many.logits.new_zeros(()), student_outputs.one2many.logits.new_zeros(())
    for branch, assigner in (
        (None if one2one_only else student_outputs.one2many, CRITERION.one2many),
        (student_outputs.one2one, CRITERION.one2one),
    ):
        if branch is None:
            continue
        assign_result = assign_soft_targets(student_outputs, branch, assigner, people, certainty)
        norm = reduce_mean(assign_result.target_scores.sum())
        weight = torch.where(assign_result.fg_mask, 1.0, background_weight * ~known)
        error = quality_focal_kd_loss(branch.logits, assign_result.target_scores.logit(eps=SCORE_EPS))
        scores = scores + (weight * error).sum() / norm
        if branch.has_box_loss:
            terms = CRITERION.compute_box_losses(student_outputs, branch, assign_result, norm)
            boxes = boxes + torch.stack(list(terms.values())).sum() / CRITERION.box_weight
    return scores, boxes


def assign_soft_targets(
    student_outputs: DenseOutputs,
    branch: BranchOutputs,
    assigner: TaskAlignedAssigner,
    targets: Targets,
    gt_scores: Tensor,
) -> AssignResult:
    """A branch's targets with each person's quality times how certain it is, [B, M] 0..1."""
    scores, boxes = branch.logits.detach().sigmoid(), branch.boxes_xyxy.detach()
    assign_result = assigner(scores, boxes, student_outputs.anchor_points, student_outputs.strides, targets)
    if not gt_scores.shape[1]:
        return assign_result
    return replace(
        assign_result, target_scores=assign_result.target_scores * gt_scores.gather(1, assign_result.target_gt_idx)
    )


def _targets_from_detections(detections: DetectionBatch) -> tuple[Targets, Tensor]:
    """The boxes of at least LEAST as people, padded, and the score [B, M] of each; 0 fills up."""
    kept = [scores >= MIN_TEACHER_SCORE for scores in detections.scores]
    most = max((int(mine.sum()) for mine in kept), default=0)
    boxes = detections.boxes_xyxy[0].new_zeros((len(kept), most, 4), dtype=torch.float32)
    certainty = boxes.new_zeros(boxes.shape[:2])
    for row, (mine, of_one, scores) in enumerate(zip(kept, detections.boxes_xyxy, detections.scores, strict=True)):
        count = int(mine.sum())
        boxes[row, :count], certainty[row, :count] = of_one[mine].float(), scores[mine].float()
    real = certainty > 0
    return Targets(boxes, real, torch.zeros_like(real)), certainty
