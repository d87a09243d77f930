"""Faster R-CNN with a feature pyramid (Ren et al. 2015, Lin et al. 2017): a two-stage detector with one class.

The modules are torchvision's and have torchvision's names, so that weights of `fasterrcnn_resnet50_fpn` fit. Unlike
torchvision's model, all images of a batch have one size, nothing is resized, and `forward_rois` takes any boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image, nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from hkd_det.models.base import (
    BaseDetector,
    DetectionBatch,
    DetectorPart,
    FeatureInfo,
    ModelSpec,
    ProposalOutputs,
    RoIOutputs,
    Targets,
)
from hkd_det.models.detector import Backbone, get_normalization, load_backbone_weights
from hkd_det.models.faster_rcnn_ops import (
    NUM_CLASSES,
    PERSON_LABEL,
    ROI_SIZE,
    STRIDES,
    compute_second_stage,
    mark_ignored_anchors,
    roi_soft_label_losses,
    smooth_l1_sum,
)
from hkd_det.models.surgery import NO_CHANGES, ModelChanges, PrunableLayer, apply_changes, find_residual_layers
from hkd_det.ops.boxes import cluster_nms
from hkd_det.ops.losses import ReduceMean, clamp_min_one

STAGE_CHANNELS = (64, 128, 256, 512)  # of a ResNet of full width


@dataclass(frozen=True)
class FasterRCNNSpec(ModelSpec):
    """Architecture of a Faster R-CNN.

    Attributes:
        backbone: Name of a timm ResNet.
        width_mult: Multiplier of the widths of the backbone stages.
        channels: Channels of the feature pyramid.
        head_width: Width of the two fully connected layers of the box head.
        anchor_sizes: Side of the anchors on each of the five levels, input pixels.
        aspect_ratios: Height / width of the anchors.
    """

    backbone: str = "resnet50"
    width_mult: float = 1.0
    channels: int = 256
    head_width: int = 1024
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the four backbone stages, before the expansion of a bottleneck."""
        return tuple(round(self.width_mult * channels) for channels in STAGE_CHANNELS)


class FasterRCNN(BaseDetector):
    """Two-stage detector: `forward` runs the first stage, `forward_rois` the second."""

    capabilities = frozenset({"features", "logits", "detections", "rois"})
    spec_type = FasterRCNNSpec
    part_prefixes: ClassVar[dict[str, DetectorPart]] = {"backbone.body.": "backbone", "backbone.fpn.": "neck"}

    spec: FasterRCNNSpec
    mean: Tensor
    std: Tensor

    def __init__(self, spec: FasterRCNNSpec, changes: ModelChanges = NO_CHANGES) -> None:
        super().__init__()
        self.spec, self.changes = spec, changes
        self.backbone = BackboneWithFPN(spec)
        self.rpn = _build_rpn(spec)
        self.roi_heads = _build_roi_heads(spec)
        for name, values in get_normalization(spec.backbone).items():
            self.register_buffer(name, values, persistent=False)
        apply_changes(self, changes)

    def forward(self, images: Tensor) -> ProposalOutputs:
        """Run the first stage on images [B, 3, H, W], RGB, 0 to 255. See `BaseDetector.forward`."""
        features = self.forward_features(images)
        raw_outputs = self.rpn.head(list(features))
        anchors_per_level = [logits[0].numel() for logits in raw_outputs[0]]
        # float32 from here on, including the anchors. bfloat16 is too coarse for box coordinates.
        logits, deltas = (values.float() for values in concat_box_prediction_layers(*raw_outputs))
        grids = [torch.empty(level.shape[-2:], device=level.device) for level in features]
        input_hw = (images.shape[-2], images.shape[-1])
        anchors: Tensor = self.rpn.anchor_generator(ImageList(images, [input_hw]), grids)[0]
        batch = len(images)
        boxes = self.rpn.box_coder.decode_single(deltas.detach(), anchors.repeat(batch, 1)).view(batch, -1, 4)
        proposals, _ = self.rpn.filter_proposals(boxes, logits.detach(), [input_hw] * batch, anchors_per_level)
        objectness, deltas = logits.view(batch, -1), deltas.view(batch, -1, 4)
        return ProposalOutputs(features[: len(STRIDES)], anchors, objectness, deltas, tuple(proposals), input_hw)

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the five pyramid levels [B, channels, H_i, W_i], fine to coarse, of images [B, 3, H, W], 0 to 255."""
        levels: tuple[Tensor, ...] = self.backbone((images.float() - self.mean) / self.std)
        return levels

    def forward_rois(self, outputs: ProposalOutputs, boxes: Sequence[Tensor]) -> RoIOutputs:
        """Run the second stage on boxes [R_b, 4] per image, xyxy, input pixels. See `BaseDetector.forward_rois`."""
        features = {str(level): feature.float() for level, feature in enumerate(outputs.features)}
        roi_features = self.roi_heads.box_roi_pool(features, list(boxes), [outputs.input_hw] * len(boxes))
        box_features = self.roi_heads.box_head(roi_features)
        class_logits, deltas = (values.float() for values in self.roi_heads.box_predictor(box_features))
        deltas = deltas.view(-1, NUM_CLASSES, 4)[:, PERSON_LABEL]
        decoded = self.roi_heads.box_coder.decode_single(deltas, torch.cat(list(boxes)))
        logits = class_logits[:, PERSON_LABEL] - class_logits[:, 0]  # Its sigmoid is the softmax of the two classes.
        return RoIOutputs(roi_features, box_features.float(), logits, deltas, decoded)

    def loss(
        self, outputs: ProposalOutputs, targets: Targets, reduce_mean: ReduceMean = clamp_min_one
    ) -> dict[str, Tensor]:
        """Compute the losses of both stages as torchvision does, with two exceptions.

        Background in ignore regions is not sampled. Sums are divided by the number of samples of all processes.

        Args:
            outputs: Return value of `forward` in training mode.
            targets: Ground truth of the same images.
            reduce_mean: Averages the number of samples over all processes.

        Returns:
            Scalar losses `rpn_cls` and `rpn_box` of the first stage, `cls` and `box` of the second.
        """
        gt_boxes, ignore_regions = targets.split_ignored()
        return {
            **self._rpn_losses(outputs, gt_boxes, ignore_regions, reduce_mean),
            **self._roi_losses(outputs, gt_boxes, ignore_regions, reduce_mean),
        }

    def soft_label_loss(
        self,
        outputs: ProposalOutputs,
        detections: DetectionBatch,
        targets: Targets,  # noqa: ARG002 - part of the interface
        reduce_mean: ReduceMean = clamp_min_one,
        background_weight: float = 1.0,  # noqa: ARG002 - part of the interface
    ) -> tuple[Tensor, Tensor]:
        """Compute `roi_soft_label_losses`. `targets` and `background_weight` have no effect."""
        return roi_soft_label_losses(self, outputs, detections, reduce_mean)

    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """Run both stages and non-maximum suppression. See `BaseDetector.predict`; here K = max_det."""
        detections = self.postprocess(self(images), max_det)
        boxes = [F.pad(image_boxes, (0, 0, 0, max_det - len(image_boxes))) for image_boxes in detections.boxes_xyxy]
        scores = [F.pad(image_scores, (0, max_det - len(image_scores))) for image_scores in detections.scores]
        return torch.stack(boxes), torch.stack(scores)

    def postprocess(self, outputs: ProposalOutputs, max_det: int = 100) -> DetectionBatch:
        """Run the second stage on all proposals, then non-maximum suppression without a score threshold."""
        roi_outputs = self.forward_rois(outputs, outputs.proposals)
        all_scores = roi_outputs.logits.sigmoid()
        all_boxes = clip_boxes_to_image(roi_outputs.boxes_xyxy, outputs.input_hw)
        counts = [len(proposals) for proposals in outputs.proposals]
        boxes, scores = [], []
        for image_boxes, image_scores in zip(
            torch.split(all_boxes, counts), torch.split(all_scores, counts), strict=True
        ):
            kept = nms(image_boxes, image_scores, self.roi_heads.nms_thresh)[:max_det]
            boxes.append(image_boxes[kept])
            scores.append(image_scores[kept])
        return DetectionBatch(tuple(boxes), tuple(scores))

    def predict_traceable(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """Run both stages and `cluster_nms`. See `BaseDetector.predict_traceable`."""
        boxes, logits = self.raw_outputs(images)
        return cluster_nms(boxes, logits.sigmoid(), max_det, self.roi_heads.nms_thresh)

    def raw_outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the second-stage boxes and logits of all proposals. See `BaseDetector.raw_outputs`."""
        return compute_second_stage(self.rpn, self.roi_heads, self.forward_features(images), images)

    def feature_info(self) -> list[FeatureInfo]:
        """Return the first four pyramid levels. The fifth is the fourth, subsampled, for the first stage only."""
        return [
            FeatureInfo(f"backbone.fpn.layer_blocks.{level}", stride, self.spec.channels)
            for level, stride in enumerate(STRIDES)
        ]

    def prunable_layers(self) -> list[PrunableLayer]:
        """Return the inner layers of the residual blocks of the backbone."""
        return find_residual_layers(self)

    def load_pretrained(self, source: str) -> None:
        """Load pretrained backbone weights. See `BaseDetector.load_pretrained`."""
        load_backbone_weights(self.backbone, self.spec.backbone, source)

    def _rpn_losses(
        self, outputs: ProposalOutputs, gt_boxes: list[Tensor], ignore_regions: list[Tensor], reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        anchors = outputs.anchors_xyxy.expand(len(gt_boxes), -1, -1)  # [B, A, 4]
        labels, matched_boxes = self.rpn.assign_targets_to_anchors(
            anchors.unbind(), [{"boxes": boxes} for boxes in gt_boxes]
        )
        clipped = clip_boxes_to_image(anchors, outputs.input_hw)  # Only the part inside the image can be ignored.
        labels = [mark_ignored_anchors(*args) for args in zip(labels, clipped, ignore_regions, strict=True)]
        positive, negative = (torch.stack(masks).bool() for masks in self.rpn.fg_bg_sampler(labels))  # [B, A]
        sampled = positive | negative
        avg_factor = reduce_mean(sampled.sum().float())
        cls_loss = F.binary_cross_entropy_with_logits(
            outputs.objectness[sampled], positive[sampled].float(), reduction="sum"
        )
        target_deltas = self.rpn.box_coder.encode_single(torch.stack(matched_boxes)[positive], anchors[positive])
        box_loss = smooth_l1_sum(outputs.box_deltas[positive], target_deltas)
        return {"rpn_cls": cls_loss / avg_factor, "rpn_box": box_loss / avg_factor}

    def _roi_losses(
        self, outputs: ProposalOutputs, gt_boxes: list[Tensor], ignore_regions: list[Tensor], reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        proposals = self.roi_heads.add_gt_proposals(outputs.proposals, gt_boxes)
        gt_labels = [torch.full((len(boxes),), PERSON_LABEL, device=boxes.device) for boxes in gt_boxes]
        matched_idx, labels = self.roi_heads.assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        labels = [mark_ignored_anchors(*args) for args in zip(labels, proposals, ignore_regions, strict=True)]
        sampled = self.roi_heads.subsample(labels)
        rois = [boxes[index] for boxes, index in zip(proposals, sampled, strict=True)]
        matched_boxes = [
            boxes[matched[index][label[index] > 0]]
            for boxes, matched, label, index in zip(gt_boxes, matched_idx, labels, sampled, strict=True)
        ]
        positive = torch.cat([label[index] for label, index in zip(labels, sampled, strict=True)]) > 0  # [R]
        roi_outputs = self.forward_rois(outputs, rois)
        avg_factor = reduce_mean(torch.tensor(float(len(positive)), device=positive.device))
        # The cross-entropy of two classes is the binary cross-entropy of the difference of their logits.
        cls_loss = F.binary_cross_entropy_with_logits(roi_outputs.logits, positive.float(), reduction="sum")
        target_deltas = self.roi_heads.box_coder.encode_single(torch.cat(matched_boxes), torch.cat(rois)[positive])
        box_loss = smooth_l1_sum(roi_outputs.box_deltas[positive], target_deltas)
        return {"cls": cls_loss / avg_factor, "box": box_loss / avg_factor}


class BackboneWithFPN(Backbone):
    """A timm ResNet with torchvision's feature pyramid: five levels, the fifth (stride 64) by subsampling."""

    def __init__(self, spec: FasterRCNNSpec) -> None:
        super().__init__(spec.backbone, STRIDES, {} if spec.width_mult == 1 else {"channels": spec.stage_channels})
        self.fpn = FeaturePyramidNetwork(self.channels, spec.channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # a tuple for the graph export
        """Compute the feature pyramid.

        Args:
            images (Tensor[B, 3, H, W]): Normalized RGB images.

        Returns:
            levels (tuple of Tensor[B, channels, H_i, W_i]): Fine to coarse.
        """
        features = super().forward(images)
        return tuple(self.fpn({str(level): feature for level, feature in enumerate(features)}).values())


def _build_rpn(spec: FasterRCNNSpec) -> Any:
    """Build the region proposal network with torchvision's settings."""
    anchors = AnchorGenerator(
        tuple((side,) for side in spec.anchor_sizes), (spec.aspect_ratios,) * len(spec.anchor_sizes)
    )
    return RegionProposalNetwork(
        anchors,
        RPNHead(spec.channels, len(spec.aspect_ratios)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )


def _build_roi_heads(spec: FasterRCNNSpec) -> Any:
    """Build the second stage with torchvision's settings."""
    levels = [str(level) for level in range(len(STRIDES))]
    return RoIHeads(
        MultiScaleRoIAlign(levels, output_size=ROI_SIZE, sampling_ratio=2),
        TwoMLPHead(spec.channels * ROI_SIZE**2, spec.head_width),
        FastRCNNPredictor(spec.head_width, NUM_CLASSES),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.0,
        nms_thresh=0.5,
        detections_per_img=100,
    )
