"""The interface of all detectors, and the outputs and targets that training and distillation exchange with them.

Shape letters: B images, A anchor points or anchors, M ground-truth boxes, N detections, P proposals, R RoIs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hkd_det.errors import UsageError
from hkd_det.models.surgery import NO_CHANGES, ModelChanges, PrunableLayer
from hkd_det.ops.boxes import nms_detections
from hkd_det.ops.losses import SCORE_EPS, ReduceMean, clamp_min_one

TensorFunction = Callable[[Tensor], Tensor]
DetectorPart = Literal["backbone", "neck", "head"]


@dataclass(frozen=True, eq=False)
class BranchOutputs:
    """Scores and boxes of one prediction branch of a dense detector.

    Attributes:
        logits (Tensor[B, A]): Score logits of the class person.
        boxes_xyxy (Tensor[B, A, 4]): Decoded boxes, input pixels.
        box_logits (Tensor[B, A, 4, reg_max]): Logits of the distance distributions left, up, right, down, in strides.
            None if the branch shares the boxes of another branch or regresses plain distances.
        has_box_loss: Whether `boxes_xyxy` belongs to this branch and is trained by it.
    """

    logits: Tensor
    boxes_xyxy: Tensor
    box_logits: Tensor | None = None
    has_box_loss: bool = True


@dataclass(frozen=True, eq=False)
class DenseOutputs:
    """Outputs of a dense (one-stage, anchor-free) detector: one score and one box per anchor point and branch.

    Attributes:
        one2many: Branch that is trained with several anchor points per ground-truth box.
        one2one: Branch that is trained with one anchor point per ground-truth box; None if the detector has none.
        anchor_points (Tensor[A, 2]): Centers (x, y) of the cells, input pixels.
        strides (Tensor[A]): Stride of the feature level of each anchor point, input pixels.
        input_hw: Height and width of the input images, pixels.
    """

    one2many: BranchOutputs
    one2one: BranchOutputs | None
    anchor_points: Tensor
    strides: Tensor
    input_hw: tuple[int, int]

    def has_same_anchor_points(self, other: "DenseOutputs") -> bool:
        """Return whether both outputs have the same anchor points, so that their logits can be compared in place."""
        return self.anchor_points.shape == other.anchor_points.shape and torch.equal(
            self.anchor_points, other.anchor_points
        )

    def map_values(self, on_logits: TensorFunction, on_features: TensorFunction) -> "DenseOutputs":  # noqa: ARG002 - interface
        """Apply a function to the score logits [B, A] of each branch; `on_features` has no effect."""
        one2one = replace(self.one2one, logits=on_logits(self.one2one.logits)) if self.one2one else None
        return replace(self, one2many=replace(self.one2many, logits=on_logits(self.one2many.logits)), one2one=one2one)


@dataclass(frozen=True, eq=False)
class DetectionBatch:
    """Final detections of a batch, one tensor per image, highest score first.

    Attributes:
        boxes_xyxy (tuple of Tensor[N, 4]): Boxes, input pixels.
        scores (tuple of Tensor[N]): Scores, 0 to 1.
    """

    boxes_xyxy: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]

    def suppress(self, iou_threshold: float) -> "DetectionBatch":
        """Return the detections that remain after non-maximum suppression per image."""
        return DetectionBatch(*nms_detections(self.boxes_xyxy, self.scores, iou_threshold))

    def map_values(self, on_logits: TensorFunction, on_features: TensorFunction) -> "DetectionBatch":  # noqa: ARG002 - interface
        """Apply a function to the logits [1, N] of the scores of each image; `on_features` has no effect."""
        logits = (scores.logit(eps=SCORE_EPS)[None] for scores in self.scores)
        return replace(self, scores=tuple(on_logits(values)[0].sigmoid() for values in logits))


@dataclass(frozen=True, eq=False)
class ProposalOutputs:
    """First-stage outputs of a two-stage detector. `BaseDetector.forward_rois` runs the second stage on any boxes.

    Attributes:
        features (tuple of Tensor[B, C, H, W]): Pyramid levels that RoIs are pooled from, fine to coarse.
        anchors_xyxy (Tensor[A, 4]): Anchors, input pixels, the same for all images.
        objectness (Tensor[B, A]): Logits.
        box_deltas (Tensor[B, A, 4]): Box regression relative to the anchors.
        proposals (tuple of Tensor[P, 4]): Boxes after suppression per image, xyxy, input pixels, best first, without
            gradients.
        input_hw: Height and width of the input images, pixels.
    """

    features: tuple[Tensor, ...]
    anchors_xyxy: Tensor
    objectness: Tensor
    box_deltas: Tensor
    proposals: tuple[Tensor, ...]
    input_hw: tuple[int, int]

    def map_values(self, on_logits: TensorFunction, on_features: TensorFunction) -> "ProposalOutputs":  # noqa: ARG002 - interface
        """Return the outputs unchanged: distillation reads detections and RoI outputs instead."""
        return self


@dataclass(frozen=True, eq=False)
class RoIOutputs:
    """Second-stage outputs of a two-stage detector for R RoIs, in the order of the images.

    Attributes:
        roi_features (Tensor[R, C, 7, 7]): Pooled features, the input of the box head.
        box_features (Tensor[R, D]): Output of the two fully connected layers of the box head.
        logits (Tensor[R]): Logits of person against background.
        box_deltas (Tensor[R, 4]): Box regression relative to the RoIs.
        boxes_xyxy (Tensor[R, 4]): Decoded boxes, input pixels, not clipped.
    """

    roi_features: Tensor
    box_features: Tensor
    logits: Tensor
    box_deltas: Tensor
    boxes_xyxy: Tensor

    def map_values(self, on_logits: TensorFunction, on_features: TensorFunction) -> "RoIOutputs":
        """Apply functions to the box features [R, D], the logit level of HKD, and to the RoI features [R, C, 7, 7]."""
        roi_features = on_features(self.roi_features)
        return replace(self, roi_features=roi_features, box_features=on_logits(self.box_features))


ModelOutputs = DenseOutputs | ProposalOutputs | DetectionBatch


@dataclass(frozen=True, eq=False)
class Targets:
    """Ground truth of a batch, padded to the largest number of boxes M. Padding is neither valid nor ignored.

    Attributes:
        boxes_xyxy (Tensor[B, M, 4]): Boxes, input pixels.
        valid (Tensor[B, M]): bool, a person to detect.
        ignore (Tensor[B, M]): bool, an ignore region.
    """

    boxes_xyxy: Tensor
    valid: Tensor
    ignore: Tensor

    def to(self, device: torch.device) -> "Targets":
        """Return the targets on another device."""
        return Targets(self.boxes_xyxy.to(device), self.valid.to(device), self.ignore.to(device))

    def split_ignored(self) -> tuple[list[Tensor], list[Tensor]]:
        """Split the padded boxes into persons and ignore regions. Boxes without area are dropped.

        Returns:
            gt_boxes (list of Tensor[N, 4]): xyxy boxes of the persons, per image.
            ignore_regions (list of Tensor[M, 4]): xyxy ignore regions, per image.
        """
        has_area = (self.boxes_xyxy[..., 2:] > self.boxes_xyxy[..., :2]).all(-1)
        return (
            [boxes[mask] for boxes, mask in zip(self.boxes_xyxy, self.valid & has_area, strict=True)],
            [boxes[mask] for boxes, mask in zip(self.boxes_xyxy, self.ignore & has_area, strict=True)],
        )


@dataclass(frozen=True)
class FeatureInfo:
    """A layer whose output is a feature map (as in timm's `feature_info`).

    Attributes:
        name: Module name as in `named_modules`.
        stride: Stride of the feature map, input pixels.
        channels: Number of channels of the feature map.
    """

    name: str
    stride: int
    channels: int


@dataclass(frozen=True)
class TowerLayers:
    """Layers inside the head towers of one feature level, one per convolution, the first one first.

    The output of a layer is the normalized output of the convolution, before the activation.

    Attributes:
        cls: Layers of the tower whose output is classified.
        box: Layers of the tower that boxes are predicted from.
    """

    cls: tuple[FeatureInfo, ...]
    box: tuple[FeatureInfo, ...]


@dataclass(frozen=True)
class ModelSpec:
    """Base class of the architecture description of a family: a frozen dataclass of plain values."""


class BaseDetector(nn.Module, ABC):
    """A pedestrian detector that can be trained, distilled and exported. A family is one subclass.

    A new family is one file with a `ModelSpec` and a subclass, one row in `hkd_det.models.checkpoint.FAMILIES` and one
    entry in tests/hkd_det/models/test_families.py. `__init__(spec, changes)` builds the network with fresh weights.

    Attributes:
        capabilities: What the outputs offer to distillation: "features" (feature maps), "logits" (raw scores),
            "detections" (final boxes and scores), "rois" (`forward_rois`), "towers" (`forward_towers`).
        license: SPDX identifier of the license of the model code.
        spec_type: The `ModelSpec` subclass of the family.
        part_prefixes: Part of the detector by prefix of the layer name; all other layers belong to the head.
        spec: Architecture description, saved with the weights.
        changes: Changes made to the architecture after it was built from `spec`.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"features", "logits", "detections"})
    license: ClassVar[str] = "Apache-2.0"
    spec_type: ClassVar[type[ModelSpec]]
    part_prefixes: ClassVar[dict[str, DetectorPart]] = {}

    spec: Any
    changes: ModelChanges = NO_CHANGES

    @abstractmethod
    def forward(self, images: Tensor) -> Any:
        """Run the network.

        Args:
            images (Tensor[B, 3, H, W]): RGB, 0 to 255, uint8 or float. H and W must be multiples of 32.

        Returns:
            `DenseOutputs` or `ProposalOutputs`.
        """

    @abstractmethod
    def loss(self, outputs: Any, targets: Targets, reduce_mean: ReduceMean = clamp_min_one) -> dict[str, Tensor]:
        """Compute the detection losses.

        Args:
            outputs: Return value of `forward` in training mode.
            targets: Ground truth of the same images.
            reduce_mean: Averages a normalization factor over all processes.

        Returns:
            Weighted scalar losses by name.
        """

    @abstractmethod
    def soft_label_loss(
        self,
        outputs: Any,
        detections: DetectionBatch,
        targets: Targets,
        reduce_mean: ReduceMean = clamp_min_one,
        background_weight: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses that regard the detections of a teacher as soft labels.

        Args:
            outputs: Return value of `forward` in training mode.
            detections: Detections of the teacher for the same images.
            targets: Ground truth of the same images.
            reduce_mean: Averages a normalization factor over all processes.
            background_weight: Weight of anchor points at which the teacher detects nothing. Has no effect for
                two-stage detectors.

        Returns:
            cls_loss (Tensor): Unweighted scalar.
            box_loss (Tensor): Unweighted scalar.
        """

    @abstractmethod
    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """Run inference and return the highest-scoring detections.

        Args:
            images (Tensor[B, 3, H, W]): RGB, 0 to 255, uint8 or float. H and W must be multiples of 32.
            max_det: Maximum number of detections per image.

        Returns:
            boxes (Tensor[B, K, 4]): xyxy, input pixels.
            scores (Tensor[B, K]): 0 to 1, descending. Unused rows have score 0.
        """

    @abstractmethod
    def postprocess(self, outputs: Any, max_det: int = 100) -> DetectionBatch:
        """Convert outputs of `forward` to final detections.

        Args:
            outputs: Return value of `forward` of this detector.
            max_det: Maximum number of detections per image.

        Returns:
            Detections in descending order of score.
        """

    def predict_traceable(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """Run `predict` with shapes that do not depend on values, so that it can be exported.

        Args:
            images (Tensor[B, 3, H, W]): RGB, 0 to 255, float. H and W must be multiples of 32.
            max_det: Maximum number of detections per image.

        Returns:
            boxes (Tensor[B, K, 4]): xyxy, input pixels.
            scores (Tensor[B, K]): 0 to 1, descending. Unused rows have score 0.
        """
        return self.predict(images, max_det)

    @abstractmethod
    def raw_outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return all candidates that `predict` selects from, with shapes that do not depend on values.

        Args:
            images (Tensor[B, 3, H, W]): RGB, 0 to 255, float. H and W must be multiples of 32.

        Returns:
            boxes (Tensor[B, A, 4]): xyxy, input pixels.
            logits (Tensor[B, A]): Score logits.
        """

    def forward_rois(self, outputs: Any, boxes: Sequence[Tensor]) -> RoIOutputs:
        """Run the second stage on given boxes. Requires the capability "rois".

        Args:
            outputs: Return value of `forward`.
            boxes (sequence of Tensor[R_b, 4]): xyxy boxes per image, input pixels.

        Returns:
            Outputs of all R boxes, in the order of the images. R is the sum of R_b.

        Raises:
            NotImplementedError: If the detector has no second stage.
        """
        raise NotImplementedError(f"{type(self).__name__} has no second stage")

    def tower_layers(self) -> list[TowerLayers]:
        """Return the layers inside the head towers per level, fine to coarse. Requires the capability "towers"."""
        raise NotImplementedError(f"{type(self).__name__} has no head towers")

    def forward_towers(
        self, features: Sequence[tuple[Tensor, Tensor]], num_convs: int, images: Tensor
    ) -> BranchOutputs:
        """Run the rest of the head on features inside its towers. Requires the capability "towers".

        Args:
            features (sequence of pairs of Tensor[B, C, H_i, W_i]): Features of the classification and of the regression
                tower per level, fine to coarse: outputs of `tower_layers` number `num_convs`, before the activation.
            num_convs: Number of convolutions that the features have passed, 1 to the depth of the towers.
            images (Tensor[B, 3, H, W]): Images of the features. Only their size has an effect.

        Returns:
            Outputs of the one-to-many branch.

        Raises:
            NotImplementedError: If the head has no towers.
        """
        raise NotImplementedError(f"{type(self).__name__} has no head towers")

    @abstractmethod
    def feature_info(self) -> list[FeatureInfo]:
        """Return the output layers of the neck, fine to coarse: the default layers of feature distillation."""

    @abstractmethod
    def prunable_layers(self) -> list[PrunableLayer]:
        """Return the layers whose output channels only their own block reads, so that they can be pruned."""

    def part_of(self, layer: str) -> DetectorPart:
        """Return the part of the detector that contains a layer, named as in `named_modules`."""
        return next((part for prefix, part in self.part_prefixes.items() if layer.startswith(prefix)), "head")

    def load_pretrained(self, source: str) -> None:
        """Load pretrained backbone weights.

        Args:
            source: "imagenet" to download the weights that timm provides, or the path of a local file.

        Raises:
            UsageError: If the backbone of this family is not a timm model.
            UnavailableError: If the weights cannot be downloaded.
            DataError: If the file does not fit the backbone.
        """
        raise UsageError(
            f"--pretrained {source}: {type(self).__name__} has its own backbone. "
            "Omit the flag, or set --weights to a checkpoint of the model."
        )
