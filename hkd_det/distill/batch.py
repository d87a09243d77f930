"""The data of one distillation step, the outputs that methods compare, and adapters of features.

Outputs are compared for every pair of model families. Adapters map student features to the channels and the stride of
the teacher, and are dropped after training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from hkd_det.errors import UsageError
from hkd_det.models.base import (
    BaseDetector,
    BranchOutputs,
    DenseOutputs,
    DetectionBatch,
    FeatureInfo,
    ModelOutputs,
    ProposalOutputs,
    RoIOutputs,
    Targets,
)
from hkd_det.ops.losses import SCORE_EPS, ReduceMean

MAX_ROIS = 64  # RoIs per image at which two detectors are compared
DUPLICATE_IOU = 0.5  # The score of a duplicate in an end-to-end teacher is near 0 and does not describe its content.
DILATIONS = (1, 2, 3)  # receptive fields of 3, 5 and 7 cells

Projection = Literal["plain", "norm", "multi-scale", "orthogonal"]
"""Channel projection. plain: 1x1 convolution. norm: the same and batch normalization. multi-scale:
`MultiScaleProjection`. orthogonal: `OrthogonalProjection`."""


@dataclass(frozen=True, eq=False)
class DistillationBatch:
    """One training batch with the outputs of student and teacher.

    Attributes:
        images (Tensor[B, 3, H, W]): RGB, 0 to 255.
        targets: Ground truth.
        student: Detector in training.
        teacher: Frozen teacher.
        student_outputs: Outputs of the student for `images`.
        teacher_outputs: Outputs of the teacher for `images`, without gradients.
        student_features: Layer name -> feature map [B, C, H', W'], for the layers that the methods request.
        teacher_features: The same of the teacher, without gradients.
        reduce_mean: Converts a local normalization sum to the divisor that is correct for all processes together.
        perturb: Noise for teacher values that are computed later in the step: detections and RoI outputs.
    """

    images: Tensor
    targets: Targets
    student: BaseDetector
    teacher: Any
    student_outputs: ModelOutputs
    teacher_outputs: ModelOutputs
    student_features: Mapping[str, Tensor]
    teacher_features: Mapping[str, Tensor]
    reduce_mean: ReduceMean
    perturb: Callable[[Any], Any] | None = None

    @cached_property
    def teacher_detections(self) -> DetectionBatch:
        """At most 100 teacher detections per image, computed once for all methods."""
        detections: DetectionBatch = self.teacher.postprocess(self.teacher_outputs)
        return self.perturb(detections) if self.perturb else detections

    def forward_teacher_rois(self, rois: Sequence[Tensor]) -> RoIOutputs:
        """Run the second stage of a two-stage teacher, without gradients.

        Args:
            rois (list of Tensor[R_i, 4]): Boxes of each image, xyxy, input pixels.

        Returns:
            Outputs of the RoIs, with the noise of `perturb`.
        """
        with torch.no_grad():
            outputs: RoIOutputs = self.teacher.forward_rois(self.teacher_outputs, rois)
            return self.perturb(outputs) if self.perturb else outputs


class LogitPair(NamedTuple):
    """Logits of student and teacher for the same boxes.

    Attributes:
        student (Tensor[...]): Score logits.
        teacher (Tensor[...]): Score logits, without gradients.
        avg_factor (Tensor): Scalar divisor for a sum over the pair: the sum of the teacher scores for anchor points,
            the number of RoIs for a second stage.
    """

    student: Tensor
    teacher: Tensor
    avg_factor: Tensor


def comparable_logits(batch: DistillationBatch) -> list[LogitPair]:
    """Pair the logits of student and teacher that refer to the same boxes, for every combination of families.

    Two dense detectors are compared at their anchor points, branch by branch. Two two-stage detectors are compared on
    the ground truth and the teacher's best proposals. A two-stage student is compared with a dense teacher on the
    teacher's detections after NMS. A dense student is compared with a two-stage teacher on the student's best boxes.
    The one-to-one branch of that student is left out, because its scores of duplicates must be 0 and those of the
    teacher are not.

    Args:
        batch: Batch with the outputs of both networks.

    Returns:
        One pair per branch, or one pair of RoIs.
    """
    student, teacher = batch.student_outputs, batch.teacher_outputs
    if isinstance(student, DenseOutputs) and isinstance(teacher, DenseOutputs):
        branches = ((student.one2many, teacher.one2many), (student.one2one, teacher.one2one))
        return [
            LogitPair(s.logits, t.logits, t.logits.sigmoid().sum())
            for s, t in branches
            if s is not None and t is not None
        ]
    if isinstance(student, ProposalOutputs) and isinstance(teacher, ProposalOutputs):
        rois = sample_rois(batch, MAX_ROIS)
        student_logits = batch.student.forward_rois(student, rois).logits
        with torch.no_grad():
            return [_pair_rois(student_logits, batch.teacher.forward_rois(teacher, rois).logits)]
    if isinstance(student, ProposalOutputs):
        detections = batch.teacher_detections.suppress(DUPLICATE_IOU)
        teacher_logits = torch.cat(detections.scores).logit(eps=SCORE_EPS).detach()
        return [_pair_rois(batch.student.forward_rois(student, detections.boxes_xyxy).logits, teacher_logits)]
    assert isinstance(student, DenseOutputs)
    top = student.one2many.logits.topk(min(MAX_ROIS, student.one2many.logits.shape[1])).indices  # [B, K]
    boxes = student.one2many.boxes_xyxy.detach().gather(1, top[..., None].expand(-1, -1, 4))
    with torch.no_grad():
        teacher_logits = batch.teacher.forward_rois(teacher, boxes.unbind()).logits
    return [_pair_rois(student.one2many.logits.gather(1, top).flatten(), teacher_logits)]


def _pair_rois(student_logits: Tensor, teacher_logits: Tensor) -> LogitPair:
    count = torch.tensor(float(len(student_logits)), device=student_logits.device)
    return LogitPair(student_logits, teacher_logits, count)


def match_branches(batch: DistillationBatch) -> list[tuple[BranchOutputs, BranchOutputs]]:
    """Pair the branches of two dense detectors with the same anchor points.

    Args:
        batch: Batch with the outputs of both networks.

    Returns:
        Student and teacher branches: one-to-many first, then one-to-one if both have it. Empty for other families and
        for detectors with different anchor points.
    """
    student, teacher = batch.student_outputs, batch.teacher_outputs
    if not (isinstance(student, DenseOutputs) and isinstance(teacher, DenseOutputs)):
        return []
    if not student.has_same_anchor_points(teacher):
        return []
    pairs = [(student.one2many, teacher.one2many)]
    if student.one2one is not None and teacher.one2one is not None:
        pairs.append((student.one2one, teacher.one2one))
    return pairs


def sample_rois(batch: DistillationBatch, num_proposals: int) -> list[Tensor]:
    """Return the ground-truth boxes and the teacher's best proposals of each image.

    Args:
        batch: Batch with a two-stage teacher.
        num_proposals: Maximum number of proposals per image.

    Returns:
        list of Tensor[R_i, 4]: xyxy, input pixels.
    """
    outputs = batch.teacher_outputs
    assert isinstance(outputs, ProposalOutputs)
    gt_boxes, _ = batch.targets.split_ignored()
    return [
        torch.cat([boxes, proposals[:num_proposals]])
        for boxes, proposals in zip(gt_boxes, outputs.proposals, strict=True)
    ]


class Adapter(nn.Module):
    """Map a student feature layer to a teacher feature layer: average pooling, channel projection, nearest upsampling.

    A student map with a smaller stride is pooled before the projection. One with a larger stride is upsampled after it.

    Args:
        student: Feature layer of the student.
        teacher: Feature layer of the teacher.
        projection: Kind of channel projection.

    Raises:
        UsageError: If neither stride is a multiple of the other.
    """

    def __init__(self, student: FeatureInfo, teacher: FeatureInfo, projection: Projection = "plain") -> None:
        super().__init__()
        finer, coarser = sorted((student.stride, teacher.stride))
        if coarser % finer:
            raise UsageError(
                f"feature layers {student.name} (student) and {teacher.name} (teacher): expected strides of which one "
                f"is a multiple of the other, got {student.stride} and {teacher.stride}. Choose other layers."
            )
        self.stride_ratio = coarser // finer
        self.should_pool = student.stride < teacher.stride
        self.projection = _build_projection(student.channels, teacher.channels, projection)

    def forward(self, features: Tensor) -> Tensor:
        """Map student features to the shape of the teacher.

        Args:
            features (Tensor[B, C_s, H, W]): Student feature map.

        Returns:
            Tensor[B, C_t, H', W']: Channels and stride of the teacher.
        """
        if self.stride_ratio > 1 and self.should_pool:
            features = F.avg_pool2d(features, self.stride_ratio)
        features = self.projection(features)
        if self.stride_ratio > 1 and not self.should_pool:
            features = F.interpolate(features, scale_factor=float(self.stride_ratio), mode="nearest")
        return features


class MultiScaleProjection(nn.Module):
    """Light projection of MoKD (Hayder et al. 2025): dilated depthwise 3x3 convolutions, then a 1x1 convolution.

    The outputs of the depthwise convolutions are added to the input. Their weights start at 0, so the module starts as
    a plain 1x1 projection.

    Args:
        in_channels: Channels of the student.
        out_channels: Channels of the teacher.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        convs = [
            nn.Conv2d(in_channels, in_channels, 3, padding=rate, dilation=rate, groups=in_channels, bias=False)
            for rate in DILATIONS
        ]
        for conv in convs:
            nn.init.zeros_(conv.weight)
        self.dilated_convs = nn.ModuleList(convs)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [B, C_in, H, W] to [B, C_out, H, W].

        Args:
            features (Tensor[B, C_in, H, W]): Student feature map.

        Returns:
            Tensor[B, C_out, H, W]: Projected feature map.
        """
        context = features
        for conv in self.dilated_convs:
            context = context + conv(features)
        return self.pointwise(context)


class OrthogonalProjection(nn.Module):
    """Orthogonal projection of VkD (Miles et al. 2024).

    The weight has orthonormal columns, or orthonormal rows if the teacher is narrower. Orthonormal columns preserve
    lengths and angles, so the adapter cannot compensate for errors of the student features. Nor can it learn the scale
    of the teacher features: standardize them first.

    Args:
        in_channels: Channels of the student.
        out_channels: Channels of the teacher.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        # Not torch's default (Householder): weight decay would shrink the signs that it stores in the parameter.
        parametrizations.orthogonal(self.linear, "weight", "cayley")

    def forward(self, features: Tensor) -> Tensor:
        """Project features [B, C_in, H, W] to [B, C_out, H, W].

        Args:
            features (Tensor[B, C_in, H, W]): Student feature map.

        Returns:
            Tensor[B, C_out, H, W]: Projected feature map.
        """
        with torch.autocast(features.device.type, enabled=False):  # in bf16 the weight is orthonormal to 1e-2 only
            weight = self.linear.weight
        return F.linear(features.movedim(1, -1), weight).movedim(-1, 1)


def _build_projection(in_channels: int, out_channels: int, projection: Projection) -> nn.Module:
    match projection:
        case "plain":
            return nn.Conv2d(in_channels, out_channels, 1)
        case "norm":
            return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        case "multi-scale":
            return MultiScaleProjection(in_channels, out_channels)
        case "orthogonal":
            return OrthogonalProjection(in_channels, out_channels)
