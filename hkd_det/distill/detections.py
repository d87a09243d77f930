"""Distilling detections: the student learns from a teacher's boxes and scores alone, so any teacher will do."""

from dataclasses import dataclass

from torch import Tensor, nn

from hkd_det.distill.lesson import Lesson
from hkd_det.distill.soft_points import soft_points
from hkd_det.distill.soft_regions import soft_regions
from hkd_det.errors import UsageError
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.prediction import Found, Prediction, TwoStage


@dataclass(frozen=True)
class DetectionTerms:
    """How much the teacher's scores and boxes count.

    silence: of a dense student's points where the teacher sees nobody, how much they count against those where it does.
    """

    score: float = 1.0
    box: float = 2.5
    silence: float = 1.0

    def __post_init__(self) -> None:
        if min(self.score, self.box, self.silence) < 0:
            raise UsageError("detections: score, box and silence are not negative")


class DetectionsDistillation(nn.Module):
    """A student under a teacher's finished detections. It has no parameters."""

    def __init__(self, weights: DetectionTerms) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """The weighted terms `soft_score` and `soft_box`, each a scalar."""
        scores, boxes = taught_by(lesson, lesson.found, self.weights.silence)
        return {"soft_score": self.weights.score * scores, "soft_box": self.weights.box * boxes}


def taught_by(lesson: Lesson, found: Found, silence: float = 1.0) -> tuple[Tensor, Tensor]:
    """The score term and the box term of the student under these detections, at its points or in its regions."""
    if isinstance(lesson.student, FasterRcnn) and isinstance(lesson.mine, TwoStage):
        return soft_regions(lesson.student, lesson.mine, found, lesson.norm_of)
    if not isinstance(lesson.mine, Prediction):
        raise UsageError("only a detector that learns can be taught; this one gives finished detections")
    return soft_points(lesson.mine, found, lesson.truth, lesson.norm_of, silence)
