"""Distiller: runs the frozen teacher on the student's batch and asks the methods for their terms."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hkd_det.distill.capacity.terms import CapacityTerms
from hkd_det.distill.detections import DetectionsDistillation
from hkd_det.distill.hierarchical import Hierarchical, HierarchicalDistillation
from hkd_det.distill.lesson import Lesson
from hkd_det.distill.methods import Methods
from hkd_det.distill.noise import NoisyTeacher
from hkd_det.distill.noisy_logits import NoisyLogits, check_points
from hkd_det.distill.tap_choice import TapNames, paired, tapped
from hkd_det.distill.taps import TapRecorder
from hkd_det.distill.two_stage import TwoStageDistillation
from hkd_det.errors import UsageError
from hkd_det.losses.detection import Norm
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.black_box import BlackBox
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.output import Output
from hkd_det.models.prediction import TwoStage
from hkd_det.models.tap import Tap


class Distiller(nn.Module):
    """The methods that teach one detector by another. Its parameters are the methods' own, never the teacher's."""

    def __init__(self, student: PersonDetector, teacher: PersonDetector | BlackBox, methods: Methods) -> None:
        super().__init__()
        # In tuples, so no submodules: the teacher is not trained, averaged or saved, and the student not twice.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._student = (student,)
        inside = _inside(teacher, methods)
        names = methods.hkd.taps if methods.hkd else TapNames()
        student_taps, teacher_taps = tapped(student, inside, names) if inside else ([], [])
        # Nothing works in place behind the ends of a pyramid, but behind a layer that somebody names something may.
        copies = bool(names.student)
        self._student_recorder = TapRecorder(student, student_taps, copies)
        self._teacher_recorder = TapRecorder(teacher, teacher_taps, copies)
        noise = methods.noise
        self.noisy = NoisyTeacher(noise) if noise and noise.form == "targets" else None
        self.truth_weight = methods.hkd.truth if methods.hkd else 1.0
        self._heard: tuple[Output, list[Tensor]] | None = None
        self.methods = nn.ModuleList()
        if methods.hkd and inside:
            self.methods.append(_hierarchical(student, inside, (student_taps, teacher_taps), methods.hkd, self.noisy))
        if methods.detections:
            self.methods.append(DetectionsDistillation(methods.detections))
        if noise and noise.form == "l2" and inside:
            check_points(student, inside)
            self.methods.append(NoisyLogits(noise))
        self.capacity: CapacityTerms | None = None
        if methods.cdd and inside:
            # Hierarchical distillation has a logit level of its own.
            settings = replace(methods.cdd, score=0.0) if methods.hkd else methods.cdd
            self.capacity = CapacityTerms(student, inside, settings)
            self.methods.append(self.capacity)

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
        noise = self.noisy.found if self.noisy and isinstance(other, TwoStage) else None
        lesson = Lesson(pictures, truth, student, teacher, mine, other, my_maps, other_maps, norm_of, noise)
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


def _inside(teacher: PersonDetector | BlackBox, methods: Methods) -> PersonDetector | None:
    """The teacher, if its features and logits can be read; UsageError for a method that would need them of another."""
    if not isinstance(teacher, BlackBox):
        return teacher
    shows = f"{teacher.model.path} shows neither features nor logits"
    if methods.noise and methods.noise.form == "l2":
        raise UsageError(f"--distill noise: {shows}; beside detections, distill.noise.form=targets is for it")
    if methods.hkd or methods.cdd:
        asked = "hkd" if methods.hkd else "cdd"
        raise UsageError(f"--distill {asked}: {shows}; --distill detections learns from its boxes and scores")
    return None


def _hierarchical(
    student: PersonDetector,
    teacher: PersonDetector,
    taps: tuple[list[Tap], list[Tap]],
    settings: Hierarchical,
    noisy: NoisyTeacher | None,
) -> nn.Module:
    """The published form between two-stage detectors, ours where either is dense; `taps` are both's."""
    if isinstance(student, FasterRcnn) and isinstance(teacher, FasterRcnn):
        _check_heard(settings, ("pyramid", "region", "score", "box", "foreground", "confident", "regions"))
        pairs = paired(*taps, settings.taps)
        return TwoStageDistillation(student, teacher, settings.two_stage, noisy, settings.adapter, pairs)
    _check_heard(settings, ("two_stage",))
    return HierarchicalDistillation(*taps, settings)


def _check_heard(settings: Hierarchical, others: Sequence[str]) -> None:
    """UsageError for a setting of the other form, which nobody would hear."""
    for name in others:
        if getattr(settings, name) != getattr(Hierarchical(), name):
            raise UsageError(
                f"distill.hkd.{name} is not heard here: between two Faster R-CNNs the levels' weights are those of "
                "two_stage, for all others those of hkd itself"
            )
