"""Learner: what one step of training computes. One module, so that DDP sees every parameter that learns."""

from typing import Any

from torch import Tensor, nn

from hkd_det.distill.distiller import Distiller
from hkd_det.losses.detection import DetectionLoss, Norm
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn

Terms = dict[str, Tensor]


class Learner(nn.Module):
    """A detector with its loss and, if it has a teacher, its distiller."""

    def __init__(self, detector: PersonDetector, distiller: Distiller | None, norm_of: Norm) -> None:
        super().__init__()
        self.detector = detector
        self.distiller = distiller
        self.loss = DetectionLoss()
        self.norm_of = norm_of

    def forward(self, pictures: Tensor, truth: TruthBatch, strength: float) -> tuple[Terms, Terms]:
        """The batch's terms, the task's and the teacher's; `strength` 0..1 scales the latter, at 0 there are none."""
        if self.distiller is not None and strength > 0:
            self.distiller.hear(pictures)
        output = self.detector(pictures)
        task = self._task(output, truth)
        taught: Terms = {}
        if self.distiller is not None and strength > 0:
            taught = self.distiller(pictures, output, truth, strength, self.norm_of)
            task = {name: self.distiller.truth_weight * term for name, term in task.items()}
        elif self.distiller is not None:
            self.distiller.skip()
        return task, taught

    def _task(self, output: Any, truth: TruthBatch) -> Terms:
        if isinstance(self.detector, FasterRcnn):
            return self.detector.losses(output, truth, self.norm_of)
        return self.loss(output, truth, self.norm_of)
