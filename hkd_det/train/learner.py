"""Learner: what one step of training computes. One module, so that DDP sees every parameter that learns."""

from typing import Any

from torch import Tensor, nn

from hkd_det.distill.distiller import DistillationLoss
from hkd_det.losses.detection import DetectionCriterion, ReduceMean
from hkd_det.models.assignment import Targets
from hkd_det.models.family import BaseDetector
from hkd_det.models.faster_rcnn import FasterRCNN

LossDict = dict[str, Tensor]


class Distiller(nn.Module):
    """A detector with its loss and, if it has a teacher, its distiller."""

    def __init__(
        self, student: BaseDetector, distillation_loss: DistillationLoss | None, reduce_mean: ReduceMean
    ) -> None:
        super().__init__()
        self.student = student
        self.distillation_loss = distillation_loss
        self.criterion = DetectionCriterion()
        self.reduce_mean = reduce_mean

    def forward(self, images: Tensor, targets: Targets, distill_weight: float) -> tuple[LossDict, LossDict]:
        """The batch's terms, the task's and the teacher's; `strength` 0..1 scales the latter, at 0 there are none."""
        if self.distillation_loss is not None and distill_weight > 0:
            self.distillation_loss.forward_teacher(images)
        output = self.student(images)
        task = self._compute_det_loss(output, targets)
        taught: LossDict = {}
        if self.distillation_loss is not None and distill_weight > 0:
            taught = self.distillation_loss(images, output, targets, distill_weight, self.reduce_mean)
            task = {name: self.distillation_loss.det_loss_weight * term for name, term in task.items()}
        elif self.distillation_loss is not None:
            self.distillation_loss.clear()
        return task, taught

    def _compute_det_loss(self, outputs: Any, targets: Targets) -> LossDict:
        if isinstance(self.student, FasterRCNN):
            return self.student.loss(outputs, targets, self.reduce_mean)
        return self.criterion(outputs, targets, self.reduce_mean)
