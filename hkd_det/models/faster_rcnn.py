"""torchvision's Faster R-CNN with a feature pyramid (Ren et al. 2015, Lin et al. 2017): two stages, one class.

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
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image, nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from hkd_det.losses.detection import Norm, norm_alone
from hkd_det.losses.two_stage import discard_ignored, people_and_ignored, sampled_boxes_loss
from hkd_det.models.assignment import TruthBatch
from hkd_det.models.backbone import Backbone
from hkd_det.models.detector import MEAN_RGB, STD_RGB
from hkd_det.models.family import PersonDetector
from hkd_det.models.prediction import Found, RegionAnswer, TwoStage
from hkd_det.models.surgery import UNCHANGED, Changes, Inner, apply_changes, residual_inner_layers
from hkd_det.models.tap import Tap

STRIDES = (4, 8, 16, 32)
STAGES = (64, 128, 256, 512)  # a ResNet's own widths
POOLED = 7  # cells across and down a region
PERSON, CLASSES = 1, 2  # 0 is the background


@dataclass(frozen=True)
class FasterRcnnSpec:
    """Everything that fixes a Faster R-CNN's shape; saved with its weights.

    backbone: a timm ResNet. width: of its stages, as a share of its own. channels: the pyramid's. head_width: of the
    region head's two layers. anchor_px: side of the anchors on each of five levels. aspects: their height / width.
    """

    backbone: str = "resnet50"
    width: float = 1.0
    channels: int = 256
    head_width: int = 1024
    anchor_px: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspects: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the backbone's four stages, before a bottleneck's expansion."""
        return tuple(round(self.width * stage) for stage in STAGES)


class FasterRcnn(PersonDetector):
    """Pictures in, people out, by way of regions that a first stage proposes."""

    spec: FasterRcnnSpec
    mean: Tensor
    std: Tensor

    def __init__(self, spec: FasterRcnnSpec, changes: Changes = UNCHANGED) -> None:
        super().__init__()
        self.spec, self.changes = spec, changes
        self.backbone = PyramidBackbone(spec)
        self.rpn = _proposer(spec)
        self.roi_heads = _judge(spec)
        self.register_buffer("mean", torch.tensor(MEAN_RGB).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD_RGB).view(1, 3, 1, 1), persistent=False)
        apply_changes(self, changes)

    def forward(self, pictures: Tensor) -> TwoStage:
        """[B, 3, H, W] uint8 or float RGB, 0..255, to the first stage's answers; the second is asked by `regions`."""
        maps = self.backbone((pictures.float() - self.mean) / self.std)
        raw = self.rpn.head(list(maps))
        per_level = [scores[0].numel() for scores in raw[0]]
        # float32 from here on, anchors included: box arithmetic must not run in bfloat16.
        scores, deltas = (part.float() for part in concat_box_prediction_layers(*raw))
        grids = [torch.empty(level.shape[-2:], device=level.device) for level in maps]
        input_hw = (pictures.shape[-2], pictures.shape[-1])
        anchors: Tensor = self.rpn.anchor_generator(ImageList(pictures, [input_hw]), grids)[0]
        count = len(pictures)
        boxes = self.rpn.box_coder.decode_single(deltas.detach(), anchors.repeat(count, 1)).view(count, -1, 4)
        proposals, _ = self.rpn.filter_proposals(boxes, scores.detach(), [input_hw] * count, per_level)
        objectness, deltas = scores.view(count, -1), deltas.view(count, -1, 4)
        return TwoStage(maps[: len(STRIDES)], anchors, objectness, deltas, tuple(proposals), input_hw)

    def regions(self, output: TwoStage, boxes: Sequence[Tensor]) -> RegionAnswer:
        """What the second stage says of given boxes: for each picture [R_b, 4] xyxy in input pixels; R = sum of R_b."""
        maps = {str(level): features.float() for level, features in enumerate(output.maps)}
        pooled = self.roi_heads.box_roi_pool(maps, list(boxes), [output.input_hw] * len(boxes))
        embedding = self.roi_heads.box_head(pooled)
        class_logits, deltas = (part.float() for part in self.roi_heads.box_predictor(embedding))
        deltas = deltas.view(-1, CLASSES, 4)[:, PERSON]
        found = self.roi_heads.box_coder.decode_single(deltas, torch.cat(list(boxes)))
        logits = class_logits[:, PERSON] - class_logits[:, 0]  # its sigmoid is the softmax of the two
        return RegionAnswer(pooled, embedding.float(), logits, deltas, found)

    def losses(self, output: TwoStage, truth: TruthBatch, norm_of: Norm = norm_alone) -> dict[str, Tensor]:
        """The terms `rpn_score`, `rpn_box` of the first stage and `score`, `box` of the second, each a scalar.

        Sampling, matching and terms as torchvision has them, save that background in ignore regions is never sampled,
        and that sums are divided by the samples of the global batch.
        """
        people, ignored = people_and_ignored(truth)
        return {
            **self._first_losses(output, people, ignored, norm_of),
            **self._second_losses(output, people, ignored, norm_of),
        }

    def _first_losses(
        self, output: TwoStage, people: list[Tensor], ignored: list[Tensor], norm_of: Norm
    ) -> dict[str, Tensor]:
        anchors = output.anchors_xyxy.expand(len(people), -1, -1)  # [B, A, 4]
        labels, wanted = self.rpn.assign_targets_to_anchors(anchors.unbind(), [{"boxes": boxes} for boxes in people])
        seen = clip_boxes_to_image(anchors, output.input_hw)  # what lies outside the picture is no reason to judge
        labels = [discard_ignored(*one) for one in zip(labels, seen, ignored, strict=True)]
        positive, negative = (torch.stack(chosen).bool() for chosen in self.rpn.fg_bg_sampler(labels))  # [B, A]
        sampled = positive | negative
        norm = norm_of(sampled.sum().float())
        scores = F.binary_cross_entropy_with_logits(
            output.objectness[sampled], positive[sampled].float(), reduction="sum"
        )
        targets = self.rpn.box_coder.encode_single(torch.stack(wanted)[positive], anchors[positive])
        return {"rpn_score": scores / norm, "rpn_box": sampled_boxes_loss(output.deltas[positive], targets) / norm}

    def _second_losses(
        self, output: TwoStage, people: list[Tensor], ignored: list[Tensor], norm_of: Norm
    ) -> dict[str, Tensor]:
        boxes = self.roi_heads.add_gt_proposals(output.proposals, people)
        matched, labels = self.roi_heads.assign_targets_to_proposals(
            boxes, people, [torch.full((len(one),), PERSON, device=one.device) for one in people]
        )
        labels = [discard_ignored(*one) for one in zip(labels, boxes, ignored, strict=True)]
        chosen = self.roi_heads.subsample(labels)
        boxes = [one[index] for one, index in zip(boxes, chosen, strict=True)]
        owners = [
            mine[owner[index][label[index] > 0]]
            for mine, owner, label, index in zip(people, matched, labels, chosen, strict=True)
        ]
        positive = torch.cat([label[index] for label, index in zip(labels, chosen, strict=True)]) > 0  # [R]
        answer = self.regions(output, boxes)
        norm = norm_of(torch.tensor(float(len(positive)), device=positive.device))
        # The cross-entropy of two classes is the binary one of their difference.
        scores = F.binary_cross_entropy_with_logits(answer.logits, positive.float(), reduction="sum")
        targets = self.roi_heads.box_coder.encode_single(torch.cat(owners), torch.cat(boxes)[positive])
        return {"score": scores / norm, "box": sampled_boxes_loss(answer.deltas[positive], targets) / norm}

    def found(self, output: TwoStage, top: int = 100) -> Found:
        """The second stage's boxes of all proposals, after suppression; every score counts."""
        answer = self.regions(output, output.proposals)
        everywhere, score = clip_boxes_to_image(answer.boxes_xyxy, output.input_hw), answer.logits.sigmoid()
        boxes, scores, start = [], [], 0
        for proposals in output.proposals:
            mine = slice(start, start + len(proposals))
            kept = nms(everywhere[mine], score[mine], self.roi_heads.nms_thresh)[:top]
            boxes.append(everywhere[mine][kept])
            scores.append(score[mine][kept])
            start = mine.stop
        return Found(tuple(boxes), tuple(scores))

    def detect(self, pictures: Tensor, top: int = 300) -> tuple[Tensor, Tensor]:
        """End to end: the best boxes [B, top, 4] xyxy input pixels and scores [B, top], 0..1, falling, 0 filling up."""
        found = self.found(self(pictures), top)
        boxes = [F.pad(one, (0, 0, 0, top - len(one))) for one in found.boxes_xyxy]
        scores = [F.pad(one, (0, top - len(one))) for one in found.scores]
        return torch.stack(boxes), torch.stack(scores)

    def taps(self) -> list[Tap]:
        """The pyramid's levels; the fifth, which only the first stage reads, is the fourth thinned out."""
        return [
            Tap(f"backbone.fpn.layer_blocks.{level}", stride, self.spec.channels)
            for level, stride in enumerate(STRIDES)
        ]

    def inner_layers(self) -> list[Inner]:
        """The backbone's residual blocks'."""
        return residual_inner_layers(self)


class PyramidBackbone(Backbone):
    """A ResNet and torchvision's feature pyramid on it: five maps, the fifth at stride 64 by leaving cells out."""

    def __init__(self, spec: FasterRcnnSpec) -> None:
        super().__init__(spec.backbone, STRIDES, {} if spec.width == 1 else {"channels": spec.widths})
        self.fpn = FeaturePyramidNetwork(self.channels, spec.channels, LastLevelMaxPool())

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """[B, 3, H, W] normalised pictures to [B, channels, H / s, W / s] maps, fine to coarse."""
        maps = super().forward(pictures)
        return tuple(self.fpn({str(level): features for level, features in enumerate(maps)}).values())


def _proposer(spec: FasterRcnnSpec) -> Any:
    """The region proposal network with torchvision's settings."""
    anchors = AnchorGenerator(tuple((side,) for side in spec.anchor_px), (spec.aspects,) * len(spec.anchor_px))
    return RegionProposalNetwork(
        anchors,
        RPNHead(spec.channels, len(spec.aspects)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )


def _judge(spec: FasterRcnnSpec) -> Any:
    """The region head with torchvision's settings."""
    levels = [str(level) for level in range(len(STRIDES))]
    return RoIHeads(
        MultiScaleRoIAlign(levels, output_size=POOLED, sampling_ratio=2),
        TwoMLPHead(spec.channels * POOLED**2, spec.head_width),
        FastRCNNPredictor(spec.head_width, CLASSES),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.0,
        nms_thresh=0.5,
        detections_per_img=100,
    )
