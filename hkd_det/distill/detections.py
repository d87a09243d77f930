"""Distilling detections: the student learns from a teacher's boxes and scores alone, so any teacher will do."""

from dataclasses import dataclass

from torch import Tensor, nn

from hkd_det.distill.lesson import DistillationBatch
from hkd_det.distill.soft_points import dense_soft_label_losses
from hkd_det.distill.soft_regions import roi_soft_label_losses
from hkd_det.errors import UsageError
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.prediction import DenseOutputs, DetectionBatch, ProposalOutputs


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
            raise UsageError("detections: score, box and silence are not negative")


class SoftLabelDistillation(nn.Module):
    """A student under a teacher's finished detections. It has no parameters."""

    def __init__(self, config: SoftLabelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """The weighted terms `soft_score` and `soft_box`, each a scalar."""
        scores, boxes = soft_label_losses(batch, batch.teacher_detections, self.config.background_weight)
        return {"soft_score": self.config.cls * scores, "soft_box": self.config.box * boxes}


def soft_label_losses(
    batch: DistillationBatch, detections: DetectionBatch, background_weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The score term and the box term of the student under these detections, at its points or in its regions."""
    if isinstance(batch.student, FasterRCNN) and isinstance(batch.student_outputs, ProposalOutputs):
        return roi_soft_label_losses(batch.student, batch.student_outputs, detections, batch.reduce_mean)
    if not isinstance(batch.student_outputs, DenseOutputs):
        raise UsageError("only a detector that learns can be taught; this one gives finished detections")
    return dense_soft_label_losses(
        batch.student_outputs, detections, batch.targets, batch.reduce_mean, background_weight
    )
