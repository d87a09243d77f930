"""HKD between two two-stage detectors, as published (Chen et al., ICIP 2019, arXiv 1909.09325)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.config import check_range
from hkd_det.distill.adapters import Adapter, Projection
from hkd_det.distill.batch import DistillationBatch, sample_rois
from hkd_det.models.base import BaseDetector, FeatureInfo
from hkd_det.ops.losses import pkd_loss

Pair = tuple[FeatureInfo, FeatureInfo]
"""A feature layer of the student, and the layer of the teacher that it is compared with."""


@dataclass(frozen=True)
class TwoStageConfig:
    """Settings of HKD between two Faster R-CNN models. The paper does not state the weights.

    Attributes:
        pyramid: Weight of the feature-pyramid loss.
        region: Weight of the RoI-feature loss.
        logit: Weight of the loss on the last hidden layer of the box head.
        num_proposals: Maximum number of teacher proposals per image that are compared.
    """

    pyramid: float = 1.0
    region: float = 1.0
    logit: float = 1.0
    num_proposals: int = 64

    def __post_init__(self) -> None:
        for name in ("pyramid", "region", "logit", "num_proposals"):
            check_range(f"distill.hkd.two_stage.{name}", getattr(self, name), 0)


class TwoStageHKD(nn.Module):
    """Losses at three levels between two Faster R-CNN models: ||A s - t||^2 / n, averaged over positions or RoIs.

    s and t are the features of student and teacher with n values each, and A is an affine adapter.

    Pyramid: feature-pyramid levels. Region: 7x7 RoI features at the input of the box head. Logit: output of the two
    hidden layers of the box head, from which scores and boxes are linear. Both heads process the same RoIs: the ground
    truth and the teacher's best proposals. These cover persons and difficult background and do not depend on the
    student. The box head of the teacher processes only these RoIs instead of all proposals.

    Args:
        student: Student.
        teacher: Teacher.
        pairs: Compared feature layers.
        config: Weights and number of proposals.
        projection: Projection of the pyramid adapters. "orthogonal" compares standardized features (PKD loss).
    """

    def __init__(
        self,
        student: BaseDetector,
        teacher: Any,
        pairs: Sequence[Pair],
        config: TwoStageConfig,
        projection: Projection = "plain",
    ) -> None:
        super().__init__()
        self.config = config
        self.names = [(s.name, t.name) for s, t in pairs]
        self.pyramid_adapters = nn.ModuleList(Adapter(s, t, projection) for s, t in pairs)
        self.feature_loss = pkd_loss if projection == "orthogonal" else mse_per_item
        self.region_adapter = nn.Conv2d(student.spec.channels, teacher.spec.channels, 1)
        self.logit_adapter = nn.Linear(student.spec.head_width, teacher.spec.head_width)

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            batch: Batch of two two-stage detectors.

        Returns:
            `hkd_pyramid`, `hkd_region` and `hkd_logit`, weighted scalars.
        """
        rois = sample_rois(batch, self.config.num_proposals)
        avg_factor = batch.reduce_mean(torch.tensor(float(sum(map(len, rois))), device=rois[0].device))
        student = batch.student.forward_rois(batch.student_outputs, rois)
        teacher = batch.forward_teacher_rois(rois)
        levels = [
            self.feature_loss(adapter(batch.student_features[s]), batch.teacher_features[t]).mean()
            for adapter, (s, t) in zip(self.pyramid_adapters, self.names, strict=True)
        ]
        region = mse_per_item(self.region_adapter(student.roi_features), teacher.roi_features).sum() / avg_factor
        logit = mse_per_item(self.logit_adapter(student.box_features), teacher.box_features).sum() / avg_factor
        return {
            "hkd_pyramid": self.config.pyramid * torch.stack(levels).mean(),
            "hkd_region": self.config.region * region,
            "hkd_logit": self.config.logit * logit,
        }


def mse_per_item(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared error of each item.

    Args:
        student (Tensor[N, ...]): Student features.
        teacher (Tensor[N, ...]): Teacher features; no gradient.

    Returns:
        Tensor[N]: Mean over all other dimensions.
    """
    return (student.float() - teacher.detach().float()).square().flatten(1).mean(1)
