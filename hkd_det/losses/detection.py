"""The detector's own loss against the truth: scores of both branches and boxes, ignore regions left out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hkd_det.losses.distribution_focal import distribution_focal_loss
from hkd_det.losses.overlap import generalized_box_iou_loss
from hkd_det.losses.varifocal import varifocal_loss
from hkd_det.models.assignment import AssignResult, Targets, TaskAlignedAssigner
from hkd_det.models.points import bbox2dist
from hkd_det.models.prediction import BranchOutputs, DenseOutputs

ReduceMean = Callable[[Tensor], Tensor]
"""A sum over this process's pictures to what its losses are divided by, so that the processes' mean is right."""


def clamp_min_one(total: Tensor) -> Tensor:
    """The norm of the only process: the sum itself, at least 1."""
    return total.clamp(min=1.0)


@dataclass(frozen=True)
class DetectionCriterion:
    """Terms and their weights (PP-YOLOE's), with both assignments."""

    cls_weight: float = 1.0
    box_weight: float = 2.5
    dfl_weight: float = 0.5
    one2many: TaskAlignedAssigner = field(default_factory=lambda: TaskAlignedAssigner(topk=10))
    one2one: TaskAlignedAssigner = field(
        default_factory=lambda: TaskAlignedAssigner(topk=1, beta=2.0, center_weight=1.0)
    )

    def __call__(
        self, outputs: DenseOutputs, targets: Targets, reduce_mean: ReduceMean = clamp_min_one
    ) -> dict[str, Tensor]:
        """The weighted terms `score`, `box`, `distribution` of the branch `many`, `…_one` of the other, each a scalar.

        Each is divided by the summed target quality of the global batch, so that with gradients averaged
        over processes they equal those of one process.
        """
        terms = self._compute_branch_losses(outputs, outputs.one2many, self.one2many, targets, reduce_mean)
        if outputs.one2one is not None:
            once = self._compute_branch_losses(outputs, outputs.one2one, self.one2one, targets, reduce_mean)
            terms |= {f"{name}_one": term for name, term in once.items()}
        return terms

    def _compute_branch_losses(
        self,
        outputs: DenseOutputs,
        branch: BranchOutputs,
        assigner: TaskAlignedAssigner,
        targets: Targets,
        reduce_mean: ReduceMean,
    ) -> dict[str, Tensor]:
        scores, boxes = branch.logits.detach().sigmoid(), branch.boxes_xyxy.detach()
        assign_result = assigner(scores, boxes, outputs.anchor_points, outputs.strides, targets)
        norm = reduce_mean(assign_result.target_scores.sum())
        per_point = varifocal_loss(branch.logits, assign_result.target_scores) * assign_result.loss_mask
        terms = {"score": self.cls_weight * per_point.sum() / norm}
        if branch.has_box_loss:
            terms |= self.compute_box_losses(outputs, branch, assign_result, norm)
        return terms

    def compute_box_losses(
        self, outputs: DenseOutputs, branch: BranchOutputs, assign_result: AssignResult, avg_factor: Tensor
    ) -> dict[str, Tensor]:
        """The weighted terms `box` and, of side distributions, `distribution`: each point counts by its quality."""
        picture, point = assign_result.fg_mask.nonzero(as_tuple=True)
        weight = assign_result.target_scores[picture, point]
        wanted = assign_result.boxes_xyxy[picture, point]
        overlap = generalized_box_iou_loss(branch.boxes_xyxy[picture, point], wanted)
        terms = {"box": self.box_weight * (overlap * weight).sum() / avg_factor}
        if branch.box_logits is not None:
            sides = branch.box_logits[picture, point]
            distances = bbox2dist(wanted, outputs.anchor_points[point], outputs.strides[point], sides.shape[-1])
            shape = distribution_focal_loss(sides, distances).mean(-1)
            terms["distribution"] = self.dfl_weight * (shape * weight).sum() / avg_factor
        return terms


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the terms."""
    return torch.stack(list(losses.values())).sum()
