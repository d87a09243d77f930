"""Learner: what one step of training computes. One module, so that DDP sees every parameter that learns."""

from torch import Tensor, nn

from hkd_det.distill.distiller import Distiller
from hkd_det.losses.detection import DetectionLoss, Norm
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.detector import Detector, Prediction


class Learner(nn.Module):
    """A detector with its loss and, if it has a teacher, its distiller."""

    def __init__(self, detector: Detector, distiller: Distiller | None, norm_of: Norm) -> None:
        super().__init__()
        self.detector = detector
        self.distiller = distiller
        self.loss = DetectionLoss()
        self.norm_of = norm_of

    def forward(self, pictures: Tensor, truth: TruthBatch, strength: float) -> dict[str, Tensor]:
        """The batch's loss terms; `strength` 0..1 scales the teacher's, at 0 the teacher isn't run."""
        prediction: Prediction = self.detector(pictures)
        terms = self.loss(prediction, truth, self.norm_of)
        if self.distiller is not None and strength > 0:
            terms |= self.distiller(pictures, prediction, truth, strength, self.norm_of)
        elif self.distiller is not None:
            self.distiller.skip()
        return terms
