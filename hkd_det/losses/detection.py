"""The detector's own loss against the truth: scores of both branches and boxes, ignore regions left out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hkd_det.losses.distribution_focal import distribution_focal_loss
from hkd_det.losses.overlap import giou_loss
from hkd_det.losses.varifocal import varifocal_loss
from hkd_det.models.assignment import Targets, TaskAlignedAssigner, TruthBatch
from hkd_det.models.points import encode_sides
from hkd_det.models.prediction import Branch, Prediction

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
        """The weighted terms `score`, `box`, `distribution` of the branch `many`, `…_one` of the other, each a scalar.

        Each is divided by the summed target quality of the global batch, so that with gradients averaged
        over processes they equal those of one process.
        """
        terms = self._branch(prediction, prediction.many, self.many, truth, norm_of)
        if prediction.one is not None:
            once = self._branch(prediction, prediction.one, self.one, truth, norm_of)
            terms |= {f"{name}_one": term for name, term in once.items()}
        return terms

    def _branch(
        self, prediction: Prediction, branch: Branch, assigner: TaskAlignedAssigner, truth: TruthBatch, norm_of: Norm
    ) -> dict[str, Tensor]:
        scores, boxes = branch.logits.detach().sigmoid(), branch.boxes_xyxy.detach()
        targets = assigner(scores, boxes, prediction.points, prediction.strides, truth)
        norm = norm_of(targets.quality.sum())
        per_point = varifocal_loss(branch.logits, targets.quality) * targets.counted
        terms = {"score": self.score_weight * per_point.sum() / norm}
        if branch.learns_boxes:
            terms |= self.boxes(prediction, branch, targets, norm)
        return terms

    def boxes(self, prediction: Prediction, branch: Branch, targets: Targets, norm: Tensor) -> dict[str, Tensor]:
        """The weighted terms `box` and, of side distributions, `distribution`: each point counts by its quality."""
        picture, point = targets.positive.nonzero(as_tuple=True)
        weight = targets.quality[picture, point]
        wanted = targets.boxes_xyxy[picture, point]
        overlap = giou_loss(branch.boxes_xyxy[picture, point], wanted)
        terms = {"box": self.box_weight * (overlap * weight).sum() / norm}
        if branch.sides is not None:
            sides = branch.sides[picture, point]
            distances = encode_sides(wanted, prediction.points[point], prediction.strides[point], sides.shape[-1])
            shape = distribution_focal_loss(sides, distances).mean(-1)
            terms["distribution"] = self.distribution_weight * (shape * weight).sum() / norm
        return terms


def total(terms: dict[str, Tensor]) -> Tensor:
    """The sum of the terms."""
    return torch.stack(list(terms.values())).sum()
