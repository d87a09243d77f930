"""The noisy teacher's own term (Sau and Balasubramanian 2016): the student regresses perturbed logits by L2.

Published for a classifier: L = 1 / (2 |B|) sum ||s - z'||^2. A detector answers at over a thousand points, nearly all
of them background, and a plain sum would be about the background's confidence alone. Here the squared errors are
averaged with weights: `foreground` of them lies where the teacher sees people, in proportion to its score t, the rest
in proportion to 1 - t. The weights come from the teacher without noise, so that noise leaves the expected gradient as
it is: E[s - z'] = s - z.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hkd_det.distill.lesson import DistillationBatch
from hkd_det.distill.noise import NoisyTeacher, NoisyTeacherConfig
from hkd_det.distill.soft_regions import nms_detections
from hkd_det.distill.two_stage import sample_rois
from hkd_det.errors import UsageError
from hkd_det.losses.detection import ReduceMean
from hkd_det.losses.soft_score import SCORE_EPS
from hkd_det.models.family import BaseDetector
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.prediction import DenseOutputs, ProposalOutputs

MAX_ROIS = 64  # of the teacher's proposals, or of the student's boxes, that are judged by both, a picture


def check_same_strides(student: BaseDetector, teacher: BaseDetector) -> None:
    """UsageError for two dense detectors that answer at different points: their logits can't be compared."""
    mine, others = ([tap.stride for tap in detector.feature_info()] for detector in (student, teacher))
    if mine != others and not any(isinstance(detector, FasterRCNN) for detector in (student, teacher)):
        raise UsageError(
            f"--distill noise needs student and teacher with the same pyramid strides, not {mine} and {others}; "
            "form=targets, beside hkd or detections, does not"
        )


class NoisyLogitLoss(nn.Module):
    """The term `noise`. It has no parameters."""

    def __init__(self, config: NoisyTeacherConfig) -> None:
        super().__init__()
        self.config, self.noisy_teacher = config, NoisyTeacher(config)

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """The weighted term, a scalar: the sum over the pairs of logits that the two detectors can compare."""
        errors = [
            fg_balanced_l2(
                mine, self.noisy_teacher.perturb_logits(other), other.sigmoid(), self.config.fg_ratio, batch.reduce_mean
            )
            for mine, other in _pair_comparable_logits(batch)
        ]
        return {"noise": self.config.weight * torch.stack(errors).sum()}


def fg_balanced_l2(
    student_logits: Tensor, teacher_logits: Tensor, teacher_scores: Tensor, fg_ratio: float, reduce_mean: ReduceMean
) -> Tensor:
    """Half the squared difference of logits [...]: the mean weighted by `score` 0..1, and the one by 1 - score."""
    error = 0.5 * (student_logits - teacher_logits).square()
    people, others = (
        (weight * error).sum() / reduce_mean(weight.sum()) for weight in (teacher_scores, 1 - teacher_scores)
    )
    return fg_ratio * people + (1 - fg_ratio) * others


def _pair_comparable_logits(batch: DistillationBatch) -> list[tuple[Tensor, Tensor]]:
    """The student's logits and the teacher's, these without gradients, of the same points or the same regions."""
    mine, other = batch.student_outputs, batch.teacher_outputs
    if isinstance(mine, DenseOutputs) and isinstance(other, DenseOutputs):
        both = ((mine.one2many, other.one2many), (mine.one2one, other.one2one))
        return [(a.logits, b.logits) for a, b in both if a is not None and b is not None]
    if isinstance(mine, ProposalOutputs):
        if isinstance(other, ProposalOutputs):
            regions = sample_rois(batch, other, MAX_ROIS)
            return [
                (_compute_roi_logits(batch.student, mine, regions), _compute_teacher_roi_logits(batch, other, regions))
            ]
        found = nms_detections(batch.teacher_detections)
        wanted = torch.cat(found.scores).logit(eps=SCORE_EPS).detach()
        return [(_compute_roi_logits(batch.student, mine, found.boxes_xyxy), wanted)]
    if isinstance(mine, DenseOutputs) and isinstance(other, ProposalOutputs):
        # The branch `one` is left out: it must be silent about boxes beside its best, where the teacher is not.
        best = mine.one2many.logits.topk(min(MAX_ROIS, mine.one2many.logits.shape[1])).indices  # [B, K]
        boxes = mine.one2many.boxes_xyxy.detach().gather(1, best[..., None].expand(-1, -1, 4))
        return [
            (mine.one2many.logits.gather(1, best).flatten(), _compute_teacher_roi_logits(batch, other, boxes.unbind()))
        ]
    raise UsageError("--distill noise: this teacher shows no logits to perturb")


def _compute_roi_logits(model: object, outputs: ProposalOutputs, rois: Sequence[Tensor]) -> Tensor:
    """[R] logits of a two-stage detector's second half."""
    assert isinstance(model, FasterRCNN)
    return model.forward_rois(outputs, rois).logits


def _compute_teacher_roi_logits(batch: DistillationBatch, outputs: ProposalOutputs, rois: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return _compute_roi_logits(batch.teacher, outputs, rois)
