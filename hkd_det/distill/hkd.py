"""HKD as it was published (Chen et al. 2019): a two-stage teacher and student, MSE at three levels.

Pyramid: the feature pyramid's maps. Region: the 7x7 features that enter the region head. Logit: what leaves the head's
two fully connected layers, the vector that scores and boxes are linear in. The student is thinner, so each level has an
adapter. `../shared/methods.md`, section 1, says what is known of the source and what is not.

Both heads see the same regions: the true boxes, and the best that the teacher's first stage proposes. Those lie on
the people it will find and on the background it takes longest to reject; they do not move while the student learns,
as the student's own would; and they cost nothing, where the teacher's detections would cost its head on 1000 regions.

Hierarchical distillation: pyramid, region and logit level (HKD, Chen et al. 2019; one-stage form).

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

from hkd_det.distill.adapters import Adapter, Projection
from hkd_det.distill.base import DistillationBatch, sample_rois
from hkd_det.distill.noisy_teacher import NoisyTeacher
from hkd_det.errors import UsageError
from hkd_det.models.base import BranchOutputs, DenseOutputs, FeatureInfo, ProposalOutputs, Targets
from hkd_det.models.criterion import dense_soft_label_losses
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.feature_layers import LayerPairs, pair_by_stride, pair_layers
from hkd_det.ops.boxes import giou_loss
from hkd_det.ops.losses import fg_balanced_mean, localization_distillation_loss, pkd_loss, quality_focal_kd_loss
from hkd_det.ops.roi_pool import roi_feature_loss


@dataclass(frozen=True)
class TwoStageConfig:
    """How much each level counts (the source does not tell), and how many of the teacher's proposals are regions."""

    pyramid: float = 1.0
    region: float = 1.0
    logit: float = 1.0
    num_proposals: int = 64

    def __post_init__(self) -> None:
        if min(self.pyramid, self.region, self.logit, self.num_proposals) < 0:
            raise UsageError("distill.hkd.two_stage: pyramid, region, logit and num_proposals are not negative")


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


def mse_per_item(student: Tensor, teacher: Tensor) -> Tensor:
    """[N] mean squared error of [N, ...] features, item by item."""
    return (student.float() - teacher.detach().float()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class HKDConfig:
    """How much each level counts, and its choices.

    foreground: share of the pyramid level's weight that lies on people. confident: teacher score, 0..1,
    from which its boxes are regions too. regions: at most so many of them a picture. two_stage: instead of all these,
    the levels between two Faster R-CNNs. truth: what the task's own terms count while the teacher teaches, 0..1; at 0
    they set in when it stops, for the end of training. adapter: what brings the student's channels to the teacher's.
    taps: the layers whose maps are compared.
    """

    pyramid: float = 2.0
    region: float = 1.0
    cls: float = 1.0
    box: float = 0.5
    fg_ratio: float = 0.5
    region_min_score: float = 0.4
    max_regions: int = 20
    two_stage: TwoStageConfig = field(default_factory=TwoStageConfig)
    det_loss_weight: float = 1.0
    adapter: Projection = "plain"
    feature_layers: LayerPairs = field(default_factory=LayerPairs)

    def __post_init__(self) -> None:
        if not 0 <= self.det_loss_weight <= 1:
            raise UsageError(
                f"distill.hkd.det_loss_weight = {self.det_loss_weight}: the weight of the task's own terms is 0..1"
            )
        if not 0 <= self.fg_ratio <= 1:
            raise UsageError(f"distill.hkd.fg_ratio = {self.fg_ratio}: a share, 0..1")
        if min(self.pyramid, self.region, self.cls, self.box, self.region_min_score, self.max_regions) < 0:
            raise UsageError("hkd: pyramid, region, cls, box, region_min_score and max_regions are not negative")


class HKD(nn.Module):
    """The three levels between a student's and a teacher's taps. Its parameters are the adapters'."""

    def __init__(
        self, student_layers: Sequence[FeatureInfo], teacher_layers: Sequence[FeatureInfo], config: HKDConfig
    ) -> None:
        super().__init__()
        self.config = config
        pairs = pair_layers(student_layers, teacher_layers, config.feature_layers)
        self.student_indices = [list(student_layers).index(mine) for mine, _ in pairs]
        self.adapters = nn.ModuleList(Adapter(mine, other, config.adapter) for mine, other in pairs)
        self.strides = [other.stride for _, other in pairs]
        # Regions are read from one map a stride, fine to coarse: of several taps the last.
        self.region_levels = [index for _, index in sorted({s: i for i, s in enumerate(self.strides)}.items())]

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """The weighted terms `hkd_pyramid`, `hkd_region`, `hkd_score`, `hkd_box`, each a scalar."""
        maps = [batch.student_features[source] for source in self.student_indices]
        adapted = [adapter(level) for adapter, level in zip(self.adapters, maps, strict=True)]
        scores, boxes = self._compute_logit_losses(batch)
        return {
            "hkd_pyramid": self.config.pyramid * self._compute_pyramid_loss(adapted, batch),
            "hkd_region": self.config.region * self._compute_region_loss(adapted, batch),
            "hkd_cls": self.config.cls * scores,
            "hkd_box": self.config.box * boxes,
        }

    def _compute_pyramid_loss(self, student_features: Sequence[Tensor], batch: DistillationBatch) -> Tensor:
        levels = []
        for mine, other, stride in zip(student_features, batch.teacher_features, self.strides, strict=True):
            people = foreground_mask((other.shape[-2], other.shape[-1]), stride, batch.targets)
            levels.append(fg_balanced_mean(pkd_loss(mine, other), people, self.config.fg_ratio).mean())
        return torch.stack(levels).mean()

    def _compute_region_loss(self, student_features: Sequence[Tensor], batch: DistillationBatch) -> Tensor:
        truth, maps = batch.targets, batch.teacher_features
        found, most = batch.teacher_detections, self.config.max_regions
        scores = pad_sequence([of_one[:most] for of_one in found.scores], batch_first=True, padding_value=-1.0)
        theirs = pad_sequence([of_one[:most] for of_one in found.boxes_xyxy], batch_first=True)
        read = torch.cat([truth.valid, scores >= self.config.region_min_score], 1)
        picture, place = read.nonzero(as_tuple=True)
        boxes = torch.cat([truth.boxes_xyxy, theirs], 1)[picture, place]
        norm = batch.reduce_mean(torch.tensor(float(len(boxes)), device=boxes.device))
        if not len(boxes):
            return 0.0 * torch.stack([level.float().mean() for level in student_features]).sum()
        mine, other = ([of_one[index] for index in self.region_levels] for of_one in (student_features, maps))
        strides = [self.strides[index] for index in self.region_levels]
        return roi_feature_loss(mine, other, strides, boxes, picture).sum() / norm

    def _compute_logit_losses(self, batch: DistillationBatch) -> tuple[Tensor, Tensor]:
        student, teacher = batch.student_outputs, batch.teacher_outputs
        if not (
            isinstance(student, DenseOutputs)
            and isinstance(teacher, DenseOutputs)
            and student.has_same_anchor_points(teacher)
        ):
            return batch.student.soft_label_loss(
                batch.student_outputs, batch.teacher_detections, batch.targets, batch.reduce_mean
            )
        scores, boxes = student.one2many.logits.new_zeros(()), student.one2many.logits.new_zeros(())
        for mine, other in ((student.one2many, teacher.one2many), (student.one2one, teacher.one2one)):
            if mine is None or other is None:
                continue
            confidence = other.logits.sigmoid()
            norm = batch.reduce_mean(confidence.sum())
            scores = scores + quality_focal_kd_loss(mine.logits, other.logits).sum() / norm
            if mine.has_box_loss:
                boxes = boxes + (confidence * _compute_box_loss(mine, other)).sum() / norm
        if student.one2one is not None and teacher.one2one is None:
            # The teacher's branch `many` would have it answer several times; what is left after suppression does not.
            more = dense_soft_label_losses(
                student, batch.teacher_detections, batch.targets, batch.reduce_mean, one2one_only=True
            )
            scores, boxes = scores + more[0], boxes + more[1]
        return scores, boxes


def _compute_box_loss(student: BranchOutputs, teacher: BranchOutputs) -> Tensor:
    """[B, A]: of the side distributions where both have the same bins, else of the boxes."""
    if (
        student.box_logits is not None
        and teacher.box_logits is not None
        and student.box_logits.shape == teacher.box_logits.shape
    ):
        return localization_distillation_loss(student.box_logits, teacher.box_logits)
    return giou_loss(student.boxes_xyxy, teacher.boxes_xyxy)


def foreground_mask(feature_hw: tuple[int, int], stride: int, targets: Targets) -> Tensor:
    """[B, H, W] bool: the cell's centre lies in a person's box."""
    x1, y1, x2, y2 = targets.boxes_xyxy[..., None].unbind(2)  # [B, M, 1]
    y, x = (stride * (torch.arange(cells, device=x1.device) + 0.5) for cells in feature_hw)
    rows, columns = (y > y1) & (y < y2), (x > x1) & (x < x2) & targets.valid[..., None]  # [B, M, H] and [B, M, W]
    return (rows[..., None] & columns[:, :, None]).any(1)
