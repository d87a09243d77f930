"""Noisy teacher (Sau and Balasubramanian 2016, arXiv 1610.09650): random noise on the logits of the teacher.

The noisy logits are z' = (1 + xi) z with xi ~ N(0, sigma^2), for each sample with probability alpha.

Mode "l2" is the published form, a loss L = 1 / (2 |B|) sum ||s - z'||^2 between the logits s and z' of a classifier. A
detector has over a thousand anchor points, nearly all of them background, and a plain sum would measure background
only. `fg_balanced_l2` therefore averages the squared errors with weights: t for persons and 1 - t for background, where
t is the teacher score without noise. Noise does not change the expected gradient, because E[s - z'] = s - z.

Mode "targets" adds the noise to the teacher outputs that the other methods read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hkd_det.config import check_range
from hkd_det.distill import load_method
from hkd_det.distill.base import DistillMethod, Perturbed
from hkd_det.distill.batch import DistillationBatch, comparable_logits
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.ops.losses import ReduceMean

SIGMAS = (0.2, 0.5, 1.0)  # values that "auto" chooses from


@dataclass(frozen=True)
class NoisyTeacherConfig:
    """Settings of the noise: z' = (1 + xi) z with xi ~ N(0, sigma^2), for an image with probability alpha.

    Attributes:
        mode: "l2": loss on noisy logits, alone or with other methods. "targets": noise for the other methods.
        weight: Weight of the l2 loss.
        fg_ratio: Total weight of persons in the l2 loss, 0 to 1.
        alpha: Probability that an image is perturbed, 0 to 1.
        sigma: Standard deviation of xi. "auto": `hkd-train` chooses 0.2, 0.5 or 1 by short runs on a part of the
            training images.
        granularity: One xi per "logit", or one per image ("sample"). The paper leaves this open.
        feature_sigma: Standard deviation of the same noise on teacher features, mode "targets" only; 0 is off.
    """

    mode: Literal["l2", "targets"] = "l2"
    weight: float = 0.1
    fg_ratio: float = 0.5
    alpha: float = 0.5
    sigma: float | Literal["auto"] = 0.3
    granularity: Literal["logit", "sample"] = "logit"
    feature_sigma: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "fg_ratio"):
            check_range(f"distill.noisy_teacher.{name}", getattr(self, name), 0, 1)
        for name in ("sigma", "feature_sigma", "weight"):
            if getattr(self, name) != "auto":
                check_range(f"distill.noisy_teacher.{name}", getattr(self, name), 0)
        if self.feature_sigma and self.mode == "l2":
            raise UsageError(
                "distill.noisy_teacher.feature_sigma: mode=l2 compares logits only. "
                "Set distill.noisy_teacher.mode=targets for noisy features."
            )
        default = (NoisyTeacherConfig.weight, NoisyTeacherConfig.fg_ratio)
        if self.mode == "targets" and (self.weight, self.fg_ratio) != default:
            raise UsageError(
                "distill.noisy_teacher: weight and fg_ratio have no effect with mode=targets, which has no loss. "
                "Omit them."
            )


class NoisyTeacher(DistillMethod):
    """Adds noise to the logits or features of the teacher.

    Args:
        config: Settings.
        student: Detector to train.
        teacher: Teacher; its logits are compared in mode "l2".
    """

    Config = NoisyTeacherConfig
    requires = frozenset({"logits"})
    capability_hint = " With soft_labels, set distill.noisy_teacher.mode=targets."
    supports_unlabeled = True

    def __init__(self, config: NoisyTeacherConfig, student: BaseDetector, teacher: Any) -> None:
        super().__init__(config, student, teacher)
        if config.sigma == "auto":
            raise UsageError(
                "distill.noisy_teacher.sigma=auto: requires a run of hkd-train with a number as --batch. Set one, or "
                "set sigma to a number."
            )
        self._sigma = float(config.sigma)
        if config.mode == "l2":
            _check_same_strides(student, teacher)

    @classmethod
    def candidate_configs(cls, config: NoisyTeacherConfig) -> list[NoisyTeacherConfig]:
        """Return one configuration per value of sigma if it is "auto"."""
        return [replace(config, sigma=sigma) for sigma in SIGMAS] if config.sigma == "auto" else []

    @classmethod
    def required_capabilities(cls, config: NoisyTeacherConfig) -> frozenset[str]:
        """Return "logits" for mode "l2"; mode "targets" needs nothing itself."""
        return cls.requires if config.mode == "l2" else frozenset()

    @classmethod
    def resolve_config(cls, config: NoisyTeacherConfig, methods: Mapping[str, Any]) -> NoisyTeacherConfig:
        """Check that mode "targets" has a method to act on."""
        others = [load_method(name) for name, other in methods.items() if other is not config]
        if config.mode == "targets" and not any(other.has_losses for other in others):
            raise UsageError(
                "distill.noisy_teacher.mode=targets: it changes what another method learns from. Add one, such as hkd."
            )
        if config.feature_sigma and not any("features" in other.requires for other in others):
            raise UsageError(
                "distill.noisy_teacher.feature_sigma: no method compares features. Add hkd, or set it to 0."
            )
        return config

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted loss `noisy_teacher` over all comparable logits; nothing in mode "targets"."""
        if self.config.mode == "targets":
            return {}
        losses = [
            fg_balanced_l2(
                student, self.perturb_logits(teacher), teacher.sigmoid(), self.config.fg_ratio, batch.reduce_mean
            )
            for student, teacher, _ in comparable_logits(batch)
        ]
        return {"noisy_teacher": self.config.weight * torch.stack(losses).sum()}

    def perturb_teacher(self, outputs: Perturbed) -> Perturbed:
        """Add noise to the logits, and with `feature_sigma` to the RoI features, in mode "targets"."""
        if self.config.mode == "l2":
            return outputs
        return outputs.map_values(self.perturb_logits, self._perturb_features)

    def perturb_features(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add noise to feature maps [B, C, H, W] with `feature_sigma`."""
        return {name: self._perturb_features(feature) for name, feature in features.items()}

    def perturb_logits(self, logits: Tensor) -> Tensor:
        """Add noise to logits [N, ...]; N counts images, or RoIs of a two-stage detector.

        Args:
            logits (Tensor[N, ...]): Logits.

        Returns:
            Tensor[N, ...]: Noisy logits.
        """
        return self._perturb(logits, self._sigma)

    def _perturb_features(self, features: Tensor) -> Tensor:
        return self._perturb(features, self.config.feature_sigma) if self.config.feature_sigma else features

    def _perturb(self, values: Tensor, sigma: float) -> Tensor:
        """Multiply the values [N, ...] of each sample by 1 + xi with probability alpha."""
        ones = [1] * (values.ndim - 1)
        shape = values.shape if self.config.granularity == "logit" else (len(values), *ones)
        factor = 1 + sigma * torch.randn(shape, device=values.device, dtype=values.dtype)
        is_perturbed = torch.rand(len(values), *ones, device=values.device) < self.config.alpha
        return torch.where(is_perturbed, factor * values, values)


def fg_balanced_l2(
    student_logits: Tensor, teacher_logits: Tensor, teacher_scores: Tensor, fg_ratio: float, reduce_mean: ReduceMean
) -> Tensor:
    """Compute half the squared error of logits, averaged over persons and over background.

    L = r * sum(t e) / sum(t) + (1 - r) * sum((1 - t) e) / sum(1 - t) with e = (s - z')^2 / 2.

    Args:
        student_logits (Tensor[...]): s.
        teacher_logits (Tensor[...]): z', with noise.
        teacher_scores (Tensor[...]): t, 0 to 1, without noise.
        fg_ratio: r, 0 to 1.
        reduce_mean: Converts the local sums of the weights to global divisors.

    Returns:
        Scalar.
    """
    error = 0.5 * (student_logits - teacher_logits).square()
    fg_loss, bg_loss = (
        (weight * error).sum() / reduce_mean(weight.sum()) for weight in (teacher_scores, 1 - teacher_scores)
    )
    return fg_ratio * fg_loss + (1 - fg_ratio) * bg_loss


def _check_same_strides(student: BaseDetector, teacher: Any) -> None:
    """Raise UsageError for two dense detectors whose anchor points differ."""
    strides = [[layer.stride for layer in detector.feature_info()] for detector in (student, teacher)]
    if strides[0] != strides[1] and "rois" not in student.capabilities | teacher.capabilities:
        raise UsageError(
            f"--distill noisy_teacher: the student has strides {strides[0]} and the teacher {strides[1]}, so their "
            "logits cannot be compared. Use equal strides, or add hkd or soft_labels and set "
            "distill.noisy_teacher.mode=targets."
        )
