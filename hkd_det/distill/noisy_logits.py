"""The noisy teacher's own term (Sau and Balasubramanian 2016): the student regresses perturbed logits by L2.

Published for a classifier: L = 1 / (2 |B|) sum ||s - z'||^2. A detector answers at over a thousand points, nearly all
of them background, and a plain sum would be about the background's confidence alone. Here the squared errors are
averaged with weights: `foreground` of them lies where the teacher sees people, in proportion to its score t, the rest
in proportion to 1 - t. The weights come from the teacher without noise, so that noise leaves the expected gradient as
it is: E[s - z'] = s - z.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hkd_det.distill.lesson import Lesson
from hkd_det.distill.noise import Noise, NoisyTeacher
from hkd_det.distill.soft_regions import without_doubles
from hkd_det.distill.two_stage import shared_regions
from hkd_det.errors import UsageError
from hkd_det.losses.detection import Norm
from hkd_det.losses.soft_score import CERTAIN
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.prediction import Prediction, TwoStage

REGIONS = 64  # of the teacher's proposals, or of the student's boxes, that are judged by both, a picture


def check_points(student: PersonDetector, teacher: PersonDetector) -> None:
    """UsageError for two dense detectors that answer at different points: their logits can't be compared."""
    mine, others = ([tap.stride for tap in detector.taps()] for detector in (student, teacher))
    if mine != others and not any(isinstance(detector, FasterRcnn) for detector in (student, teacher)):
        raise UsageError(
            f"--distill noise needs student and teacher with the same pyramid strides, not {mine} and {others}; "
            "form=targets, beside hkd or detections, does not"
        )


class NoisyLogits(nn.Module):
    """The term `noise`. It has no parameters."""

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise, self.noisy = noise, NoisyTeacher(noise)

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """The weighted term, a scalar: the sum over the pairs of logits that the two detectors can compare."""
        errors = [
            balanced_l2(mine, self.noisy.logits(other), other.sigmoid(), self.noise.foreground, lesson.norm_of)
            for mine, other in _pairs(lesson)
        ]
        return {"noise": self.noise.weight * torch.stack(errors).sum()}


def balanced_l2(student: Tensor, noisy: Tensor, score: Tensor, foreground: float, norm_of: Norm) -> Tensor:
    """Half the squared difference of logits [...]: the mean weighted by `score` 0..1, and the one by 1 - score."""
    error = 0.5 * (student - noisy).square()
    people, others = ((weight * error).sum() / norm_of(weight.sum()) for weight in (score, 1 - score))
    return foreground * people + (1 - foreground) * others


def _pairs(lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
    """The student's logits and the teacher's, these without gradients, of the same points or the same regions."""
    mine, other = lesson.mine, lesson.other
    if isinstance(mine, Prediction) and isinstance(other, Prediction):
        both = ((mine.many, other.many), (mine.one, other.one))
        return [(a.logits, b.logits) for a, b in both if a is not None and b is not None]
    if isinstance(mine, TwoStage):
        if isinstance(other, TwoStage):
            regions = shared_regions(lesson, other, REGIONS)
            return [(_judged(lesson.student, mine, regions), _taught(lesson, other, regions))]
        found = without_doubles(lesson.found)
        wanted = torch.cat(found.scores).logit(eps=CERTAIN).detach()
        return [(_judged(lesson.student, mine, found.boxes_xyxy), wanted)]
    if isinstance(mine, Prediction) and isinstance(other, TwoStage):
        # The branch `one` is left out: it must be silent about boxes beside its best, where the teacher is not.
        best = mine.many.logits.topk(min(REGIONS, mine.many.logits.shape[1])).indices  # [B, K]
        boxes = mine.many.boxes_xyxy.detach().gather(1, best[..., None].expand(-1, -1, 4))
        return [(mine.many.logits.gather(1, best).flatten(), _taught(lesson, other, boxes.unbind()))]
    raise UsageError("--distill noise: this teacher shows no logits to perturb")


def _judged(detector: object, output: TwoStage, regions: Sequence[Tensor]) -> Tensor:
    """[R] logits of a two-stage detector's second half."""
    assert isinstance(detector, FasterRcnn)
    return detector.regions(output, regions).logits


def _taught(lesson: Lesson, output: TwoStage, regions: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return _judged(lesson.teacher, output, regions)
