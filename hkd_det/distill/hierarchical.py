"""Hierarchical distillation: pyramid, region and logit level (HKD, Chen et al. 2019; one-stage form).

Pyramid: the student's neck maps, through adapters, imitate the teacher's, people and background balanced.
Region: the same on 7x7 RoIAligned features of the true boxes and of the teacher's confident ones.
Logit: the student's scores learn the teacher's where they differ, its side distributions the teacher's
where the teacher sees somebody, in each branch that both have. Where the two have no points in common, and for a
one-to-one branch that the teacher lacks, its detections take their place (`detections.py`). `../shared/methods.md`,
section 1, has the reasons.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hkd_det.distill.adapter import Adapter, Projection
from hkd_det.distill.detections import taught_by
from hkd_det.distill.lesson import Lesson
from hkd_det.distill.regions import region_errors
from hkd_det.distill.soft_points import soft_points
from hkd_det.distill.tap_choice import TapNames, paired
from hkd_det.distill.two_stage import TwoStageLevels
from hkd_det.errors import UsageError
from hkd_det.losses.imitation import balanced_mean, imitation_error
from hkd_det.losses.localisation import localisation_loss
from hkd_det.losses.overlap import giou_loss
from hkd_det.losses.soft_score import soft_score_loss
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.prediction import Branch, Prediction
from hkd_det.models.tap import Tap


@dataclass(frozen=True)
class Hierarchical:
    """How much each level counts, and its choices.

    foreground: share of the pyramid level's weight that lies on people. confident: teacher score, 0..1,
    from which its boxes are regions too. regions: at most so many of them a picture. two_stage: instead of all these,
    the levels between two Faster R-CNNs. truth: what the task's own terms count while the teacher teaches, 0..1; at 0
    they set in when it stops, for the end of training. adapter: what brings the student's channels to the teacher's.
    taps: the layers whose maps are compared.
    """

    pyramid: float = 2.0
    region: float = 1.0
    score: float = 1.0
    box: float = 0.5
    foreground: float = 0.5
    confident: float = 0.4
    regions: int = 20
    two_stage: TwoStageLevels = field(default_factory=TwoStageLevels)
    truth: float = 1.0
    adapter: Projection = "plain"
    taps: TapNames = field(default_factory=TapNames)

    def __post_init__(self) -> None:
        if not 0 <= self.truth <= 1:
            raise UsageError(f"hkd.truth = {self.truth}: the weight of the task's own terms is 0..1")
        if not 0 <= self.foreground <= 1:
            raise UsageError(f"hkd.foreground = {self.foreground}: a share, 0..1")
        if min(self.pyramid, self.region, self.score, self.box, self.confident, self.regions) < 0:
            raise UsageError("hkd: pyramid, region, score, box, confident and regions are not negative")


class HierarchicalDistillation(nn.Module):
    """The three levels between a student's and a teacher's taps. Its parameters are the adapters'."""

    def __init__(self, student: Sequence[Tap], teacher: Sequence[Tap], weights: Hierarchical) -> None:
        super().__init__()
        self.weights = weights
        pairs = paired(student, teacher, weights.taps)
        self.sources = [list(student).index(mine) for mine, _ in pairs]
        self.adapters = nn.ModuleList(Adapter(mine, other, weights.adapter) for mine, other in pairs)
        self.strides = [other.stride for _, other in pairs]
        # Regions are read from one map a stride, fine to coarse: of several taps the last.
        self.region_levels = [index for _, index in sorted({s: i for i, s in enumerate(self.strides)}.items())]

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """The weighted terms `hkd_pyramid`, `hkd_region`, `hkd_score`, `hkd_box`, each a scalar."""
        maps = [lesson.my_maps[source] for source in self.sources]
        adapted = [adapter(level) for adapter, level in zip(self.adapters, maps, strict=True)]
        scores, boxes = self._logits(lesson)
        return {
            "hkd_pyramid": self.weights.pyramid * self._pyramid(adapted, lesson),
            "hkd_region": self.weights.region * self._region(adapted, lesson),
            "hkd_score": self.weights.score * scores,
            "hkd_box": self.weights.box * boxes,
        }

    def _pyramid(self, adapted: Sequence[Tensor], lesson: Lesson) -> Tensor:
        levels = []
        for mine, other, stride in zip(adapted, lesson.other_maps, self.strides, strict=True):
            people = _cells_with_people((other.shape[-2], other.shape[-1]), stride, lesson.truth)
            levels.append(balanced_mean(imitation_error(mine, other), people, self.weights.foreground).mean())
        return torch.stack(levels).mean()

    def _region(self, adapted: Sequence[Tensor], lesson: Lesson) -> Tensor:
        truth, maps = lesson.truth, lesson.other_maps
        found, most = lesson.found, self.weights.regions
        scores = pad_sequence([of_one[:most] for of_one in found.scores], batch_first=True, padding_value=-1.0)
        theirs = pad_sequence([of_one[:most] for of_one in found.boxes_xyxy], batch_first=True)
        read = torch.cat([truth.real, scores >= self.weights.confident], 1)
        picture, place = read.nonzero(as_tuple=True)
        boxes = torch.cat([truth.boxes_xyxy, theirs], 1)[picture, place]
        norm = lesson.norm_of(torch.tensor(float(len(boxes)), device=boxes.device))
        if not len(boxes):
            return 0.0 * torch.stack([level.float().mean() for level in adapted]).sum()
        mine, other = ([of_one[index] for index in self.region_levels] for of_one in (adapted, maps))
        strides = [self.strides[index] for index in self.region_levels]
        return region_errors(mine, other, strides, boxes, picture).sum() / norm

    def _logits(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        student, teacher = lesson.mine, lesson.other
        if not (isinstance(student, Prediction) and isinstance(teacher, Prediction) and student.shares_points(teacher)):
            return taught_by(lesson, lesson.found)
        scores, boxes = student.many.logits.new_zeros(()), student.many.logits.new_zeros(())
        for mine, other in ((student.many, teacher.many), (student.one, teacher.one)):
            if mine is None or other is None:
                continue
            confidence = other.logits.sigmoid()
            norm = lesson.norm_of(confidence.sum())
            scores = scores + soft_score_loss(mine.logits, other.logits).sum() / norm
            if mine.learns_boxes:
                boxes = boxes + (confidence * _box_error(mine, other)).sum() / norm
        if student.one is not None and teacher.one is None:
            # The teacher's branch `many` would have it answer several times; what is left after suppression does not.
            more = soft_points(student, lesson.found, lesson.truth, lesson.norm_of, one_alone=True)
            scores, boxes = scores + more[0], boxes + more[1]
        return scores, boxes


def _box_error(student: Branch, teacher: Branch) -> Tensor:
    """[B, A]: of the side distributions where both have the same bins, else of the boxes."""
    if student.sides is not None and teacher.sides is not None and student.sides.shape == teacher.sides.shape:
        return localisation_loss(student.sides, teacher.sides)
    return giou_loss(student.boxes_xyxy, teacher.boxes_xyxy)


def _cells_with_people(map_hw: tuple[int, int], stride: int, truth: TruthBatch) -> Tensor:
    """[B, H, W] bool: the cell's centre lies in a person's box."""
    x1, y1, x2, y2 = truth.boxes_xyxy[..., None].unbind(2)  # [B, M, 1]
    y, x = (stride * (torch.arange(cells, device=x1.device) + 0.5) for cells in map_hw)
    rows, columns = (y > y1) & (y < y2), (x > x1) & (x < x2) & truth.real[..., None]  # [B, M, H] and [B, M, W]
    return (rows[..., None] & columns[:, :, None]).any(1)
