"""What a two-stage detector's losses add to torchvision's: ignore regions, left out of both stages' samples.

torchvision's Faster R-CNN with a feature pyramid (Ren et al. 2015, Lin et al. 2017): two stages, one class.

Its parts are torchvision's and bear torchvision's names, so that weights of `fasterrcnn_resnet50_fpn` fit. What is
ours: pictures of one size that need no resizing, and regions that are asked for from outside (`regions`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_area, clip_boxes_to_image, nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from hkd_det.models.backbone import Backbone
from hkd_det.models.base import BaseDetector, DetectionBatch, FeatureInfo, ProposalOutputs, RoIOutputs, Targets
from hkd_det.models.detector import MEAN_RGB, STD_RGB
from hkd_det.models.surgery import NO_CHANGES, ModelChanges, PrunableLayer, apply_changes, find_residual_layers
from hkd_det.ops.losses import ReduceMean, clamp_min_one

IGNORE_LABEL = -1  # torchvision's label of what is sampled neither as a person nor as background


IGNORE_IOA_THRESHOLD = 0.5  # share of a box's area inside an ignore region from which it is left out


def split_ignored(targets: Targets) -> tuple[list[Tensor], list[Tensor]]:
    """For each picture the boxes [N, 4] of its people and those [M, 4] of its ignore regions, xyxy.

    Boxes without area are left out: no anchor can be drawn to them.
    """
    solid = (targets.boxes_xyxy[..., 2:] > targets.boxes_xyxy[..., :2]).all(-1)
    return (
        [boxes[kept] for boxes, kept in zip(targets.boxes_xyxy, targets.valid & solid, strict=True)],
        [boxes[kept] for boxes, kept in zip(targets.boxes_xyxy, targets.ignore & solid, strict=True)],
    )


def mark_ignored_anchors(labels: Tensor, boxes_xyxy: Tensor, ignore_regions_xyxy: Tensor) -> Tensor:
    """Labels [A] in which background boxes [A, 4] that lie mostly in one of the ignore regions [M, 4] are discarded."""
    inside = (
        box_intersection(boxes_xyxy, ignore_regions_xyxy) >= IGNORE_IOA_THRESHOLD * box_area(boxes_xyxy)[:, None]
    )  # [A, M]
    return torch.where((labels == 0) & inside.any(1), IGNORE_LABEL, labels)


def box_intersection(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """[A, M] area that boxes [A, 4] share with boxes [M, 4]."""
    low = torch.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    high = torch.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    return (high - low).clamp(min=0).prod(-1)


def smooth_l1_sum(box_deltas: Tensor, target_deltas: Tensor) -> Tensor:
    """The summed smooth L1 of box offsets [R, 4], as torchvision has it for both stages."""
    return F.smooth_l1_loss(box_deltas, target_deltas, beta=1 / 9, reduction="sum")


STRIDES = (4, 8, 16, 32)


STAGE_CHANNELS = (64, 128, 256, 512)  # a ResNet's own widths


ROI_SIZE = 7  # cells across and down a region


PERSON_LABEL, NUM_CLASSES = 1, 2  # 0 is the background


@dataclass(frozen=True)
class FasterRCNNSpec:
    """Everything that fixes a Faster R-CNN's shape; saved with its weights.

    backbone: a timm ResNet. width: of its stages, as a share of its own. channels: the pyramid's. head_width: of the
    region head's two layers. anchor_px: side of the anchors on each of five levels. aspects: their height / width.
    """

    backbone: str = "resnet50"
    width_mult: float = 1.0
    channels: int = 256
    head_width: int = 1024
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels of the backbone's four stages, before a bottleneck's expansion."""
        return tuple(round(self.width_mult * stage) for stage in STAGE_CHANNELS)


class FasterRCNN(BaseDetector):
    """Pictures in, people out, by way of regions that a first stage proposes."""

    spec: FasterRCNNSpec
    mean: Tensor
    std: Tensor

    def __init__(self, spec: FasterRCNNSpec, changes: ModelChanges = NO_CHANGES) -> None:
        super().__init__()
        self.spec, self.changes = spec, changes
        self.backbone = BackboneWithFPN(spec)
        self.rpn = _build_rpn(spec)
        self.roi_heads = _build_roi_heads(spec)
        self.register_buffer("mean", torch.tensor(MEAN_RGB).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD_RGB).view(1, 3, 1, 1), persistent=False)
        apply_changes(self, changes)

    def forward(self, images: Tensor) -> ProposalOutputs:
        """[B, 3, H, W] uint8 or float RGB, 0..255, to the first stage's answers; the second is asked by `regions`."""
        maps = self.backbone((images.float() - self.mean) / self.std)
        raw = self.rpn.head(list(maps))
        per_level = [scores[0].numel() for scores in raw[0]]
        # float32 from here on, anchors included: box arithmetic must not run in bfloat16.
        scores, deltas = (part.float() for part in concat_box_prediction_layers(*raw))
        grids = [torch.empty(level.shape[-2:], device=level.device) for level in maps]
        input_hw = (images.shape[-2], images.shape[-1])
        anchors: Tensor = self.rpn.anchor_generator(ImageList(images, [input_hw]), grids)[0]
        count = len(images)
        boxes = self.rpn.box_coder.decode_single(deltas.detach(), anchors.repeat(count, 1)).view(count, -1, 4)
        proposals, _ = self.rpn.filter_proposals(boxes, scores.detach(), [input_hw] * count, per_level)
        objectness, deltas = scores.view(count, -1), deltas.view(count, -1, 4)
        return ProposalOutputs(maps[: len(STRIDES)], anchors, objectness, deltas, tuple(proposals), input_hw)

    def forward_rois(self, outputs: ProposalOutputs, boxes: Sequence[Tensor]) -> RoIOutputs:
        """What the second stage says of given boxes: for each picture [R_b, 4] xyxy in input pixels; R = sum of R_b."""
        maps = {str(level): features.float() for level, features in enumerate(outputs.features)}
        pooled = self.roi_heads.box_roi_pool(maps, list(boxes), [outputs.input_hw] * len(boxes))
        embedding = self.roi_heads.box_head(pooled)
        class_logits, deltas = (part.float() for part in self.roi_heads.box_predictor(embedding))
        deltas = deltas.view(-1, NUM_CLASSES, 4)[:, PERSON_LABEL]
        found = self.roi_heads.box_coder.decode_single(deltas, torch.cat(list(boxes)))
        logits = class_logits[:, PERSON_LABEL] - class_logits[:, 0]  # its sigmoid is the softmax of the two
        return RoIOutputs(pooled, embedding.float(), logits, deltas, found)

    def loss(
        self, outputs: ProposalOutputs, targets: Targets, reduce_mean: ReduceMean = clamp_min_one
    ) -> dict[str, Tensor]:
        """The terms `rpn_score`, `rpn_box` of the first stage and `score`, `box` of the second, each a scalar.

        Sampling, matching and terms as torchvision has them, save that background in ignore regions is never sampled,
        and that sums are divided by the samples of the global batch.
        """
        people, ignored = split_ignored(targets)
        return {
            **self._rpn_losses(outputs, people, ignored, reduce_mean),
            **self._roi_losses(outputs, people, ignored, reduce_mean),
        }

    def _rpn_losses(
        self, outputs: ProposalOutputs, gt_boxes: list[Tensor], ignore_regions: list[Tensor], reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        anchors = outputs.anchors_xyxy.expand(len(gt_boxes), -1, -1)  # [B, A, 4]
        labels, wanted = self.rpn.assign_targets_to_anchors(anchors.unbind(), [{"boxes": boxes} for boxes in gt_boxes])
        seen = clip_boxes_to_image(anchors, outputs.input_hw)  # what lies outside the picture is no reason to judge
        labels = [mark_ignored_anchors(*one) for one in zip(labels, seen, ignore_regions, strict=True)]
        positive, negative = (torch.stack(chosen).bool() for chosen in self.rpn.fg_bg_sampler(labels))  # [B, A]
        sampled = positive | negative
        norm = reduce_mean(sampled.sum().float())
        scores = F.binary_cross_entropy_with_logits(
            outputs.objectness[sampled], positive[sampled].float(), reduction="sum"
        )
        targets = self.rpn.box_coder.encode_single(torch.stack(wanted)[positive], anchors[positive])
        return {"rpn_cls": scores / norm, "rpn_box": smooth_l1_sum(outputs.box_deltas[positive], targets) / norm}

    def _roi_losses(
        self, outputs: ProposalOutputs, gt_boxes: list[Tensor], ignore_regions: list[Tensor], reduce_mean: ReduceMean
    ) -> dict[str, Tensor]:
        boxes = self.roi_heads.add_gt_proposals(outputs.proposals, gt_boxes)
        matched, labels = self.roi_heads.assign_targets_to_proposals(
            boxes, gt_boxes, [torch.full((len(one),), PERSON_LABEL, device=one.device) for one in gt_boxes]
        )
        labels = [mark_ignored_anchors(*one) for one in zip(labels, boxes, ignore_regions, strict=True)]
        chosen = self.roi_heads.subsample(labels)
        boxes = [one[index] for one, index in zip(boxes, chosen, strict=True)]
        owners = [
            mine[owner[index][label[index] > 0]]
            for mine, owner, label, index in zip(gt_boxes, matched, labels, chosen, strict=True)
        ]
        positive = torch.cat([label[index] for label, index in zip(labels, chosen, strict=True)]) > 0  # [R]
        answer = self.forward_rois(outputs, boxes)
        norm = reduce_mean(torch.tensor(float(len(positive)), device=positive.device))
        # The cross-entropy of two classes is the binary one of their difference.
        scores = F.binary_cross_entropy_with_logits(answer.logits, positive.float(), reduction="sum")
        targets = self.roi_heads.box_coder.encode_single(torch.cat(owners), torch.cat(boxes)[positive])
        return {"cls": scores / norm, "box": smooth_l1_sum(answer.box_deltas[positive], targets) / norm}

    def postprocess(self, outputs: ProposalOutputs, max_det: int = 100) -> DetectionBatch:
        """The second stage's boxes of all proposals, after suppression; every score counts."""
        answer = self.forward_rois(outputs, outputs.proposals)
        everywhere, score = clip_boxes_to_image(answer.boxes_xyxy, outputs.input_hw), answer.logits.sigmoid()
        boxes, scores, start = [], [], 0
        for proposals in outputs.proposals:
            mine = slice(start, start + len(proposals))
            kept = nms(everywhere[mine], score[mine], self.roi_heads.nms_thresh)[:max_det]
            boxes.append(everywhere[mine][kept])
            scores.append(score[mine][kept])
            start = mine.stop
        return DetectionBatch(tuple(boxes), tuple(scores))

    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """End to end: the best boxes [B, top, 4] xyxy input pixels and scores [B, top], 0..1, falling, 0 filling up."""
        found = self.postprocess(self(images), max_det)
        boxes = [F.pad(one, (0, 0, 0, max_det - len(one))) for one in found.boxes_xyxy]
        scores = [F.pad(one, (0, max_det - len(one))) for one in found.scores]
        return torch.stack(boxes), torch.stack(scores)

    def feature_info(self) -> list[FeatureInfo]:
        """The pyramid's levels; the fifth, which only the first stage reads, is the fourth thinned out."""
        return [
            FeatureInfo(f"backbone.fpn.layer_blocks.{level}", stride, self.spec.channels)
            for level, stride in enumerate(STRIDES)
        ]

    def prunable_layers(self) -> list[PrunableLayer]:
        """The backbone's residual blocks'."""
        return find_residual_layers(self)


class BackboneWithFPN(Backbone):
    """A ResNet and torchvision's feature pyramid on it: five maps, the fifth at stride 64 by leaving cells out."""

    def __init__(self, spec: FasterRCNNSpec) -> None:
        super().__init__(spec.backbone, STRIDES, {} if spec.width_mult == 1 else {"channels": spec.stage_channels})
        self.fpn = FeaturePyramidNetwork(self.channels, spec.channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """[B, 3, H, W] normalised pictures to [B, channels, H / s, W / s] maps, fine to coarse."""
        maps = super().forward(images)
        return tuple(self.fpn({str(level): features for level, features in enumerate(maps)}).values())


def _build_rpn(spec: FasterRCNNSpec) -> Any:
    """The region proposal network with torchvision's settings."""
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
    """The region head with torchvision's settings."""
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
