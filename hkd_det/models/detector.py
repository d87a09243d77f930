"""The convolution every other part is made of.

Neck: a feature pyramid (Lin et al. 2017) with a bottom-up path behind it (PANet, Liu et al. 2018).

Detector: backbone, neck and head; one stage, anchor-free, one class: person.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.models.backbone import Backbone
from hkd_det.models.base import BaseDetector, BranchOutputs, DenseOutputs, DetectionBatch, FeatureInfo
from hkd_det.models.head import Head, HeadOutputs, dist2bbox, find_tower_layers, make_anchors
from hkd_det.models.surgery import (
    NO_CHANGES,
    ModelChanges,
    PrunableLayer,
    apply_changes,
    filter_dense_convs,
    find_residual_layers,
)
from hkd_det.ops.nms import peak_nms, suppress_duplicates


def make_conv_norm_act(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU: keeps the size at stride 1, halves it at stride 2."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class PAFPN(nn.Module):
    """Gives every level the same width; meaning flows down to the fine levels, position up to the coarse ones.

    `outputs[i]` ends level i: what distillation taps.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(make_conv_norm_act(width, out_channels, kernel_size=1) for width in in_channels)
        self.downs = nn.ModuleList(make_conv_norm_act(out_channels, out_channels, stride=2) for _ in in_channels[1:])
        self.outputs = nn.ModuleList(make_conv_norm_act(out_channels, out_channels) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps from fine to coarse, each half the size of the one before, to as many [B, channels, H_i, W_i]."""
        levels = [lateral(level) for lateral, level in zip(self.laterals, features, strict=True)]
        for fine in range(len(levels) - 2, -1, -1):
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], scale_factor=2.0, mode="nearest")
        finished = [self.outputs[0](levels[0])]
        for level, down, output in zip(levels[1:], self.downs, self.outputs[1:], strict=True):
            finished.append(output(level + down(finished[-1])))
        return finished


MEAN_RGB = (123.675, 116.28, 103.53)  # ImageNet, 0..255


STD_RGB = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class HKDDetectorSpec:
    """Everything that fixes a detector's shape; saved with its weights.

    strides: of the pyramid's levels, fine to coarse, each twice the one before.
    bins: distances a side can take, 0 .. bins - 1 strides; a coarse level sees 2 x (bins - 1) x 32 px at most.
    """

    backbone: str
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    strides: tuple[int, ...] = (8, 16, 32)
    channels: int = 96
    head_depth: int = 2
    reg_max: int = 16


class HKDDetector(BaseDetector):
    """Pictures in, people out."""

    spec: HKDDetectorSpec
    mean: Tensor
    std: Tensor

    def __init__(self, spec: HKDDetectorSpec, changes: ModelChanges = NO_CHANGES) -> None:
        super().__init__()
        self.spec, self.changes = spec, changes
        self.backbone = Backbone(spec.backbone, spec.strides, spec.backbone_kwargs)
        self.neck = PAFPN(self.backbone.channels, spec.channels)
        self.head = Head(spec.channels, spec.head_depth, len(spec.strides), spec.reg_max)
        self.register_buffer("mean", torch.tensor(MEAN_RGB).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD_RGB).view(1, 3, 1, 1), persistent=False)
        apply_changes(self, changes)

    def forward(self, images: Tensor) -> DenseOutputs:
        """[B, 3, H, W] uint8 or float RGB, 0..255, H and W multiples of the coarsest stride, to a prediction."""
        raw: HeadOutputs = self.head(self.forward_features(images))
        points, strides = self.make_anchor_points(images)
        boxes = dist2bbox(raw.box_logits, points, strides)
        one = BranchOutputs(raw.one2one, boxes, has_box_loss=False)
        return DenseOutputs(
            BranchOutputs(raw.one2many, boxes, raw.box_logits),
            one,
            points,
            strides,
            (images.shape[-2], images.shape[-1]),
        )

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The neck's maps, fine to coarse, of [B, 3, H, W] RGB pictures, 0..255."""
        maps: list[Tensor] = self.neck(self.backbone((images.float() - self.mean) / self.std))
        return maps

    def make_anchor_points(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The anchor points [A, 2] and strides [A] that belong to pictures of this size."""
        height, width = images.shape[-2:]
        return make_anchors((height, width), self.spec.strides, images.device)

    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """End to end: the best boxes [B, K, 4] xyxy input pixels and scores [B, K], 0..1, falling.

        K is `top`, or the number of points where that is smaller. The answer is the `one` branch's peaks, less doubles.
        """
        raw: HeadOutputs = self.head(self.forward_features(images))
        points, strides = self.make_anchor_points(images)
        peaks = peak_nms(raw.one2one, (images.shape[-2], images.shape[-1]), self.spec.strides)
        best, index = peaks.topk(min(max_det, peaks.shape[1]))  # [B, K]
        chosen = raw.box_logits.gather(1, index[..., None, None].expand(-1, -1, *raw.box_logits.shape[2:]))
        return suppress_duplicates(dist2bbox(chosen, points[index], strides[index]), best)

    def postprocess(self, outputs: DenseOutputs, max_det: int = 100) -> DetectionBatch:
        """The `one` branch's peaks, less doubles."""
        assert outputs.one2one is not None
        logits, index = peak_nms(outputs.one2one.logits, outputs.input_hw, self.spec.strides).topk(
            min(max_det, outputs.one2one.logits.shape[1])
        )
        boxes = outputs.one2one.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
        boxes, scores = suppress_duplicates(boxes, logits)
        return DetectionBatch(tuple(boxes), tuple(scores))

    def feature_info(self) -> list[FeatureInfo]:
        """The ends of the neck's levels."""
        return [
            FeatureInfo(f"neck.outputs.{level}", stride, self.spec.channels)
            for level, stride in enumerate(self.spec.strides)
        ]

    def prunable_layers(self) -> list[PrunableLayer]:
        """The backbone's residual blocks' and the head's towers'."""
        return [*find_residual_layers(self), *filter_dense_convs(self, find_tower_layers(self.head, "head"))]


def freeze_batch_norm(model: nn.Module) -> None:
    """Fix every batch normalisation: its statistics and its scale and shift no longer change."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)
