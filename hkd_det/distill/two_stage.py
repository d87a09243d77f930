"""HKD as it was published (Chen et al. 2019): a two-stage teacher and student, MSE at three levels.

Pyramid: the feature pyramid's maps. Region: the 7x7 features that enter the region head. Logit: what leaves the head's
two fully connected layers, the vector that scores and boxes are linear in. The student is thinner, so each level has an
adapter. `../shared/methods.md`, section 1, says what is known of the source and what is not.

Both heads see the same regions: the true boxes, and the best that the teacher's first stage proposes. Those lie on
the people it will find and on the background it takes longest to reject; they do not move while the student learns,
as the student's own would; and they cost nothing, where the teacher's detections would cost its head on 1000 regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hkd_det.distill.adapter import Adapter, Projection, pair_by_stride
from hkd_det.distill.lesson import Lesson
from hkd_det.distill.noise import NoisyTeacher
from hkd_det.errors import UsageError
from hkd_det.losses.imitation import imitation_error
from hkd_det.losses.two_stage import people_and_ignored
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.prediction import TwoStage
from hkd_det.models.tap import Tap


@dataclass(frozen=True)
class TwoStageLevels:
    """How much each level counts (the source does not tell), and how many of the teacher's proposals are regions."""

    pyramid: float = 1.0
    region: float = 1.0
    logit: float = 1.0
    proposals: int = 64

    def __post_init__(self) -> None:
        if min(self.pyramid, self.region, self.logit, self.proposals) < 0:
            raise UsageError("hkd.two_stage: pyramid, region, logit and proposals are not negative")


class TwoStageDistillation(nn.Module):
    """The three levels between two Faster R-CNNs. Its parameters are the adapters'.

    projection: of the pyramid's adapters; where it is orthogonal, the pyramid's maps are standardised first.
    """

    def __init__(
        self,
        student: FasterRcnn,
        teacher: FasterRcnn,
        weights: TwoStageLevels,
        noisy: NoisyTeacher | None = None,
        projection: Projection = "plain",
        pairs: Sequence[tuple[Tap, Tap]] | None = None,
    ) -> None:
        """`pairs`: the maps that are compared, in the order in which the lesson brings them; None: the pyramids'."""
        super().__init__()
        self.weights, self.noisy = weights, noisy
        mine, other = student.spec, teacher.spec
        pairs = pairs or pair_by_stride(student.taps(), teacher.taps())
        self.pyramid = nn.ModuleList(Adapter(*pair, projection) for pair in pairs)
        self.level_error = imitation_error if projection == "orthogonal" else squared_error
        self.region = nn.Conv2d(mine.channels, other.channels, 1)
        self.logit = nn.Linear(mine.head_width, other.head_width)

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """The weighted terms `hkd_pyramid`, `hkd_region`, `hkd_logit`, each a scalar."""
        student, teacher, mine, other = lesson.student, lesson.teacher, lesson.mine, lesson.other
        assert isinstance(student, FasterRcnn) and isinstance(teacher, FasterRcnn)
        assert isinstance(mine, TwoStage) and isinstance(other, TwoStage)
        regions = shared_regions(lesson, other, self.weights.proposals)
        norm = lesson.norm_of(torch.tensor(float(sum(map(len, regions))), device=regions[0].device))
        seen = student.regions(mine, regions)
        with torch.no_grad():
            wanted = teacher.regions(other, regions)
            if self.noisy:
                wanted = self.noisy.regions(wanted)
        levels = [
            self.level_error(adapter(level), target).mean()
            for adapter, level, target in zip(self.pyramid, lesson.my_maps, lesson.other_maps, strict=True)
        ]
        region = squared_error(self.region(seen.pooled), wanted.pooled).sum() / norm
        logit = squared_error(self.logit(seen.embedding), wanted.embedding).sum() / norm
        return {
            "hkd_pyramid": self.weights.pyramid * torch.stack(levels).mean(),
            "hkd_region": self.weights.region * region,
            "hkd_logit": self.weights.logit * logit,
        }


def shared_regions(lesson: Lesson, teachers: TwoStage, proposals: int) -> list[Tensor]:
    """For each picture [R, 4] xyxy: its people, and the teacher's best `proposals`."""
    people, _ = people_and_ignored(lesson.truth)
    return [torch.cat([mine, best[:proposals]]) for mine, best in zip(people, teachers.proposals, strict=True)]


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """[N] mean squared error of [N, ...] features, item by item."""
    return (student.float() - teacher.detach().float()).square().flatten(1).mean(1)
