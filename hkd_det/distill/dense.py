"""Distillation of scores and boxes without labels: at every anchor point of the teacher, or from its detections.

The score loss of dense distillation is the binary cross-entropy of BCKD (Yang et al. 2023) with the weight of the
teacher score, the box loss is GIoU, and neck outputs are compared as in FitNets (Romero et al. 2015), each channel
divided by its variance. The student needs the anchor points of the teacher, and its channels unless `adapter` projects
them. Soft labels are the detections of any teacher.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.config import check_range
from hkd_det.distill.base import DistillMethod
from hkd_det.distill.batch import Adapter, DistillationBatch, Projection, match_branches
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector, BranchOutputs, DenseOutputs
from hkd_det.models.feature_layers import LayerPairs, pair_layers, select_layers
from hkd_det.ops.boxes import giou_loss

MIN_SCORE = 0.02  # boxes with a lower teacher score are not compared
EPS = 1e-3  # added to the variance of a channel


@dataclass(frozen=True)
class DenseConfig:
    """Settings of dense distillation.

    Attributes:
        cls: Weight of the score loss.
        box: Weight of the box loss.
        features: Weight of the feature loss.
        det_loss_weight: Factor for the detection losses. 0 trains without labels.
        flip_teacher: Whether scores and boxes of the teacher are averaged over the image and its mirror image.
        double_resolution: Whether the teacher also sees the images at twice the size (`merge_double_resolution`).
        difference_weight: Whether the losses of an anchor point are weighted by the difference of both scores, as in
            BCKD (Yang et al. 2023): points where student and teacher agree do not count. Their weights are smaller, so
            BCKD uses `box=4`.
        adapter: Projection from student to teacher channels; "none" for equal channels.
        feature_layers: Layers to compare. Empty: the outputs of both necks, paired by stride.
    """

    cls: float = 1.0
    box: float = 2.5
    features: float = 1.0
    det_loss_weight: float = 0.0
    flip_teacher: bool = False
    double_resolution: bool = False
    difference_weight: bool = False
    adapter: Projection | Literal["none"] = "none"
    feature_layers: LayerPairs = field(default_factory=LayerPairs)

    def __post_init__(self) -> None:
        for name in ("cls", "box", "features", "det_loss_weight"):
            check_range(f"distill.dense.{name}", getattr(self, name), 0)


class DenseDistillation(DistillMethod):
    """Distillation at all anchor points and from the neck outputs.

    Args:
        config: Settings.
        student: Detector to train.
        teacher: Teacher with features and logits.
    """

    Config = DenseConfig
    requires = frozenset({"features", "logits"})
    supports_unlabeled = True

    def __init__(self, config: DenseConfig, student: BaseDetector, teacher: Any) -> None:
        super().__init__(config, student, teacher)
        self.det_loss_weight = config.det_loss_weight
        layers = select_layers(student, teacher, config.feature_layers, "distill.dense.feature_layers")
        pairs = pair_layers(*layers, config.feature_layers) if config.features else []
        self._layers = LayerPairs(tuple(s.name for s, _ in pairs), tuple(t.name for _, t in pairs))
        if config.adapter == "none":
            for s, t in pairs:
                if (s.channels, s.stride) != (t.channels, t.stride):
                    raise UsageError(
                        f"distill.dense.adapter: none requires equal channels and strides, but {s.name} has "
                        f"{s.channels} at stride {s.stride} and {t.name} has {t.channels} at stride {t.stride}. "
                        "Set distill.dense.adapter=plain."
                    )
            self.adapters = nn.ModuleList(nn.Identity() for _ in pairs)
        else:
            self.adapters = nn.ModuleList(Adapter(s, t, config.adapter) for s, t in pairs)

    def feature_layers(self) -> LayerPairs:
        """Return the compared layers, pair by pair."""
        return self._layers

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted losses `dense_cls`, `dense_box` and, unless its weight is 0, `dense_features`.

        Args:
            batch: Batch with the outputs of both networks.

        Returns:
            Weighted scalars.

        Raises:
            UsageError: If the anchor points of student and teacher differ.
        """
        branches = match_branches(batch)
        if not branches:
            raise UsageError(
                "--distill dense: student and teacher have different anchor points. Use --distill hkd or soft_labels."
            )
        if self.config.flip_teacher or self.config.double_resolution:
            flip, double = self.config.flip_teacher, self.config.double_resolution
            outputs: Any = batch.teacher_outputs
            views = forward_views(batch.teacher, batch.images, outputs, flip, double)
            branches = [(student, view) for (student, _), view in zip(branches, views, strict=False)]
        cls_losses, box_losses = zip(
            *(_compute_branch_losses(s, t, batch, self.config.difference_weight) for s, t in branches), strict=True
        )
        losses = {
            "dense_cls": self.config.cls * torch.stack(cls_losses).sum(),
            "dense_box": self.config.box * torch.stack(box_losses).sum(),
        }
        if self.config.features:
            losses["dense_features"] = self.config.features * self._compute_feature_loss(batch)
        return losses

    def _compute_feature_loss(self, batch: DistillationBatch) -> Tensor:
        errors = []
        for adapter, s_name, t_name in zip(self.adapters, self._layers.student, self._layers.teacher, strict=True):
            student = adapter(batch.student_features[s_name]).float()
            teacher = batch.teacher_features[t_name].float()
            variance = teacher.var((0, 2, 3)) + EPS
            errors.append(((student - teacher).square().mean((0, 2, 3)) / variance).mean())
        return torch.stack(errors).sum()


@torch.no_grad()
def forward_views(
    teacher: Any, images: Tensor, outputs: DenseOutputs, flip: bool, double_resolution: bool
) -> list[BranchOutputs]:
    """Run a dense teacher on further views of the images and combine the results at the anchor points.

    Stride 2 s in an image of twice the size is stride s in the original one. The levels above the finest one of the
    large image therefore have the anchor points of all levels below the coarsest one of the original image.

    Args:
        teacher: Dense detector whose strides double from level to level.
        images (Tensor[B, 3, H, W]): RGB, 0 to 255.
        outputs: Outputs of the teacher for `images`.
        flip: Average over each image and its mirror image.
        double_resolution: Also run the images at twice the size, and combine with `merge_double_resolution`.

    Returns:
        Combined outputs: one-to-many, then one-to-one if the teacher has it.
    """
    branches = average_with_mirror_image(teacher, images, outputs) if flip else _list_branches(outputs)
    if not double_resolution:
        return branches
    large_images = F.interpolate(images.float(), scale_factor=2.0, mode="bilinear")
    large: DenseOutputs = teacher(large_images)
    large_branches = average_with_mirror_image(teacher, large_images, large) if flip else _list_branches(large)
    is_coarse = large.strides > large.strides.min()
    return [
        merge_double_resolution(branch, double.logits[:, is_coarse], double.boxes_xyxy[:, is_coarse] / 2)
        for branch, double in zip(branches, large_branches, strict=True)
    ]


def average_with_mirror_image(teacher: Any, images: Tensor, outputs: DenseOutputs) -> list[BranchOutputs]:
    """Average scores over images and their mirror images, and boxes weighted by the scores.

    Args:
        teacher: Dense detector.
        images (Tensor[B, 3, H, W]): RGB, 0 to 255.
        outputs: Outputs of the teacher for `images`.

    Returns:
        Averaged branches at the anchor points of `images`, without distance distributions.
    """
    width, order = images.shape[3], _mirror_anchor_points(outputs)
    averaged = []
    for branch, mirrored in zip(_list_branches(outputs), _list_branches(teacher(images.flip(3))), strict=True):
        x1, y1, x2, y2 = mirrored.boxes_xyxy[:, order].unbind(-1)
        boxes = torch.stack([width - x2, y1, width - x1, y2], -1)
        scores, mirrored_scores = branch.logits.sigmoid(), mirrored.logits[:, order].sigmoid()
        weight = (scores / (scores + mirrored_scores).clamp(min=1e-12))[..., None]
        averaged.append(
            BranchOutputs(
                ((scores + mirrored_scores) / 2).clamp(1e-9, 1 - 1e-6).logit(),
                weight * branch.boxes_xyxy + (1 - weight) * boxes,
                has_box_loss=branch.has_box_loss,
            )
        )
    return averaged


def _list_branches(outputs: DenseOutputs) -> list[BranchOutputs]:
    return [outputs.one2many, *([outputs.one2one] if outputs.one2one else [])]


def merge_double_resolution(original: BranchOutputs, logits: Tensor, boxes_xyxy: Tensor) -> BranchOutputs:
    """Take score and box of the more confident resolution at each anchor point.

    Qi et al. (2021) align the levels of two resolutions in the same way. The coarsest level exists only in `original`.

    Args:
        original: Outputs at A anchor points.
        logits (Tensor[B, D]): Logits of the large image at the first D of these points.
        boxes_xyxy (Tensor[B, D, 4]): Boxes of the large image, pixels of the original one.

    Returns:
        Merged outputs at all points, without distance distributions.
    """
    count = logits.shape[1]
    is_better = (logits > original.logits[:, :count])[..., None]
    boxes = torch.where(is_better, boxes_xyxy, original.boxes_xyxy[:, :count])
    return BranchOutputs(
        torch.cat([torch.maximum(original.logits[:, :count], logits), original.logits[:, count:]], 1),
        torch.cat([boxes, original.boxes_xyxy[:, count:]], 1),
        has_box_loss=original.has_box_loss,
    )


def _mirror_anchor_points(outputs: DenseOutputs) -> Tensor:
    """Return [A]: for each anchor point, the index of its mirror image in the same row of the same level."""
    indices: list[Tensor] = []
    start = 0
    for stride in sorted(
        {int(stride) for stride in outputs.strides.tolist()}
    ):  # ascending: fine level first, as in the outputs
        rows, columns = outputs.input_hw[0] // stride, outputs.input_hw[1] // stride
        grid = torch.arange(start, start + rows * columns, device=outputs.strides.device).view(rows, columns)
        indices.append(grid.flip(1).flatten())
        start += rows * columns
    return torch.cat(indices)


def _compute_branch_losses(
    student: BranchOutputs, teacher: BranchOutputs, batch: DistillationBatch, difference_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return score and box loss: sums over the anchor points, divided by the sum of the teacher scores."""
    scores = teacher.logits.sigmoid()
    avg_factor = batch.reduce_mean(scores.sum())
    cross_entropy = F.binary_cross_entropy_with_logits(student.logits, scores, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher.logits, scores, reduction="none")  # 0 for equal scores
    divergence, box_weight = cross_entropy - entropy, scores
    if difference_weight:
        box_weight = (scores - student.logits.detach().sigmoid()).abs()
        divergence = divergence * box_weight
    cls_loss = divergence.sum() / avg_factor
    if not student.has_box_loss:
        return cls_loss, cls_loss.new_zeros(())
    point = scores > MIN_SCORE
    giou = giou_loss(student.boxes_xyxy[point], teacher.boxes_xyxy[point])
    return cls_loss, (giou * box_weight[point]).sum() / avg_factor


@dataclass(frozen=True)
class SoftLabelConfig:
    """Settings of soft-label distillation.

    Attributes:
        cls: Weight of the score loss.
        box: Weight of the box loss.
        background_weight: Factor for the anchor points of a dense student at which the teacher detects nothing.
    """

    cls: float = 1.0
    box: float = 2.5
    background_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("cls", "box", "background_weight"):
            check_range(f"distill.soft_labels.{name}", getattr(self, name), 0)


class SoftLabels(DistillMethod):
    """Trains on the detections of any teacher as soft labels, also on unlabeled images."""

    Config = SoftLabelConfig
    requires = frozenset({"detections"})
    supports_unlabeled = True

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted losses `soft_cls` and `soft_box`, scalars."""
        cls_loss, box_loss = batch.student.soft_label_loss(
            batch.student_outputs,
            batch.teacher_detections,
            batch.targets,
            batch.reduce_mean,
            self.config.background_weight,
        )
        return {"soft_cls": self.config.cls * cls_loss, "soft_box": self.config.box * box_loss}
