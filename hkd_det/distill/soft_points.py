"""A teacher's detections as soft targets of a dense student's points: any teacher's, a black box's too.

The student's own assignment says which points answer for which of the teacher's boxes, as if they were the truth. A
point's score learns the quality its box would have there, times the teacher's score: a box that the teacher is sure of
by 0.6 asks its best point for 0.6, no more. Every other point learns that the teacher sees nobody there, save where
the truth knows better: a teacher's silence is no evidence against an annotated person.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hkd_det.losses.detection import DetectionLoss, Norm
from hkd_det.losses.soft_score import CERTAIN, soft_score_loss
from hkd_det.models.assignment import Targets, TaskAlignedAssigner, TruthBatch, points_inside
from hkd_det.models.prediction import Branch, Found, Prediction

LEAST = 0.05  # teacher's score from which a box is somebody; one below it would ask for what silence asks for
LOSS = DetectionLoss()  # its assigners, and the form of its box terms


def soft_points(
    student: Prediction,
    found: Found,
    truth: TruthBatch,
    norm_of: Norm,
    silence: float = 1.0,
    one_alone: bool = False,
) -> tuple[Tensor, Tensor]:
    """The score term and the box term, scalars, summed over the student's branches, or of its branch `one` alone.

    Score: the binary divergence of the student's score from its target, weighted by how far they are apart, `silence`
    times that where nobody is to be found. Box: 1 - GIoU to the teacher's box, and a fifth of the distribution's
    cross-entropy, weighted by the target score. Both are divided by the summed target scores.
    """
    people, certainty = _as_truth(found)
    known = (points_inside(student.points, truth.boxes_xyxy) & truth.real[..., None]).any(1)
    scores, boxes = student.many.logits.new_zeros(()), student.many.logits.new_zeros(())
    for branch, assigner in ((None if one_alone else student.many, LOSS.many), (student.one, LOSS.one)):
        if branch is None:
            continue
        targets = soft_targets(student, branch, assigner, people, certainty)
        norm = norm_of(targets.quality.sum())
        weight = torch.where(targets.positive, 1.0, silence * ~known)
        error = soft_score_loss(branch.logits, targets.quality.logit(eps=CERTAIN))
        scores = scores + (weight * error).sum() / norm
        if branch.learns_boxes:
            terms = LOSS.boxes(student, branch, targets, norm)
            boxes = boxes + torch.stack(list(terms.values())).sum() / LOSS.box_weight
    return scores, boxes


def soft_targets(
    student: Prediction, branch: Branch, assigner: TaskAlignedAssigner, people: TruthBatch, certainty: Tensor
) -> Targets:
    """A branch's targets with each person's quality times how certain it is, [B, M] 0..1."""
    scores, boxes = branch.logits.detach().sigmoid(), branch.boxes_xyxy.detach()
    targets = assigner(scores, boxes, student.points, student.strides, people)
    if not certainty.shape[1]:
        return targets
    return replace(targets, quality=targets.quality * certainty.gather(1, targets.owner))


def _as_truth(found: Found) -> tuple[TruthBatch, Tensor]:
    """The boxes of at least LEAST as people, padded, and the score [B, M] of each; 0 fills up."""
    kept = [scores >= LEAST for scores in found.scores]
    most = max((int(mine.sum()) for mine in kept), default=0)
    boxes = found.boxes_xyxy[0].new_zeros((len(kept), most, 4), dtype=torch.float32)
    certainty = boxes.new_zeros(boxes.shape[:2])
    for row, (mine, of_one, scores) in enumerate(zip(kept, found.boxes_xyxy, found.scores, strict=True)):
        count = int(mine.sum())
        boxes[row, :count], certainty[row, :count] = of_one[mine].float(), scores[mine].float()
    real = certainty > 0
    return TruthBatch(boxes, real, torch.zeros_like(real)), certainty
