"""What detectors say of a batch of pictures, as losses and methods read it.

Tap: a layer of a network whose map is worth looking at.

What training and distillation ask of a detector, whatever its family: ours, torchvision's, Ultralytics'.

The kinds of output that detectors of different families give.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.models.surgery import NO_CHANGES, ModelChanges, PrunableLayer


@dataclass(frozen=True, eq=False)
class BranchOutputs:
    """One set of answers at the A points of a dense detector.

    logits: [B, A] scores. boxes_xyxy: [B, A, 4] decoded boxes, input pixels.
    sides: [B, A, 4, bins] logits of the distances left, up, right, down, in strides; None where this branch learns no
    boxes of its own (it shares another's), or learns them as plain numbers.
    learns_boxes: whether boxes_xyxy is this branch's own to learn.
    """

    logits: Tensor
    boxes_xyxy: Tensor
    box_logits: Tensor | None = None
    has_box_loss: bool = True


@dataclass(frozen=True, eq=False)
class DenseOutputs:
    """A dense detector's answers: one score and one box at each of A points.

    many: the branch that learns from several points a person. one: the branch that is to answer once a person;
    None if the detector has none. points: [A, 2] (x, y) in input pixels. strides: [A].
    input_hw: the pictures' (height, width).
    """

    one2many: BranchOutputs
    one2one: BranchOutputs | None
    anchor_points: Tensor
    strides: Tensor
    input_hw: tuple[int, int]

    def has_same_anchor_points(self, other: "DenseOutputs") -> bool:
        """Whether both answer at the same points, so that their logits can be compared one by one."""
        return self.anchor_points.shape == other.anchor_points.shape and torch.equal(
            self.anchor_points, other.anchor_points
        )


@dataclass(frozen=True, eq=False)
class DetectionBatch:
    """Finished detections and nothing else: all that a black box says. One tensor a picture.

    boxes_xyxy: [N, 4] input pixels. scores: [N], 0..1.
    """

    boxes_xyxy: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class ProposalOutputs:
    """A two-stage detector's first half: where people may be. The second half judges whatever regions it is given.

    maps: the pyramid's levels [B, C, H, W] that regions are read from, fine to coarse. anchors_xyxy: [A, 4] input
    pixels, the same in every picture. objectness: [B, A] logits. deltas: [B, A, 4] offsets to the anchors.
    proposals: for each picture the best boxes [P, 4] after suppression, best first, without gradients.
    input_hw: the pictures' (height, width).
    """

    features: tuple[Tensor, ...]
    anchors_xyxy: Tensor
    objectness: Tensor
    box_deltas: Tensor
    proposals: tuple[Tensor, ...]
    input_hw: tuple[int, int]


@dataclass(frozen=True, eq=False)
class RoIOutputs:
    """What a two-stage detector's second half says of R regions, those of the first picture first.

    pooled: [R, C, 7, 7] features as they enter the head. embedding: [R, D] as they leave its two layers: what HKD calls
    the logit level. logits: [R] person against background. deltas: [R, 4] offsets to the regions.
    boxes_xyxy: [R, 4] the regions so moved, input pixels, not clipped.
    """

    roi_features: Tensor
    box_features: Tensor
    logits: Tensor
    box_deltas: Tensor
    boxes_xyxy: Tensor


@dataclass(frozen=True)
class FeatureInfo:
    """A layer worth recording: its module name, the stride of its map in input pixels, and its channels."""

    name: str
    stride: int
    channels: int


class BaseDetector(nn.Module, ABC):
    """Pictures in, people out; built from a `spec` (a frozen dataclass of its family) and `changes` made to it since.

    `forward` takes [B, 3, H, W] uint8 or float RGB pictures, 0..255, H and W multiples of 32, and gives the family's
    own output: a `Prediction` of dense detectors, a `TwoStage` of two-stage ones.
    """

    spec: Any
    changes: ModelChanges = NO_CHANGES

    @abstractmethod
    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """End to end: the best boxes [B, K, 4] xyxy input pixels and scores [B, K], 0..1, falling; K at most `top`.

        Where a picture has fewer, scores of 0 fill up.
        """

    @abstractmethod
    def postprocess(self, outputs: Any, max_det: int = 100) -> DetectionBatch:
        """Finished detections, at most `top` a picture, from an output that this detector gave."""

    @abstractmethod
    def feature_info(self) -> list[FeatureInfo]:
        """The ends of the pyramid's levels, fine to coarse: what is distilled unless somebody chooses otherwise."""

    @abstractmethod
    def prunable_layers(self) -> list[PrunableLayer]:
        """The layers whose channels nobody outside their block sees: what a capacity-dynamic student sheds."""


ModelOutputs = DenseOutputs | ProposalOutputs | DetectionBatch


@dataclass(frozen=True, eq=False)
class Targets:
    """The people of B pictures, padded to the largest number M.

    boxes_xyxy: [B, M, 4] input pixels. real: [B, M] bool, a person to find. ignore: [B, M] bool, a region
    to leave alone. Padding is neither.
    """

    boxes_xyxy: Tensor
    valid: Tensor
    ignore: Tensor

    def to(self, device: torch.device) -> "Targets":
        """The same truth on another device."""
        return Targets(self.boxes_xyxy.to(device), self.valid.to(device), self.ignore.to(device))
