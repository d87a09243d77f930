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
from hkd_det.distill.lesson import DistillationBatch
from hkd_det.distill.noise import NoisyTeacher
from hkd_det.errors import UsageError
from hkd_det.losses.imitation import pkd_loss
from hkd_det.losses.two_stage import split_ignored
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.prediction import ProposalOutputs
from hkd_det.models.tap import FeatureInfo


@dataclass(frozen=True)
class TwoStageConfig:
    """How much each level counts (the source does not tell), and how many of the teacher's proposals are regions."""

    pyramid: float = 1.0
    region: float = 1.0
    logit: float = 1.0
    num_proposals: int = 64

    def __post_init__(self) -> None:
        if min(self.pyramid, self.region, self.logit, self.num_proposals) < 0:
            raise UsageError("hkd.two_stage: pyramid, region, logit and proposals are not negative")


class TwoStageHKD(nn.Module):
    """The three levels between two Faster R-CNNs. Its parameters are the adapters'.

    projection: of the pyramid's adapters; where it is orthogonal, the pyramid's maps are standardised first.
    """

    def __init__(
        self,
        student: FasterRCNN,
        teacher: FasterRCNN,
        config: TwoStageConfig,
        noisy_teacher: NoisyTeacher | None = None,
        projection: Projection = "plain",
        layer_pairs: Sequence[tuple[FeatureInfo, FeatureInfo]] | None = None,
    ) -> None:
        """`pairs`: the maps that are compared, in the order in which the lesson brings them; None: the pyramids'."""
        super().__init__()
        self.config, self.noisy_teacher = config, noisy_teacher
        mine, other = student.spec, teacher.spec
        layer_pairs = layer_pairs or pair_by_stride(student.feature_info(), teacher.feature_info())
        self.pyramid_adapters = nn.ModuleList(Adapter(*pair, projection) for pair in layer_pairs)
        self.feature_loss = pkd_loss if projection == "orthogonal" else mse_per_item
        self.region_adapter = nn.Conv2d(mine.channels, other.channels, 1)
        self.logit_adapter = nn.Linear(mine.head_width, other.head_width)

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """The weighted terms `hkd_pyramid`, `hkd_region`, `hkd_logit`, each a scalar."""
        student, teacher, mine, other = batch.student, batch.teacher, batch.student_outputs, batch.teacher_outputs
        assert isinstance(student, FasterRCNN) and isinstance(teacher, FasterRCNN)
        assert isinstance(mine, ProposalOutputs) and isinstance(other, ProposalOutputs)
        regions = sample_rois(batch, other, self.config.num_proposals)
        norm = batch.reduce_mean(torch.tensor(float(sum(map(len, regions))), device=regions[0].device))
        seen = student.forward_rois(mine, regions)
        with torch.no_grad():
            wanted = teacher.forward_rois(other, regions)
            if self.noisy_teacher:
                wanted = self.noisy_teacher.perturb_rois(wanted)
        levels = [
            self.feature_loss(adapter(level), target).mean()
            for adapter, level, target in zip(
                self.pyramid_adapters, batch.student_features, batch.teacher_features, strict=True
            )
        ]
        region = mse_per_item(self.region_adapter(seen.roi_features), wanted.roi_features).sum() / norm
        logit = mse_per_item(self.logit_adapter(seen.box_features), wanted.box_features).sum() / norm
        return {
            "hkd_pyramid": self.config.pyramid * torch.stack(levels).mean(),
            "hkd_region": self.config.region * region,
            "hkd_logit": self.config.logit * logit,
        }


def sample_rois(batch: DistillationBatch, teacher_outputs: ProposalOutputs, num_proposals: int) -> list[Tensor]:
    """For each picture [R, 4] xyxy: its people, and the teacher's best `proposals`."""
    people, _ = split_ignored(batch.targets)
    return [
        torch.cat([mine, best[:num_proposals]]) for mine, best in zip(people, teacher_outputs.proposals, strict=True)
    ]


def mse_per_item(student: Tensor, teacher: Tensor) -> Tensor:
    """[N] mean squared error of [N, ...] features, item by item."""
    return (student.float() - teacher.detach().float()).square().flatten(1).mean(1)
