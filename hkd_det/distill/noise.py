"""Noisy teacher (Sau and Balasubramanian 2016): a teacher that errs a little, differently each time.

Two forms: a term of its own, in which the student regresses the noisy logits (`noisy_logits.py`), as published; or
noise on what another method learns from.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hkd_det.errors import UsageError
from hkd_det.losses.soft_score import SCORE_EPS
from hkd_det.models.output import ModelOutputs
from hkd_det.models.prediction import BranchOutputs, DetectionBatch, ProposalOutputs, RoIOutputs


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
            raise UsageError("noise: alpha is a probability, 0..1; sigma and features are not negative")
        if not 0 <= self.fg_ratio <= 1 or self.weight < 0:
            raise UsageError("noise: foreground is a share, 0..1; weight is not negative")
        if self.feature_sigma and self.mode == "l2":
            raise UsageError("noise.features: the form l2 compares logits alone; noisy maps need noise.form=targets")
        if self.mode == "targets" and (self.weight, self.fg_ratio) != (
            NoisyTeacherConfig.weight,
            NoisyTeacherConfig.fg_ratio,
        ):
            raise UsageError("noise: weight and foreground are the form l2's; form=targets has no term of its own")


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
