"""Cross-head distillation (CrossKD, Wang et al., CVPR 2024, arXiv 2306.11369).

Student features from inside the head towers pass through the rest of the frozen head of the teacher. The resulting
predictions are compared with those of the teacher. The predictors of the student have no distillation loss, so that
they follow the labels only.

L = w_cls sum |t - s| KL(t || s) / sum t + w_box sum t d / sum t with the scores t of the teacher and s of its head on
student features, over all anchor points. d is KL(teacher || cross-head) of the distance distributions, averaged over
the four sides, or 1 - GIoU for models without distributions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.config import check_range
from hkd_det.distill.base import DistillMethod
from hkd_det.distill.batch import Adapter, DistillationBatch, Projection
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, BranchOutputs, FeatureInfo, TowerLayers
from hkd_det.models.feature_layers import LayerPairs
from hkd_det.ops.boxes import giou_loss
from hkd_det.ops.losses import ReduceMean, localization_distillation_loss, quality_focal_kd_loss

EPS = 1e-6  # added to the standard deviation of a channel
TOWERS = ("cls", "box")


@dataclass(frozen=True)
class CrossKDConfig:
    """Settings of cross-head distillation. The defaults of the weights are those of the paper.

    Attributes:
        cls: Weight of the score loss.
        box: Weight of the box loss of teachers with distance distributions.
        giou: Weight of the box loss of teachers without distance distributions.
        num_convs: Convolutions of a tower that the student runs itself. The teacher runs the others.
        align: Whether the features of the student get mean and standard deviation of the teacher, channel by channel.
        adapter: Projection from student to teacher channels.
    """

    cls: float = 1.0
    box: float = 4.0
    giou: float = 1.0
    num_convs: int = 1
    align: bool = True
    adapter: Projection = "plain"

    def __post_init__(self) -> None:
        for name in ("cls", "box", "giou"):
            check_range(f"distill.crosskd.{name}", getattr(self, name), 0)
        check_range("distill.crosskd.num_convs", self.num_convs, 1)


class CrossKD(DistillMethod):
    """Cross-head distillation: the teacher's head on features from the student's head predicts what the teacher does.

    Args:
        config: Settings.
        student: Detector with head towers to train.
        teacher: Teacher with head towers.
    """

    Config = CrossKDConfig
    requires = frozenset({"features", "logits", "towers"})
    capability_hint = " Only the native detectors and YOLOX have towers."
    supports_unlabeled = True

    def __init__(self, config: CrossKDConfig, student: BaseDetector, teacher: Any) -> None:
        super().__init__(config, student, teacher)
        if "towers" not in student.capabilities:
            raise UsageError(
                f"--distill crosskd: requires a student with head towers, and {type(student).__name__} has none. "
                "Use a native detector or YOLOX as student, or --distill hkd."
            )
        students, teachers = student.tower_layers(), teacher.tower_layers()
        _check_towers(config, students, teachers)
        index = config.num_convs - 1
        self._layers = LayerPairs(_list_names(students, index), _list_names(teachers, index))
        self.adapters = nn.ModuleList(
            Adapter(getattr(s, tower)[index], getattr(t, tower)[index], config.adapter)
            for s, t in zip(students, teachers, strict=True)
            for tower in TOWERS
        )

    def feature_layers(self) -> LayerPairs:
        """Return the layers of both towers level by level."""
        return self._layers

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted losses `crosskd_cls` and `crosskd_box`, scalars."""
        features = [
            self._adapt(adapter, batch.student_features[student], batch.teacher_features[teacher])
            for adapter, student, teacher in zip(self.adapters, self._layers.student, self._layers.teacher, strict=True)
        ]
        levels = list(zip(features[::2], features[1::2], strict=True))
        cross: BranchOutputs = batch.teacher.forward_towers(levels, self.config.num_convs, batch.images)
        outputs: Any = batch.teacher_outputs  # of a dense detector: others have no towers
        cls_loss, box_loss = compare_cross_head(cross, outputs.one2many, batch.reduce_mean)
        box_weight = self.config.giou if cross.box_logits is None else self.config.box
        return {"crosskd_cls": self.config.cls * cls_loss, "crosskd_box": box_weight * box_loss}

    def _adapt(self, adapter: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        features: Tensor = adapter(student)
        return align_statistics(features, teacher) if self.config.align else features


def align_statistics(student: Tensor, teacher: Tensor) -> Tensor:
    """Give each channel of the student features the mean and standard deviation of the teacher over the batch.

    Args:
        student (Tensor[B, C, H, W]): Features.
        teacher (Tensor[B, C, H, W]): Features of the same shape, without gradient.

    Returns:
        Tensor[B, C, H, W]: float32, (s - mean_s) / (std_s + eps) * std_t + mean_t.
    """
    (s_var, s_mean), (t_var, t_mean) = (
        torch.var_mean(maps.float(), (0, 2, 3), correction=0, keepdim=True) for maps in (student, teacher)
    )
    # The gradient of a square root at 0 is infinite: eps^2 inside it has the same limit as eps outside.
    return (student.float() - s_mean) * (s_var + EPS**2).rsqrt() * t_var.sqrt() + t_mean


def compare_cross_head(cross: BranchOutputs, teacher: BranchOutputs, reduce_mean: ReduceMean) -> tuple[Tensor, Tensor]:
    """Compute the score loss and the box loss of cross-head predictions.

    Args:
        cross: Predictions of the teacher's head on student features, A anchor points.
        teacher: Predictions of the teacher at the same points, without gradients.
        reduce_mean: Converts the local sum of the teacher scores to the global divisor.

    Returns:
        cls_loss (Tensor): Scalar sum of `quality_focal_kd_loss` over the points, divided by the sum of teacher scores.
        box_loss (Tensor): Scalar mean of the divergences at T = 1, or of 1 - GIoU, weighted by the teacher scores.
    """
    scores = teacher.logits.sigmoid()
    avg_factor = reduce_mean(scores.sum())
    cls_loss = quality_focal_kd_loss(cross.logits, teacher.logits).sum() / avg_factor
    if cross.box_logits is None or teacher.box_logits is None:
        error = giou_loss(cross.boxes_xyxy, teacher.boxes_xyxy)
    else:
        error = localization_distillation_loss(cross.box_logits, teacher.box_logits, temperature=1.0)
    return cls_loss, (scores * error).sum() / avg_factor


def _check_towers(config: CrossKDConfig, students: Sequence[TowerLayers], teachers: Sequence[TowerLayers]) -> None:
    """Raise UsageError if the levels differ or a tower is too short."""
    strides = [[level.cls[0].stride for level in levels] for levels in (students, teachers)]
    if strides[0] != strides[1]:
        raise UsageError(
            f"--distill crosskd: the student has strides {strides[0]} and the teacher {strides[1]}. Use equal strides, "
            "or --distill hkd."
        )
    student_depth, teacher_depth = len(students[0].cls), len(teachers[0].cls)
    if teacher_depth < 2:
        raise UsageError(
            f"--distill crosskd: requires a teacher with at least 2 convolutions per head tower, got {teacher_depth}. "
            "Use another teacher, or --distill hkd."
        )
    limit = min(student_depth, teacher_depth - 1)
    if config.num_convs > limit:
        raise UsageError(
            f"distill.crosskd.num_convs: expected 1 to {limit} for towers of {student_depth} (student) and "
            f"{teacher_depth} (teacher) convolutions, got {config.num_convs}."
        )


def _list_names(levels: Sequence[TowerLayers], index: int) -> tuple[str, ...]:
    layers: list[FeatureInfo] = [getattr(level, tower)[index] for level in levels for tower in TOWERS]
    return tuple(layer.name for layer in layers)
