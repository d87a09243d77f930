"""Hierarchical knowledge distillation (HKD, Chen et al., ICIP 2019, arXiv 1909.09325).

L = w_pyramid L_pyramid + w_region L_region + w_logit L_logit: losses of feature maps, RoI features and logits.
`TwoStageHKD` is the published form for two two-stage models. `DenseHKD` transfers it to all other pairs; there the
logit level consists of a score loss and a box loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hkd_det.config import check_range
from hkd_det.distill.base import DistillMethod, RunContext
from hkd_det.distill.batch import Adapter, DistillationBatch, Projection, match_branches, sample_rois
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, BranchOutputs, FeatureInfo, Targets
from hkd_det.models.criterion import dense_soft_label_losses
from hkd_det.models.feature_layers import LayerPairs, pair_layers, select_layers
from hkd_det.ops.boxes import giou_loss
from hkd_det.ops.losses import fg_balanced_mean, localization_distillation_loss, pkd_loss, quality_focal_kd_loss
from hkd_det.ops.roi_pool import RoILevelRule, RoINorm, roi_feature_loss

Pair = tuple[FeatureInfo, FeatureInfo]
"""A feature layer of the student, and the layer of the teacher that it is compared with."""

ForegroundWeights = Literal["cell", "person"]
"""Weights of the cells on persons. cell: all equal, so that the weight of a person is proportional to its area. person:
1 / number of cells of the box, of the smallest one that contains the cell. All persons then have the same weight (FGD,
Yang et al. 2022)."""


@dataclass(frozen=True)
class TwoStageConfig:
    """Settings of HKD between two Faster R-CNN models. The paper does not state the weights.

    Attributes:
        pyramid: Weight of the feature-pyramid loss.
        region: Weight of the RoI-feature loss.
        logit: Weight of the loss on the last hidden layer of the box head.
        num_proposals: Maximum number of teacher proposals per image that are compared.
    """

    pyramid: float = 1.0
    region: float = 1.0
    logit: float = 1.0
    num_proposals: int = 64

    def __post_init__(self) -> None:
        for name in ("pyramid", "region", "logit", "num_proposals"):
            check_range(f"distill.hkd.two_stage.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class LevelStart:
    """When the losses of HKD start, as a ratio of the steps with distillation, 0 (from the first step) to 1.

    For example, the logit level from the beginning and the features later.

    Attributes:
        pyramid: Start of the feature-pyramid loss.
        region: Start of the region loss.
        cls: Start of the score loss.
        box: Start of the box loss.
    """

    pyramid: float = 0.0
    region: float = 0.0
    cls: float = 0.0
    box: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            check_range(f"distill.hkd.start.{item.name}", getattr(self, item.name), 0, 1)


@dataclass(frozen=True)
class HKDConfig:
    """Settings of HKD.

    Attributes:
        pyramid: Weight of the feature-pyramid loss.
        region: Weight of the RoI-feature loss.
        cls: Weight of the score loss.
        box: Weight of the box loss.
        fg_ratio: Total weight of the cells on persons in the pyramid loss, 0 to 1.
        region_min_score: Minimum score of a teacher box that is compared as a region, 0 to 1.
        max_regions: Maximum number of teacher boxes per image that are compared as regions.
        two_stage: Settings between two Faster R-CNN models, which replace those above.
        det_loss_weight: Factor for the detection losses while the teacher is used, 0 to 1.
        adapter: Projection from student to teacher channels.
        feature_layers: Layers to compare. Empty: the outputs of both feature pyramids, paired by stride.
        region_level: Feature level from which a region is pooled.
        region_norm: Positions over which the channels of region features are standardized.
        fg_weights: Weights of the cells on persons in the pyramid loss.
        start: When each level starts.
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
    region_level: RoILevelRule = "fpn"
    region_norm: RoINorm = "region"
    fg_weights: ForegroundWeights = "cell"
    start: LevelStart = field(default_factory=LevelStart)

    def __post_init__(self) -> None:
        for name in ("pyramid", "region", "cls", "box", "max_regions"):
            check_range(f"distill.hkd.{name}", getattr(self, name), 0)
        for name in ("fg_ratio", "region_min_score", "det_loss_weight"):
            check_range(f"distill.hkd.{name}", getattr(self, name), 0, 1)


class HKD(DistillMethod):
    """Hierarchical distillation of pyramid features, region features and logits through adapter layers.

    Args:
        config: Settings.
        student: Detector to train.
        teacher: Teacher with features and logits.

    Attributes:
        levels: The losses: `TwoStageHKD` for two Faster R-CNN models, else `DenseHKD`.
    """

    Config = HKDConfig
    requires = frozenset({"features", "logits"})
    supports_unlabeled = True

    def __init__(self, config: HKDConfig, student: BaseDetector, teacher: Any) -> None:
        super().__init__(config, student, teacher)
        self.det_loss_weight = config.det_loss_weight
        self._num_steps = 0.0
        self._started: dict[str, bool] = {}
        layers = select_layers(student, teacher, config.feature_layers, "distill.hkd.feature_layers")
        pairs = pair_layers(*layers, config.feature_layers)
        self._layers = LayerPairs(tuple(s.name for s, _ in pairs), tuple(t.name for _, t in pairs))
        self.levels: nn.Module
        if "rois" in student.capabilities & teacher.capabilities:
            shared = {"two_stage", "det_loss_weight", "adapter", "feature_layers"}
            _check_ignored_options(config, [item.name for item in fields(config) if item.name not in shared])
            self.levels = TwoStageHKD(student, teacher, pairs, config.two_stage, config.adapter)
        else:
            _check_ignored_options(config, ("two_stage",))
            self.levels = DenseHKD(pairs, config)

    def feature_layers(self) -> LayerPairs:
        """Return the compared layers, pair by pair."""
        return self._layers

    def setup(self, context: RunContext) -> None:
        """Store the number of steps, of which `start` is a ratio."""
        self._num_steps = context.total_steps * context.distill_ratio

    def before_step(self, step: int) -> None:
        """Select the levels that have started."""
        start = self.config.start
        self._started = {
            f"hkd_{item.name}": step >= getattr(start, item.name) * self._num_steps for item in fields(start)
        }

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted losses of all levels, scalars."""
        losses: dict[str, Tensor] = self.levels(batch)
        # A factor of 0 instead of no loss: DDP expects a gradient for every parameter in every step.
        return {name: loss * self._started.get(name, True) for name, loss in losses.items()}


def _check_ignored_options(config: HKDConfig, names: Sequence[str]) -> None:
    """Raise UsageError for a changed setting that has no effect for this pair of models."""
    for name in names:
        if getattr(config, name) != getattr(HKDConfig(), name):
            raise UsageError(
                f"distill.hkd.{name}: no effect for these models. Two Faster R-CNN models use "
                "distill.hkd.two_stage, all other pairs use the settings of distill.hkd itself."
            )


class DenseHKD(nn.Module):
    """Losses at three levels for all pairs other than two Faster R-CNN models.

    Pyramid: `pkd_loss` of the feature maps, averaged with a fixed weight of persons (`fg_balanced_mean`).
    Region: `pkd_loss` of 7x7 RoI features, at ground-truth boxes and confident teacher boxes.
    Score: sum |t - s| KL(t || s) / sum t, with the student score s and the teacher score t of each anchor point.
    Box: sum t d / sum t, where d is `localization_distillation_loss`, or 1 - GIoU for other distance bins.

    The score and box losses are summed over the branches that both models have. Without common anchor points, and for a
    one-to-one branch that the teacher lacks, the teacher's detections are soft labels (`dense_soft_label_losses`).

    Args:
        pairs: Compared feature layers.
        config: Settings.
    """

    def __init__(self, pairs: Sequence[Pair], config: HKDConfig) -> None:
        super().__init__()
        self.config = config
        self.names = [(s.name, t.name) for s, t in pairs]
        self.adapters = nn.ModuleList(Adapter(s, t, config.adapter) for s, t in pairs)
        self.strides = [teacher.stride for _, teacher in pairs]
        # RoIs are read from one level per stride, the last one of several.
        self.region_levels = [index for _, index in sorted({s: i for i, s in enumerate(self.strides)}.items())]

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            batch: Batch with the features of the compared layers.

        Returns:
            `hkd_pyramid`, `hkd_region`, `hkd_cls` and `hkd_box`, weighted scalars.
        """
        student = [
            adapter(batch.student_features[name]) for adapter, (name, _) in zip(self.adapters, self.names, strict=True)
        ]
        teacher = [batch.teacher_features[name] for _, name in self.names]
        cls_loss, box_loss = self._compute_logit_losses(batch)
        return {
            "hkd_pyramid": self.config.pyramid * self._compute_pyramid_loss(student, teacher, batch.targets),
            "hkd_region": self.config.region * self._compute_region_loss(student, teacher, batch),
            "hkd_cls": self.config.cls * cls_loss,
            "hkd_box": self.config.box * box_loss,
        }

    def _compute_pyramid_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], targets: Targets) -> Tensor:
        losses = []
        for s, t, stride in zip(student, teacher, self.strides, strict=True):
            weights = make_foreground_weights((t.shape[-2], t.shape[-1]), stride, targets, self.config.fg_weights)
            losses.append(fg_balanced_mean(pkd_loss(s, t), weights, self.config.fg_ratio).mean())
        return torch.stack(losses).mean()

    def _compute_region_loss(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: DistillationBatch
    ) -> Tensor:
        targets, detections, limit = batch.targets, batch.teacher_detections, self.config.max_regions
        scores = pad_sequence([s[:limit] for s in detections.scores], batch_first=True, padding_value=-1.0)
        teacher_boxes = pad_sequence([b[:limit] for b in detections.boxes_xyxy], batch_first=True)
        selected = torch.cat([targets.valid, scores >= self.config.region_min_score], 1)
        image_index, box_index = selected.nonzero(as_tuple=True)
        boxes = torch.cat([targets.boxes_xyxy, teacher_boxes], 1)[image_index, box_index]
        avg_factor = batch.reduce_mean(torch.tensor(float(len(boxes)), device=boxes.device))
        if not len(boxes):
            return 0.0 * torch.stack([level.float().mean() for level in student]).sum()
        s, t, strides = ([values[index] for index in self.region_levels] for values in (student, teacher, self.strides))
        rules = self.config.region_level, self.config.region_norm
        return roi_feature_loss(s, t, strides, boxes, image_index, *rules).sum() / avg_factor  # type: ignore[arg-type]

    def _compute_logit_losses(self, batch: DistillationBatch) -> tuple[Tensor, Tensor]:
        """Return the unweighted score loss and box loss, scalars."""
        branches = match_branches(batch)
        if not branches:
            return batch.student.soft_label_loss(
                batch.student_outputs, batch.teacher_detections, batch.targets, batch.reduce_mean
            )
        cls_loss = box_loss = branches[0][0].logits.new_zeros(())
        for student, teacher in branches:
            confidence = teacher.logits.sigmoid()
            avg_factor = batch.reduce_mean(confidence.sum())
            cls_loss = cls_loss + quality_focal_kd_loss(student.logits, teacher.logits).sum() / avg_factor
            if student.has_box_loss:
                box_loss = box_loss + (confidence * _compute_box_loss(student, teacher)).sum() / avg_factor
        if len(branches) == 1:
            # The teacher has no one-to-one branch. Its detections contain no duplicates, its one-to-many branch does.
            outputs: Any = batch.student_outputs
            more = dense_soft_label_losses(
                outputs, batch.teacher_detections, batch.targets, batch.reduce_mean, one2one_only=True
            )
            cls_loss, box_loss = cls_loss + more[0], box_loss + more[1]
        return cls_loss, box_loss


def _compute_box_loss(student: BranchOutputs, teacher: BranchOutputs) -> Tensor:
    """Return [B, A]: divergence of the box distributions if both have the same bins, else 1 - GIoU of the boxes."""
    if (
        student.box_logits is not None
        and teacher.box_logits is not None
        and student.box_logits.shape == teacher.box_logits.shape
    ):
        return localization_distillation_loss(student.box_logits, teacher.box_logits)
    return giou_loss(student.boxes_xyxy, teacher.boxes_xyxy)


def make_foreground_weights(
    feature_hw: tuple[int, int], stride: int, targets: Targets, rule: ForegroundWeights
) -> Tensor:
    """Compute the relative weights of the cells of a feature map whose center is inside a ground-truth box.

    Args:
        feature_hw: Height and width of the feature map, cells.
        stride: Cell size, input pixels.
        targets: Ground truth.
        rule: See `ForegroundWeights`.

    Returns:
        Tensor[B, H, W]: float32, 0 outside all boxes.
    """
    x1, y1, x2, y2 = targets.boxes_xyxy[..., None].unbind(2)  # [B, M, 1]
    y, x = (stride * (torch.arange(cells, device=x1.device) + 0.5) for cells in feature_hw)
    rows, columns = (y > y1) & (y < y2), (x > x1) & (x < x2) & targets.valid[..., None]  # [B, M, H] and [B, M, W]
    inside = rows[..., None] & columns[:, :, None]  # [B, M, H, W]
    if rule == "cell":
        return inside.any(1).float()
    num_cells = inside.sum((2, 3), keepdim=True).clamp(min=1)
    weights: Tensor = (inside / num_cells).amax(1)
    return weights


class TwoStageHKD(nn.Module):
    """Losses at three levels between two Faster R-CNN models: ||A s - t||^2 / n, averaged over positions or RoIs.

    s and t are the features of student and teacher with n values each, and A is an affine adapter.

    Pyramid: feature-pyramid levels. Region: 7x7 RoI features at the input of the box head. Logit: output of the two
    hidden layers of the box head, from which scores and boxes are linear. Both heads process the same RoIs: the ground
    truth and the teacher's best proposals. These cover persons and difficult background and do not depend on the
    student. The box head of the teacher processes only these RoIs instead of all proposals.

    Args:
        student: Student.
        teacher: Teacher.
        pairs: Compared feature layers.
        config: Weights and number of proposals.
        projection: Projection of the pyramid adapters. "orthogonal" compares standardized features (PKD loss).
    """

    def __init__(
        self,
        student: BaseDetector,
        teacher: Any,
        pairs: Sequence[Pair],
        config: TwoStageConfig,
        projection: Projection = "plain",
    ) -> None:
        super().__init__()
        self.config = config
        self.names = [(s.name, t.name) for s, t in pairs]
        self.pyramid_adapters = nn.ModuleList(Adapter(s, t, projection) for s, t in pairs)
        self.feature_loss = pkd_loss if projection == "orthogonal" else mse_per_item
        self.region_adapter = nn.Conv2d(student.spec.channels, teacher.spec.channels, 1)
        self.logit_adapter = nn.Linear(student.spec.head_width, teacher.spec.head_width)

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            batch: Batch of two two-stage detectors.

        Returns:
            `hkd_pyramid`, `hkd_region` and `hkd_logit`, weighted scalars.
        """
        rois = sample_rois(batch, self.config.num_proposals)
        avg_factor = batch.reduce_mean(torch.tensor(float(sum(map(len, rois))), device=rois[0].device))
        student = batch.student.forward_rois(batch.student_outputs, rois)
        teacher = batch.forward_teacher_rois(rois)
        levels = [
            self.feature_loss(adapter(batch.student_features[s]), batch.teacher_features[t]).mean()
            for adapter, (s, t) in zip(self.pyramid_adapters, self.names, strict=True)
        ]
        region = mse_per_item(self.region_adapter(student.roi_features), teacher.roi_features).sum() / avg_factor
        logit = mse_per_item(self.logit_adapter(student.box_features), teacher.box_features).sum() / avg_factor
        return {
            "hkd_pyramid": self.config.pyramid * torch.stack(levels).mean(),
            "hkd_region": self.config.region * region,
            "hkd_logit": self.config.logit * logit,
        }


def mse_per_item(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared error of each item.

    Args:
        student (Tensor[N, ...]): Student features.
        teacher (Tensor[N, ...]): Teacher features; no gradient.

    Returns:
        Tensor[N]: Mean over all other dimensions.
    """
    return (student.float() - teacher.detach().float()).square().flatten(1).mean(1)
