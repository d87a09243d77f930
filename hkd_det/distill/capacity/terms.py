"""What the teacher asks of a capacity-dynamic student: its scores, and people's vectors inside every block."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hkd_det.distill.capacity.compactor import Site, sites_of
from hkd_det.distill.capacity.evidence import Evidence, Seen
from hkd_det.distill.capacity.people import Pooling, drawn_regions
from hkd_det.distill.capacity.settings import CapacityDynamic
from hkd_det.distill.lesson import Lesson
from hkd_det.distill.taps import TapRecorder
from hkd_det.distill.two_stage import shared_regions
from hkd_det.errors import UsageError
from hkd_det.losses.soft_score import soft_score_loss
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.prediction import Prediction, TwoStage
from hkd_det.models.tap import Tap

PROPOSALS = 64  # of a two-stage teacher, whose scores are learnt beside those of the true boxes


class CapacityTerms(nn.Module):
    """The terms `cdd_score` and `cdd_feature`. Its parameters are adapters where widths differ.

    looks: whether the next lesson is to show what channels are chosen by. seen: what the last one showed, a layer each;
    empty when it was not to, or when there was none.
    """

    def __init__(self, student: PersonDetector, teacher: PersonDetector, settings: CapacityDynamic) -> None:
        """Raises UsageError unless the teacher has all the layers that the student is to shed channels of."""
        super().__init__()
        sites = sites_of(student)
        _check_alike(sites, student, teacher)
        self.settings = settings
        self.sites = tuple(sites)  # no submodules: they are the student's
        names = [name for site in sites for name in site.layer.norms]
        self._student_recorder = TapRecorder(student, [Tap(f"{name}.norm", 0, 0) for name in names])
        # Activations after the teacher's normalisations work in place and would overwrite what is recorded.
        self._teacher_recorder = TapRecorder(teacher, [Tap(name, 0, 0) for name in names], copies=True)
        self.adapters = nn.ModuleList(_adapter(site, teacher) for site in sites)
        self.evidence = nn.ModuleList(
            Evidence(settings, len(site.compactor.masked), _width(site, teacher)) for site in sites
        )
        self.looks = True
        self.seen: list[Seen] = []

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """The weighted terms, each a scalar."""
        height, width = lesson.pictures.shape[-2:]
        regions = drawn_regions(lesson.truth, (height, width), distractors=self.looks)
        people = regions.rois[: regions.people]
        of_people = Pooling(people, (height, width))
        of_all = Pooling(regions.rois, (height, width)) if self.looks else of_people
        norm = lesson.norm_of(torch.tensor(float(len(people)), device=people.device))
        distances = lesson.pictures.new_zeros((), dtype=torch.float32)
        self.seen = []
        mine, other = iter(self._student_recorder.take()), iter(self._teacher_recorder.take())
        for site, adapter in zip(self.sites, self.adapters, strict=True):
            levels = range(len(site.layer.norms))
            student = of_people([next(mine) for _ in levels])
            teacher = of_all([next(other) for _ in levels])
            distances = distances + _distance(adapter(student), teacher[: len(people)]).sum() / norm
            if self.looks:
                with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
                    self.seen.append(Seen(teacher, site.compactor.of_pooled(student)))
        return {
            "cdd_feature": self.settings.feature * distances,
            "cdd_score": self.settings.score * self._score(lesson),
        }

    def weigh(self, layer: int, seen: Seen) -> Tensor:
        """[C] bool: what all people agree that a layer does not need. See `Evidence.look`."""
        adapter, evidence = self.adapters[layer], self.evidence[layer]
        assert isinstance(evidence, Evidence)
        projection = adapter.weight.detach() if isinstance(adapter, nn.Linear) else None
        return evidence.look(seen, projection, self.sites[layer].compactor.masked)

    def relative(self, layer: int) -> Tensor:
        """[C] a layer's responses, comparable between layers."""
        evidence = self.evidence[layer]
        assert isinstance(evidence, Evidence)
        return evidence.relative(self.sites[layer].compactor.masked)

    def skip(self) -> None:
        """Let go of what was recorded in a step that is not distilled."""
        self._student_recorder.take()
        self.seen = []

    def close(self) -> None:
        """Remove the taps from both networks."""
        self._student_recorder.close()
        self._teacher_recorder.close()

    def _score(self, lesson: Lesson) -> Tensor:
        student, teacher = lesson.mine, lesson.other
        if self.settings.score == 0:
            return lesson.pictures.new_zeros((), dtype=torch.float32)
        if isinstance(student, TwoStage) and isinstance(teacher, TwoStage):
            return self._region_score(lesson, student, teacher)
        assert isinstance(student, Prediction) and isinstance(teacher, Prediction)
        loss = student.many.logits.new_zeros(())
        for mine, other in ((student.many, teacher.many), (student.one, teacher.one)):
            if mine is not None and other is not None:
                norm = lesson.norm_of(other.logits.sigmoid().sum())
                loss = loss + self._softened(mine.logits, other.logits).sum() / norm
        return loss

    def _region_score(self, lesson: Lesson, mine: TwoStage, other: TwoStage) -> Tensor:
        assert isinstance(lesson.student, FasterRcnn) and isinstance(lesson.teacher, FasterRcnn)
        regions = shared_regions(lesson, other, PROPOSALS)
        answer = lesson.student.regions(mine, regions)
        with torch.no_grad():
            wanted = lesson.teacher.regions(other, regions)
        count = torch.tensor(float(len(answer.logits)), device=answer.logits.device)
        return self._softened(answer.logits, wanted.logits).sum() / lesson.norm_of(count)

    def _softened(self, mine: Tensor, other: Tensor) -> Tensor:
        """T^2 times the divergence of scores at temperature T: its gradient's size does not depend on T (Hinton)."""
        temperature = self.settings.temperature
        return temperature**2 * soft_score_loss(mine / temperature, other / temperature)


def _check_alike(sites: Sequence[Site], student: PersonDetector, teacher: PersonDetector) -> None:
    if type(teacher) is not type(student):
        raise UsageError("--distill cdd compares inner layers: its teacher must be of the student's own family")
    theirs = {(layer.conv, layer.norms) for layer in teacher.inner_layers()}
    for site in sites:
        if (site.layer.conv, site.layer.norms) not in theirs:
            raise UsageError(
                f"--distill cdd: the teacher has no layer {site.layer.conv}; leave --model out to start as the teacher"
            )


def _adapter(site: Site, teacher: PersonDetector) -> nn.Module:
    mine, other = len(site.compactor.masked), _width(site, teacher)
    return nn.Identity() if mine == other else nn.Linear(mine, other, bias=False)


def _width(site: Site, teacher: PersonDetector) -> int:
    return int(teacher.get_submodule(site.layer.conv).out_channels)  # type: ignore[arg-type]


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """[N] Euclidean distances of [N, C]; at 0 the gradient is 0, not NaN."""
    return torch.linalg.vector_norm(student - teacher, dim=1)
