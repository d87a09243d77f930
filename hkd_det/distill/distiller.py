"""Distiller: runs the frozen teacher on the student's batch and asks the methods for their terms."""

import torch
from torch import Tensor, nn

from hkd_det.distill.hierarchical import HierarchicalDistillation, HierarchicalWeights
from hkd_det.distill.taps import TapRecorder, pyramid_taps
from hkd_det.losses.detection import Norm
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.detector import Detector, Prediction


class Distiller(nn.Module):
    """Hierarchical distillation of one detector into another. Its parameters are the adapters', never the teacher's."""

    def __init__(self, student: Detector, teacher: Detector, weights: HierarchicalWeights) -> None:
        super().__init__()
        # In a tuple, so that the teacher is no submodule: it is not trained, averaged or saved.
        self._teacher = (teacher.eval().requires_grad_(False),)
        student_taps, teacher_taps = pyramid_taps(student), pyramid_taps(teacher)
        self._student_recorder = TapRecorder(student, student_taps)
        self._teacher_recorder = TapRecorder(teacher, teacher_taps)
        self.method = HierarchicalDistillation(student_taps, teacher_taps, weights)

    def forward(
        self, pictures: Tensor, student: Prediction, truth: TruthBatch, strength: float, norm_of: Norm
    ) -> dict[str, Tensor]:
        """The distillation terms for the batch the student has just seen, times `strength`, 0..1."""
        with torch.no_grad():
            teacher: Prediction = self._teacher[0](pictures)
        terms: dict[str, Tensor] = self.method(
            self._student_recorder.take(), self._teacher_recorder.take(), student, teacher, truth, norm_of
        )
        return {name: strength * term for name, term in terms.items()}

    def skip(self) -> None:
        """Let go of what was recorded in a step that is not distilled."""
        self._student_recorder.take()

    def close(self) -> None:
        """Remove the taps from both networks."""
        self._student_recorder.close()
        self._teacher_recorder.close()
