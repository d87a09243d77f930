"""A teacher's detections as soft targets of a dense student's points: any teacher's, a black box's too.

The student's own assignment says which points answer for which of the teacher's boxes, as if they were the truth. A
point's score learns the quality its box would have there, times the teacher's score: a box that the teacher is sure of
by 0.6 asks its best point for 0.6, no more. Every other point learns that the teacher sees nobody there, save where
the truth knows better: a teacher's silence is no evidence against an annotated person.

A teacher's detections as soft targets of a two-stage student's second stage: any teacher's, a black box's too.

Scores are learnt at the teacher's boxes: there it says what it thinks. Boxes are learnt there, and from the student's
own proposals nearby: a region that lies right already teaches only to leave it where it is.

A teacher that answers once a person says next to nothing (1e-9) of the boxes beside its best. That is no opinion of
what they show, and a second stage judges what a region shows: such doubles are left out.

Distilling detections: the student learns from a teacher's boxes and scores alone, so any teacher will do.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from hkd_det.distill.base import DistillationBatch
from hkd_det.errors import UsageError
from hkd_det.models.base import BranchOutputs, DenseOutputs, DetectionBatch, ProposalOutputs, Targets
from hkd_det.models.criterion import AssignResult, DetectionCriterion, TaskAlignedAssigner
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.ops.boxes import generalized_box_iou_loss, points_in_boxes
from hkd_det.ops.losses import SCORE_EPS, ReduceMean, quality_focal_kd_loss

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


POSITIVE_IOU = 0.5  # IoU from which a proposal answers for a box, as in the second stage's own training


MAX_ROIS = 100  # of the student's best, how many are looked at a picture


def roi_soft_label_losses(
    student: FasterRCNN, student_outputs: ProposalOutputs, detections: DetectionBatch, reduce_mean: ReduceMean
) -> tuple[Tensor, Tensor]:
    """The score term and the box term, scalars.

    Score: the binary divergence of the student's score from the teacher's, mean over the teacher's boxes. Box:
    1 - GIoU of the student's box and the teacher's, mean weighted by the teacher's score.
    """
    detections = nms_detections(detections)
    judged = [
        _append_positive_proposals(mine[:MAX_ROIS], theirs)
        for mine, theirs in zip(student_outputs.proposals, detections.boxes_xyxy, strict=True)
    ]
    answer = student.forward_rois(student_outputs, [regions for regions, _ in judged])
    owners = [owner for _, owner in judged]
    scores = torch.cat([score[owner] for score, owner in zip(detections.scores, owners, strict=True)]).detach()  # [R]
    boxes = torch.cat([box[owner] for box, owner in zip(detections.boxes_xyxy, owners, strict=True)]).detach()
    own = torch.cat(
        [
            torch.arange(len(owner), device=owner.device) < len(box)
            for box, owner in zip(detections.boxes_xyxy, owners, strict=True)
        ]
    )
    divergence = quality_focal_kd_loss(answer.logits[own], scores[own].logit(eps=SCORE_EPS), beta=0)
    distance = generalized_box_iou_loss(answer.boxes_xyxy, boxes)
    return divergence.sum() / reduce_mean(own.sum().float()), (scores * distance).sum() / reduce_mean(scores.sum())


def nms_detections(detections: DetectionBatch) -> DetectionBatch:
    """The detections but those that overlap a better one by more than NEAR: the better one tells whom they show."""
    kept = [
        nms(boxes.float(), scores.float(), POSITIVE_IOU)
        for boxes, scores in zip(detections.boxes_xyxy, detections.scores, strict=True)
    ]
    return DetectionBatch(
        tuple(boxes[index] for boxes, index in zip(detections.boxes_xyxy, kept, strict=True)),
        tuple(scores[index] for scores, index in zip(detections.scores, kept, strict=True)),
    )


def _append_positive_proposals(proposals: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """[R, 4] the boxes [N, 4], then those proposals [P, 4] near one of them; and [R] whose each region is."""
    own = torch.arange(len(boxes), device=boxes.device)
    if not len(boxes):
        return boxes, own
    best, owner = box_iou(proposals, boxes).max(1)
    return torch.cat([boxes, proposals[best >= POSITIVE_IOU]]), torch.cat([own, owner[best >= POSITIVE_IOU]])


@dataclass(frozen=True)
class SoftLabelConfig:
    """How much the teacher's scores and boxes count.

    silence: of a dense student's points where the teacher sees nobody, how much they count against those where it does.
    """

    cls: float = 1.0
    box: float = 2.5
    background_weight: float = 1.0

    def __post_init__(self) -> None:
        if min(self.cls, self.box, self.background_weight) < 0:
            raise UsageError("soft_labels: cls, box and background_weight are not negative")


class SoftLabelDistillation(nn.Module):
    """A student under a teacher's finished detections. It has no parameters."""

    def __init__(self, config: SoftLabelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """The weighted terms `soft_score` and `soft_box`, each a scalar."""
        scores, boxes = soft_label_losses(batch, batch.teacher_detections, self.config.background_weight)
        return {"soft_cls": self.config.cls * scores, "soft_box": self.config.box * boxes}


def soft_label_losses(
    batch: DistillationBatch, detections: DetectionBatch, background_weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The score term and the box term of the student under these detections, at its points or in its regions."""
    if isinstance(batch.student, FasterRCNN) and isinstance(batch.student_outputs, ProposalOutputs):
        return roi_soft_label_losses(batch.student, batch.student_outputs, detections, batch.reduce_mean)
    if not isinstance(batch.student_outputs, DenseOutputs):
        raise UsageError("only a detector that learns can be taught; this one gives finished detections")
    return dense_soft_label_losses(
        batch.student_outputs, detections, batch.targets, batch.reduce_mean, background_weight
    )
