"""A teacher's detections as soft targets of a dense student's points: any teacher's, a black box's too.

The student's own assignment says which points answer for which of the teacher's boxes, as if they were the truth. A
point's score learns the quality its box would have there, times the teacher's score: a box that the teacher is sure of
by 0.6 asks its best point for 0.6, no more. Every other point learns that the teacher sees nobody there, save where
the truth knows better: a teacher's silence is no evidence against an annotated person.

A teacher's detections as soft targets of a two-stage student's second stage: any teacher's, a black box's too.

Scores are learnt at the teacher's boxes: there it says what it thinks. Boxes are learnt there, and from the student's
own proposals nearby: a region that lies right already teaches only to leave it where it is.

A teacher that answers once a person says next to nothing (1e-9) of the boxes beside its best. That is no opinion of
what they show, and a second stage judges what a region shows: such doubles are left out.

Distilling detections: the student learns from a teacher's boxes and scores alone, so any teacher will do.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from hkd_det.distill.base import DistillationBatch
from hkd_det.errors import UsageError


@dataclass(frozen=True)
class SoftLabelConfig:
    """How much the teacher's scores and boxes count.

    silence: of a dense student's points where the teacher sees nobody, how much they count against those where it does.
    """

    cls: float = 1.0
    box: float = 2.5
    background_weight: float = 1.0

    def __post_init__(self) -> None:
        if min(self.cls, self.box, self.background_weight) < 0:
            raise UsageError("soft_labels: cls, box and background_weight are not negative")


class SoftLabelDistillation(nn.Module):
    """A student under a teacher's finished detections. It has no parameters."""

    def __init__(self, config: SoftLabelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """The weighted terms `soft_score` and `soft_box`, each a scalar."""
        scores, boxes = batch.student.soft_label_loss(
            batch.student_outputs,
            batch.teacher_detections,
            batch.targets,
            batch.reduce_mean,
            self.config.background_weight,
        )
        return {"soft_cls": self.config.cls * scores, "soft_box": self.config.box * boxes}
