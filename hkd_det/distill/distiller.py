"""Distiller: runs the frozen teacher on the student's batch and asks the methods for their terms."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from hkd_det.distill.capacity.terms import CapacityTerms
from hkd_det.distill.hierarchical import Hierarchical, HierarchicalDistillation
from hkd_det.distill.lesson import Lesson
from hkd_det.distill.methods import Methods
from hkd_det.distill.noise import NoisyTeacher
from hkd_det.distill.taps import TapRecorder
from hkd_det.distill.two_stage import TwoStageDistillation
from hkd_det.errors import UsageError
from hkd_det.losses.detection import Norm
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.output import Output


class Distiller(nn.Module):
    """The methods that teach one detector by another. Its parameters are the methods' own, never the teacher's."""

    def __init__(self, student: PersonDetector, teacher: PersonDetector, methods: Methods) -> None:
        super().__init__()
        # In tuples, so no submodules: the teacher is not trained, averaged or saved, and the student not twice.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._student = (student,)
        student_taps, teacher_taps = student.taps(), teacher.taps()
        self._student_recorder = TapRecorder(student, student_taps)
        self._teacher_recorder = TapRecorder(teacher, teacher_taps)
        self.noisy = NoisyTeacher(methods.noise) if methods.noise else None
        self.truth_weight = methods.hkd.truth if methods.hkd else 1.0
        self.methods = nn.ModuleList()
        if methods.hkd:
            self.methods.append(_hierarchical(student, teacher, methods.hkd, self.noisy))
        self.capacity: CapacityTerms | None = None
        if methods.cdd:
            # Hierarchical distillation has a logit level of its own.
            settings = replace(methods.cdd, score=0.0) if methods.hkd else methods.cdd
            self.capacity = CapacityTerms(student, teacher, settings)
            self.methods.append(self.capacity)

    def forward(
        self, pictures: Tensor, mine: Output, truth: TruthBatch, strength: float, norm_of: Norm
    ) -> dict[str, Tensor]:
        """The distillation terms for the batch the student has just seen, times `strength`, 0..1."""
        (teacher,), (student,) = self._teacher, self._student
        with torch.no_grad():
            other: Output = teacher(pictures)
        other_maps = self._teacher_recorder.take()
        if self.noisy:
            other, other_maps = self.noisy.output(other), self.noisy.maps(other_maps)
        my_maps = self._student_recorder.take()
        lesson = Lesson(pictures, truth, student, teacher, mine, other, my_maps, other_maps, norm_of)
        terms: dict[str, Tensor] = {}
        for method in self.methods:
            terms |= method(lesson)
        return {name: strength * term for name, term in terms.items()}

    def skip(self) -> None:
        """Let go of what was recorded in a step that is not distilled."""
        self._student_recorder.take()
        if self.capacity:
            self.capacity.skip()

    def close(self) -> None:
        """Remove the taps from both networks."""
        self._student_recorder.close()
        self._teacher_recorder.close()
        if self.capacity:
            self.capacity.close()


def _hierarchical(
    student: PersonDetector, teacher: PersonDetector, settings: Hierarchical, noisy: NoisyTeacher | None
) -> nn.Module:
    """The published form between two-stage detectors, ours where either is dense.

    Raises UsageError for noise that nobody would hear: a two-stage teacher's reaches two-stage students only.
    """
    if isinstance(student, FasterRcnn) and isinstance(teacher, FasterRcnn):
        return TwoStageDistillation(student, teacher, settings.two_stage, noisy)
    if noisy and isinstance(teacher, FasterRcnn):
        raise UsageError("--distill noise: a two-stage teacher's is for a two-stage student, region by region")
    return HierarchicalDistillation(student.taps(), teacher.taps(), settings)
