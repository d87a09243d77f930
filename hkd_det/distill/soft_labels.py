"""Soft labels: the student learns the boxes and scores of a teacher's detections. Every teacher provides them."""

from dataclasses import dataclass

from torch import Tensor

from hkd_det.config import check_range
from hkd_det.distill.base import DistillMethod
from hkd_det.distill.batch import DistillationBatch


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
        for name in ("cls", "box", "background_weight"):
            check_range(f"distill.soft_labels.{name}", getattr(self, name), 0)


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
