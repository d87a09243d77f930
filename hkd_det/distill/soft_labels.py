"""Soft labels: the student learns the boxes and scores of a teacher's detections. Every teacher provides them."""

from dataclasses import dataclass

from torch import Tensor

from hkd_det.distill.base import DistillMethod
from hkd_det.distill.batch import DistillationBatch
from hkd_det.errors import UsageError


@dataclass(frozen=True)
class SoftLabelConfig:
    """Settings of soft-label distillation.

    Attributes:
        cls: Weight of the score loss.
        box: Weight of the box loss.
        background_weight: Factor for the anchor points of a dense student at which the teacher detects nothing.
    """

    cls: float = 1.0
    box: float = 2.5
    background_weight: float = 1.0

    def __post_init__(self) -> None:
        if min(self.cls, self.box, self.background_weight) < 0:
            raise UsageError("distill.soft_labels: cls, box and background_weight must be at least 0.")


class SoftLabels(DistillMethod):
    """Trains on the detections of any teacher as soft labels, also on unlabeled images."""

    Config = SoftLabelConfig
    requires = frozenset({"detections"})
    supports_unlabeled = True

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted losses `soft_cls` and `soft_box`, scalars."""
        cls_loss, box_loss = batch.student.soft_label_loss(
            batch.student_outputs,
            batch.teacher_detections,
            batch.targets,
            batch.reduce_mean,
            self.config.background_weight,
        )
        return {"soft_cls": self.config.cls * cls_loss, "soft_box": self.config.box * box_loss}
