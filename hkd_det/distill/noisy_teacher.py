"""Noisy teacher (Sau and Balasubramanian 2016): a teacher that errs a little, differently each time.

Two forms: a term of its own, in which the student regresses the noisy logits (`noisy_logits.py`), as published; or
noise on what another method learns from.

The noisy teacher's own term (Sau and Balasubramanian 2016): the student regresses perturbed logits by L2.

Published for a classifier: L = 1 / (2 |B|) sum ||s - z'||^2. A detector answers at over a thousand points, nearly all
of them background, and a plain sum would be about the background's confidence alone. Here the squared errors are
averaged with weights: `foreground` of them lies where the teacher sees people, in proportion to its score t, the rest
in proportion to 1 - t. The weights come from the teacher without noise, so that noise leaves the expected gradient as
it is: E[s - z'] = s - z.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hkd_det.distill.base import DistillationBatch, sample_rois
from hkd_det.errors import UsageError
from hkd_det.models.base import (
    BaseDetector,
    BranchOutputs,
    DenseOutputs,
    DetectionBatch,
    ModelOutputs,
    ProposalOutputs,
    RoIOutputs,
)
from hkd_det.models.faster_rcnn_loss import POSITIVE_IOU
from hkd_det.ops.losses import SCORE_EPS, ReduceMean


@dataclass(frozen=True)
class NoisyTeacherConfig:
    """z' = (1 + xi) z, xi ~ N(0, sigma^2), for a picture with probability alpha.

    form: "l2", the published term, alone or beside other methods; or "targets": what another method sees is noisy.
    weight: of the l2 term. foreground: share of that term's weight that lies on people, 0..1.
    each: one xi for every logit (None of the paper's text settles it), or one for a whole picture ("sample").
    features: form targets only: the same on the tapped maps, with this sigma; 0 leaves them as they are.
    """

    mode: Literal["l2", "targets"] = "l2"
    weight: float = 0.1
    fg_ratio: float = 0.5
    alpha: float = 0.5
    sigma: float = 0.3
    granularity: Literal["logit", "sample"] = "logit"
    feature_sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.sigma < 0 or self.feature_sigma < 0:
            raise UsageError("noisy_teacher: alpha is a probability, 0..1; sigma and feature_sigma are not negative")
        if not 0 <= self.fg_ratio <= 1 or self.weight < 0:
            raise UsageError("noisy_teacher: fg_ratio is a share, 0..1; weight is not negative")
        if self.feature_sigma and self.mode == "l2":
            raise UsageError(
                "noisy_teacher.feature_sigma: the mode l2 compares logits alone; noisy maps need noisy_teacher.mode=targets"
            )
        if self.mode == "targets" and (self.weight, self.fg_ratio) != (
            NoisyTeacherConfig.weight,
            NoisyTeacherConfig.fg_ratio,
        ):
            raise UsageError(
                "noisy_teacher: weight and fg_ratio are the mode l2's; mode=targets has no term of its own"
            )


class NoisyTeacher:
    """Perturbs what a teacher says and shows; whoever learns from it sees the perturbed form."""

    def __init__(self, config: NoisyTeacherConfig) -> None:
        self.config = config

    def perturb_outputs(self, outputs: ModelOutputs) -> ModelOutputs:
        """Noisy score logits of a dense teacher, noisy scores of a black box.

        A two-stage teacher's output stays as it is: its logit level is in `regions`, and in `found`.
        """
        if isinstance(outputs, ProposalOutputs):
            return outputs
        if isinstance(outputs, DetectionBatch):
            return self.perturb_detections(outputs)
        one = self._perturb_branch(outputs.one2one) if outputs.one2one else None
        return replace(outputs, one2many=self._perturb_branch(outputs.one2many), one2one=one)

    def perturb_detections(self, detections: DetectionBatch) -> DetectionBatch:
        """Finished detections whose scores' logits are perturbed."""
        logits = (scores.logit(eps=SCORE_EPS)[None] for scores in detections.scores)
        return replace(detections, scores=tuple(self._perturb(one, self.config.sigma)[0].sigmoid() for one in logits))

    def perturb_rois(self, outputs: RoIOutputs) -> RoIOutputs:
        """A two-stage teacher's logit level, region by region: there a sample is a region, not a picture."""
        pooled = (
            self._perturb(outputs.roi_features, self.config.feature_sigma)
            if self.config.feature_sigma
            else outputs.roi_features
        )
        return replace(outputs, roi_features=pooled, box_features=self.perturb_logits(outputs.box_features))

    def perturb_features(self, features: list[Tensor]) -> list[Tensor]:
        """The tapped maps [B, C, H, W]."""
        return (
            [self._perturb(level, self.config.feature_sigma) for level in features]
            if self.config.feature_sigma
            else features
        )

    def perturb_logits(self, logits: Tensor) -> Tensor:
        """Logits [B, ...], the first axis counting samples: pictures, or regions of two-stage detectors."""
        return self._perturb(logits, self.config.sigma)

    def _perturb_branch(self, branch: BranchOutputs) -> BranchOutputs:
        return replace(branch, logits=self.perturb_logits(branch.logits))

    def _perturb(self, values: Tensor, sigma: float) -> Tensor:
        """[B, ...]: each sample tosses its own coin."""
        rest = [1] * (values.ndim - 1)
        shape = values.shape if self.config.granularity == "logit" else (len(values), *rest)
        factor = 1 + sigma * torch.randn(shape, device=values.device, dtype=values.dtype)
        chosen = torch.rand(len(values), *rest, device=values.device) < self.config.alpha
        return torch.where(chosen, factor * values, values)


MAX_ROIS = 64  # of the teacher's proposals, or of the student's boxes, that are judged by both, a picture


def check_same_strides(student: BaseDetector, teacher: BaseDetector) -> None:
    """UsageError for two dense detectors that answer at different points: their logits can't be compared."""
    mine, others = ([tap.stride for tap in detector.feature_info()] for detector in (student, teacher))
    if mine != others and "rois" not in student.capabilities | teacher.capabilities:
        raise UsageError(
            f"--distill noisy_teacher needs student and teacher with the same pyramid strides, not {mine} and {others}; "
            "mode=targets, beside hkd or soft_labels, does not"
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
        return {"noisy_teacher": self.config.weight * torch.stack(errors).sum()}


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
        found = batch.teacher_detections.suppress(POSITIVE_IOU)
        wanted = torch.cat(found.scores).logit(eps=SCORE_EPS).detach()
        return [(_compute_roi_logits(batch.student, mine, found.boxes_xyxy), wanted)]
    if isinstance(mine, DenseOutputs) and isinstance(other, ProposalOutputs):
        # The branch `one` is left out: it must be silent about boxes beside its best, where the teacher is not.
        best = mine.one2many.logits.topk(min(MAX_ROIS, mine.one2many.logits.shape[1])).indices  # [B, K]
        boxes = mine.one2many.boxes_xyxy.detach().gather(1, best[..., None].expand(-1, -1, 4))
        return [
            (mine.one2many.logits.gather(1, best).flatten(), _compute_teacher_roi_logits(batch, other, boxes.unbind()))
        ]
    raise UsageError("--distill noisy_teacher: this teacher shows no logits to perturb")


def _compute_roi_logits(model: Any, outputs: ProposalOutputs, rois: Sequence[Tensor]) -> Tensor:
    """[R] logits of a two-stage detector's second half."""
    logits: Tensor = model.forward_rois(outputs, rois).logits
    return logits


def _compute_teacher_roi_logits(batch: DistillationBatch, outputs: ProposalOutputs, rois: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return _compute_roi_logits(batch.teacher, outputs, rois)
