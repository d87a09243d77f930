"""Detector: backbone, neck and head; one stage, anchor-free, one class: person."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.models.backbone import Backbone
from hkd_det.models.doubles import ranked
from hkd_det.models.family import PersonDetector
from hkd_det.models.head import Head, RawMaps, head_inner_layers
from hkd_det.models.neck import FeaturePyramid
from hkd_det.models.peaks import keep_peaks
from hkd_det.models.points import anchor_points, decode_boxes
from hkd_det.models.prediction import Branch, Found, Prediction
from hkd_det.models.surgery import UNCHANGED, Changes, Inner, apply_changes, plain_layers, residual_inner_layers
from hkd_det.models.tap import Tap

MEAN_RGB = (123.675, 116.28, 103.53)  # ImageNet, 0..255
STD_RGB = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class DetectorSpec:
    """Everything that fixes a detector's shape; saved with its weights.

    strides: of the pyramid's levels, fine to coarse, each twice the one before.
    bins: distances a side can take, 0 .. bins - 1 strides; a coarse level sees 2 x (bins - 1) x 32 px at most.
    """

    backbone: str
    backbone_arguments: dict[str, Any] = field(default_factory=dict)
    strides: tuple[int, ...] = (8, 16, 32)
    channels: int = 96
    head_depth: int = 2
    bins: int = 16


class Detector(PersonDetector):
    """Pictures in, people out."""

    spec: DetectorSpec
    mean: Tensor
    std: Tensor

    def __init__(self, spec: DetectorSpec, changes: Changes = UNCHANGED) -> None:
        super().__init__()
        self.spec, self.changes = spec, changes
        self.backbone = Backbone(spec.backbone, spec.strides, spec.backbone_arguments)
        self.neck = FeaturePyramid(self.backbone.channels, spec.channels)
        self.head = Head(spec.channels, spec.head_depth, len(spec.strides), spec.bins)
        self.register_buffer("mean", torch.tensor(MEAN_RGB).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD_RGB).view(1, 3, 1, 1), persistent=False)
        apply_changes(self, changes)

    def forward(self, pictures: Tensor) -> Prediction:
        """[B, 3, H, W] uint8 or float RGB, 0..255, H and W multiples of the coarsest stride, to a prediction."""
        raw: RawMaps = self.head(self.pyramid(pictures))
        points, strides = self.points(pictures)
        boxes = decode_boxes(raw.sides, points, strides)
        one = Branch(raw.one, boxes, learns_boxes=False)
        return Prediction(
            Branch(raw.many, boxes, raw.sides), one, points, strides, (pictures.shape[-2], pictures.shape[-1])
        )

    def pyramid(self, pictures: Tensor) -> list[Tensor]:
        """The neck's maps, fine to coarse, of [B, 3, H, W] RGB pictures, 0..255."""
        maps: list[Tensor] = self.neck(self.backbone((pictures.float() - self.mean) / self.std))
        return maps

    def points(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """The anchor points [A, 2] and strides [A] that belong to pictures of this size."""
        height, width = pictures.shape[-2:]
        return anchor_points((height, width), self.spec.strides, pictures.device)

    def detect(self, pictures: Tensor, top: int = 300) -> tuple[Tensor, Tensor]:
        """End to end: the best boxes [B, K, 4] xyxy input pixels and scores [B, K], 0..1, falling.

        K is `top`, or the number of points where that is smaller. The answer is the `one` branch's peaks, less doubles.
        """
        raw: RawMaps = self.head(self.pyramid(pictures))
        points, strides = self.points(pictures)
        peaks = keep_peaks(raw.one, (pictures.shape[-2], pictures.shape[-1]), self.spec.strides)
        best, index = peaks.topk(min(top, peaks.shape[1]))  # [B, K]
        chosen = raw.sides.gather(1, index[..., None, None].expand(-1, -1, *raw.sides.shape[2:]))
        return ranked(decode_boxes(chosen, points[index], strides[index]), best)

    def found(self, output: Prediction, top: int = 100) -> Found:
        """The `one` branch's peaks, less doubles."""
        assert output.one is not None
        logits, index = keep_peaks(output.one.logits, output.input_hw, self.spec.strides).topk(
            min(top, output.one.logits.shape[1])
        )
        boxes = output.one.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
        boxes, scores = ranked(boxes, logits)
        return Found(tuple(boxes), tuple(scores))

    def taps(self) -> list[Tap]:
        """The ends of the neck's levels."""
        return [
            Tap(f"neck.outputs.{level}", stride, self.spec.channels) for level, stride in enumerate(self.spec.strides)
        ]

    def inner_layers(self) -> list[Inner]:
        """The backbone's residual blocks' and the head's towers'."""
        return [*residual_inner_layers(self), *plain_layers(self, head_inner_layers(self.head, "head"))]


def freeze_norms(model: nn.Module) -> None:
    """Fix every batch normalisation: its statistics and its scale and shift no longer change."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)
