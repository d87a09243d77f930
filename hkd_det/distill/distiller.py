"""Distiller: runs the frozen teacher on the student's batch and asks the methods for their terms."""

import torch
from torch import Tensor, nn

from hkd_det.distill.hierarchical import Hierarchical, HierarchicalDistillation
from hkd_det.distill.lesson import Lesson
from hkd_det.distill.methods import Methods
from hkd_det.distill.noise import NoisyTeacher
from hkd_det.distill.noisy_logits import NoisyLogits
from hkd_det.distill.tap_choice import TapNames, paired, tapped
from hkd_det.distill.taps import TapRecorder
from hkd_det.distill.two_stage import TwoStageDistillation
from hkd_det.errors import UsageError
from hkd_det.losses.detection import Norm
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.output import Output
from hkd_det.models.tap import Tap


class Distiller(nn.Module):
    """The methods that teach one detector by another. Its parameters are the methods' own, never the teacher's."""

    def __init__(self, student: PersonDetector, teacher: PersonDetector, methods: Methods) -> None:
        super().__init__()
        # In tuples, so no submodules: the teacher is not trained, averaged or saved, and the student not twice.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._student = (student,)
        student_taps, teacher_taps = tapped(student, teacher, methods.hkd.taps if methods.hkd else TapNames())
        self._student_recorder = TapRecorder(student, student_taps)
        self._teacher_recorder = TapRecorder(teacher, teacher_taps)
        noise = methods.noise
        self.noisy = NoisyTeacher(noise) if noise and noise.form == "targets" else None
        self.truth_weight = methods.hkd.truth if methods.hkd else 1.0
        self._heard: tuple[Output, list[Tensor]] | None = None
        self.methods = nn.ModuleList()
        if methods.hkd:
            self.methods.append(_hierarchical(student, teacher, (student_taps, teacher_taps), methods.hkd, self.noisy))
        if noise and noise.form == "l2":
            self.methods.append(NoisyLogits(noise))

    def hear(self, pictures: Tensor) -> None:
        """Run the teacher on the batch that the student sees next: what it needed meanwhile is then the student's."""
        with torch.no_grad():
            output: Output = self._teacher[0](pictures)
        self._heard = output, self._teacher_recorder.take()

    def forward(
        self, pictures: Tensor, mine: Output, truth: TruthBatch, strength: float, norm_of: Norm
    ) -> dict[str, Tensor]:
        """The distillation terms for the batch the student has just seen, times `strength`, 0..1.

        Its teacher need not have been heard before; that only saves memory.
        """
        (teacher,), (student,) = self._teacher, self._student
        if self._heard is None:
            self.hear(pictures)
        assert self._heard is not None
        (other, other_maps), self._heard = self._heard, None
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

    def close(self) -> None:
        """Remove the taps from both networks."""
        self._student_recorder.close()
        self._teacher_recorder.close()


def _hierarchical(
    student: PersonDetector,
    teacher: PersonDetector,
    taps: tuple[list[Tap], list[Tap]],
    settings: Hierarchical,
    noisy: NoisyTeacher | None,
) -> nn.Module:
    """The published form between two-stage detectors, ours where either is dense; `taps` are both's.

    Raises UsageError for noise that nobody would hear: a two-stage teacher's reaches two-stage students only.
    """
    if isinstance(student, FasterRcnn) and isinstance(teacher, FasterRcnn):
        return TwoStageDistillation(student, teacher, settings.two_stage, noisy, paired(*taps, settings.taps))
    if noisy and isinstance(teacher, FasterRcnn):
        raise UsageError("--distill noise: a two-stage teacher's is for a two-stage student, region by region")
    return HierarchicalDistillation(*taps, settings)
