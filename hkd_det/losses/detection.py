"""The detector's own loss against the truth: scores of both branches and boxes, ignore regions left out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hkd_det.losses.distribution_focal import distribution_focal_loss
from hkd_det.losses.overlap import giou_loss
from hkd_det.losses.varifocal import varifocal_loss
from hkd_det.models.assignment import Targets, TaskAlignedAssigner, TruthBatch
from hkd_det.models.detector import Prediction
from hkd_det.models.points import encode_sides

Norm = Callable[[Tensor], Tensor]
"""A sum over this process's pictures to what its losses are divided by, so that the processes' mean is right."""


def norm_alone(total: Tensor) -> Tensor:
    """The norm of the only process: the sum itself, at least 1."""
    return total.clamp(min=1.0)


@dataclass(frozen=True)
class DetectionLoss:
    """Terms and their weights (PP-YOLOE's), with both assignments."""

    score_weight: float = 1.0
    box_weight: float = 2.5
    distribution_weight: float = 0.5
    many: TaskAlignedAssigner = field(default_factory=lambda: TaskAlignedAssigner(top=10))
    one: TaskAlignedAssigner = field(default_factory=lambda: TaskAlignedAssigner(top=1, beta=2.0, centred=1.0))

    def __call__(self, prediction: Prediction, truth: TruthBatch, norm_of: Norm = norm_alone) -> dict[str, Tensor]:
        """The weighted terms `score`, `score_one`, `box`, `distribution`, each a scalar.

        Each is divided by the summed target quality of the global batch, so that with gradients averaged
        over processes they equal those of one process.
        """
        raw = prediction.raw
        terms: dict[str, Tensor] = {}
        for name, assigner, logits in (("score", self.many, raw.many), ("score_one", self.one, raw.one)):
            targets = assigner(
                logits.detach().sigmoid(), prediction.boxes_xyxy.detach(), prediction.points, prediction.strides, truth
            )
            norm = norm_of(targets.quality.sum())
            per_point = varifocal_loss(logits, targets.quality) * targets.counted
            terms[name] = self.score_weight * per_point.sum() / norm
            if name == "score":
                terms |= self._boxes(prediction, targets, norm)
        return terms

    def _boxes(self, prediction: Prediction, targets: Targets, norm: Tensor) -> dict[str, Tensor]:
        picture, point = targets.positive.nonzero(as_tuple=True)
        weight = targets.quality[picture, point]
        wanted = targets.boxes_xyxy[picture, point]
        sides = prediction.raw.sides[picture, point]
        distances = encode_sides(wanted, prediction.points[point], prediction.strides[point], sides.shape[-1])
        overlap = giou_loss(prediction.boxes_xyxy[picture, point], wanted)
        shape = distribution_focal_loss(sides, distances).mean(-1)
        return {
            "box": self.box_weight * (overlap * weight).sum() / norm,
            "distribution": self.distribution_weight * (shape * weight).sum() / norm,
        }


def total(terms: dict[str, Tensor]) -> Tensor:
    """The sum of the terms."""
    return torch.stack(list(terms.values())).sum()
