"""YOLOX (Ge et al. 2021) with the single class person: CSPDarknet, PAFPN and a decoupled anchor-free head.

Module names follow Megvii's implementation, so that `yolox_weights` can fill the network from its public files. Two
parts differ without a change of the result: the Focus stem is one 6x6 convolution, and the logit of an anchor point
combines class and objectness.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.models.base import (
    BaseDetector,
    BranchOutputs,
    DenseOutputs,
    DetectionBatch,
    DetectorPart,
    FeatureInfo,
    ModelSpec,
    TowerLayers,
)
from hkd_det.models.detector import DenseDetector
from hkd_det.models.head import make_anchors
from hkd_det.models.surgery import NO_CHANGES, DepthwiseLayer, ModelChanges, PrunableLayer, apply_changes
from hkd_det.ops.boxes import batched_nms, cluster_nms

Activation = Literal["silu", "hardswish", "relu"]

STRIDES = (8, 16, 32)
IOU_THRESHOLD = 0.6
PRE_NMS_TOPK = 300  # no miss rate changes between 200 and 1000; more boxes only take longer
PRIOR_PROB = 0.1  # initial class score and objectness: their product is the 0.01 of the other families
MAX_BOX_LOGIT = 10.0  # exp of it times the largest stride is far above every image


@dataclass(frozen=True)
class YOLOXSpec(ModelSpec):
    """Architecture of a `YOLOX`.

    Attributes:
        depth: Multiplier of the number of bottlenecks per stage; 3 and 9 at depth 1.
        width: Multiplier of the channels; the stem has 64 channels at width 1.
        depthwise: Whether 3x3 convolutions are depthwise-separable, as in YOLOX-nano.
        act: Activation. The public weights use silu; hardswish and relu are faster on CPUs.
        stage_channels: Output channels of the stem, of the four stages of the backbone and of the head, instead of
            `width`. Empty: `width` times 64, 128, 256, 512, 1024 and 256.
    """

    depth: float = 0.33
    width: float = 0.25
    depthwise: bool = True
    act: Activation = "silu"
    stage_channels: tuple[int, ...] = ()

    def can_start_from(self, other: "YOLOXSpec") -> bool:
        """Return whether the other architecture has the same layers, and as many channels, more, or n times fewer."""
        own, others = self.get_channels(), other.get_channels()
        is_multiple = own == tuple(own[0] // others[0] * channels for channels in others)
        is_narrower = all(a <= b for a, b in zip(own, others, strict=True))
        same_layers = (self.depth, self.depthwise) == (other.depth, other.depthwise)
        return same_layers and (is_multiple or is_narrower)

    def get_channels(self) -> tuple[int, ...]:
        """Return the output channels of the stem, of the four stages of the backbone and of the head."""
        return self.stage_channels or tuple(int(self.width * 64) * factor for factor in (1, 2, 4, 8, 16, 4))


class ConvNormAct(nn.Module):
    """Convolution without bias, batch normalization and activation; `BaseConv` of Megvii."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, act: Activation, groups: int = 1
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03)
        self.act = _make_activation(act)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        outputs: Tensor = self.act(self.bn(self.conv(features)))
        return outputs


class DepthwiseSeparableConv(nn.Module):
    """Depthwise and pointwise convolution, each with batch normalization and activation; `DWConv` of Megvii."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, act: Activation) -> None:
        super().__init__()
        self.dconv = ConvNormAct(in_channels, in_channels, kernel_size, stride, act, groups=in_channels)
        self.pconv = ConvNormAct(in_channels, out_channels, 1, 1, act)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        outputs: Tensor = self.pconv(self.dconv(features))
        return outputs


class Bottleneck(nn.Module):
    """1x1 and 3x3 convolution, with an identity shortcut if requested."""

    def __init__(self, channels: int, shortcut: bool, spec: YOLOXSpec) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, channels, 1, 1, spec.act)
        self.conv2 = _make_conv3x3(channels, channels, 1, spec)
        self.shortcut = shortcut

    def forward(self, features: Tensor) -> Tensor:
        """Process features [B, channels, H, W]; the shape stays the same."""
        outputs: Tensor = self.conv2(self.conv1(features))
        return outputs + features if self.shortcut else outputs


class CSPLayer(nn.Module):
    """Cross-stage partial layer: half of the channels pass the bottlenecks (Wang et al. 2020)."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, shortcut: bool, spec: YOLOXSpec) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.conv1 = ConvNormAct(in_channels, hidden, 1, 1, spec.act)
        self.conv2 = ConvNormAct(in_channels, hidden, 1, 1, spec.act)
        self.conv3 = ConvNormAct(2 * hidden, out_channels, 1, 1, spec.act)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut, spec) for _ in range(num_blocks)))

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, in_channels, H, W] to [B, out_channels, H, W]."""
        processed, bypassed = self.conv1(features), self.conv2(features)
        outputs: Tensor = self.conv3(torch.cat([self.m(processed), bypassed], 1))
        return outputs


class SPPBottleneck(nn.Module):
    """Spatial pyramid pooling with windows of 5, 9 and 13 cells, computed as repeated pooling of 5 cells."""

    def __init__(self, channels: int, spec: YOLOXSpec) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, channels // 2, 1, 1, spec.act)
        self.conv2 = ConvNormAct(channels // 2 * 4, channels, 1, 1, spec.act)

    def forward(self, features: Tensor) -> Tensor:
        """Process features [B, channels, H, W]; the shape stays the same."""
        levels = [self.conv1(features)]
        for _ in range(3):
            levels.append(F.max_pool2d(levels[-1], 5, stride=1, padding=2))
        outputs: Tensor = self.conv2(torch.cat(levels, 1))
        return outputs


class CSPDarknet(nn.Module):
    """Backbone: features at strides 8, 16 and 32."""

    def __init__(self, spec: YOLOXSpec) -> None:
        super().__init__()
        num_blocks = max(round(spec.depth * 3), 1)
        c1, c2, c3, c4, c5, _ = spec.get_channels()
        self.stem = ConvNormAct(3, c1, 6, 2, spec.act)  # Focus: 2x2 cells to channels, then a 3x3 convolution
        self.dark2 = self._make_stage(c1, c2, num_blocks, spec)
        self.dark3 = self._make_stage(c2, c3, 3 * num_blocks, spec)
        self.dark4 = self._make_stage(c3, c4, 3 * num_blocks, spec)
        self.dark5 = nn.Sequential(
            _make_conv3x3(c4, c5, 2, spec),
            SPPBottleneck(c5, spec),
            CSPLayer(c5, c5, num_blocks, shortcut=False, spec=spec),
        )

    @staticmethod
    def _make_stage(in_channels: int, out_channels: int, num_blocks: int, spec: YOLOXSpec) -> nn.Sequential:
        return nn.Sequential(
            _make_conv3x3(in_channels, out_channels, 2, spec),
            CSPLayer(out_channels, out_channels, num_blocks, shortcut=True, spec=spec),
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features [B, C_i, H / s_i, W / s_i] of images [B, 3, H, W], fine to coarse."""
        level3 = self.dark3(self.dark2(self.stem(images)))
        level4 = self.dark4(level3)
        return [level3, level4, self.dark5(level4)]


class CSPPAFPN(nn.Module):
    """Neck: a top-down and a bottom-up path of `CSPLayer`."""

    def __init__(self, spec: YOLOXSpec) -> None:
        super().__init__()
        _, _, c3, c4, c5, _ = spec.get_channels()
        num_blocks = round(3 * spec.depth)
        self.lateral_conv0 = ConvNormAct(c5, c4, 1, 1, spec.act)
        self.C3_p4 = CSPLayer(2 * c4, c4, num_blocks, shortcut=False, spec=spec)
        self.reduce_conv1 = ConvNormAct(c4, c3, 1, 1, spec.act)
        self.C3_p3 = CSPLayer(2 * c3, c3, num_blocks, shortcut=False, spec=spec)
        self.bu_conv2 = _make_conv3x3(c3, c3, 2, spec)
        self.C3_n3 = CSPLayer(2 * c3, c4, num_blocks, shortcut=False, spec=spec)
        self.bu_conv1 = _make_conv3x3(c4, c4, 2, spec)
        self.C3_n4 = CSPLayer(2 * c4, c5, num_blocks, shortcut=False, spec=spec)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the output levels [B, C_i, H_i, W_i] of backbone features of the same shapes, fine to coarse."""
        level3, level4, level5 = features
        lateral5 = self.lateral_conv0(level5)
        lateral4 = self.reduce_conv1(self.C3_p4(torch.cat([_upsample(lateral5), level4], 1)))
        output3 = self.C3_p3(torch.cat([_upsample(lateral4), level3], 1))
        output4 = self.C3_n3(torch.cat([self.bu_conv2(output3), lateral4], 1))
        output5 = self.C3_n4(torch.cat([self.bu_conv1(output4), lateral5], 1))
        return [output3, output4, output5]


class YOLOXHead(nn.Module):
    """Decoupled head: class, box and objectness outputs with separate weights per level."""

    def __init__(self, spec: YOLOXSpec) -> None:
        super().__init__()
        _, _, *level_channels, width = spec.get_channels()
        self.stems = nn.ModuleList(ConvNormAct(channels, width, 1, 1, spec.act) for channels in level_channels)
        self.cls_convs = nn.ModuleList(_make_tower(width, spec) for _ in STRIDES)
        self.reg_convs = nn.ModuleList(_make_tower(width, spec) for _ in STRIDES)
        self.cls_preds = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in STRIDES)
        self.reg_preds = nn.ModuleList(nn.Conv2d(width, 4, 1) for _ in STRIDES)
        self.obj_preds = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in STRIDES)
        for conv in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(conv.bias, -torch.tensor(1 / PRIOR_PROB - 1).log().item())

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the outputs at all anchor points, fine level first, row by row.

        Args:
            features (sequence of Tensor[B, C_i, H_i, W_i]): Neck outputs.

        Returns:
            class_logits (Tensor[B, A]): float32.
            box_outputs (Tensor[B, A, 4]): float32, center relative to the cell corner and log sides, in strides.
            objectness (Tensor[B, A]): Logits, float32.
        """
        stems = (stem(maps) for stem, maps in zip(self.stems, features, strict=True))
        return _join_levels([self._forward_level(stem, stem, 0, level) for level, stem in enumerate(stems)])

    def forward_towers(
        self, features: Sequence[tuple[Tensor, Tensor]], num_convs: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the rest of the head on features inside its towers. See `BaseDetector.forward_towers`.

        Args:
            features (sequence of pairs of Tensor[B, C, H_i, W_i]): Classification and regression features per level.
            num_convs: Number of convolutions that the features have passed.

        Returns:
            Class logits, box outputs and objectness, as `forward` returns them.
        """
        return _join_levels(
            [self._forward_level(cls, box, num_convs, level) for level, (cls, box) in enumerate(features)]
        )

    def _forward_level(self, cls_features: Tensor, box_features: Tensor, num_convs: int, level: int) -> list[Tensor]:
        """Return class logits [B, 1, A], box outputs [B, 4, A] and objectness [B, 1, A] of one level."""
        # The order of the layers is that of Megvii's export: `yolox_weights` reads the weights of .onnx files in it.
        class_logits = self.cls_preds[level](_run_tower(self.cls_convs[level], cls_features, num_convs))
        tower = _run_tower(self.reg_convs[level], box_features, num_convs)
        # float32 from here on. bfloat16 is too coarse for box coordinates.
        maps_of_level = (class_logits, self.reg_preds[level](tower), self.obj_preds[level](tower))
        return [maps.float().flatten(2) for maps in maps_of_level]


def _join_levels(levels: Sequence[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    class_logits, box_outputs, objectness = (torch.cat(parts, 2) for parts in zip(*levels, strict=True))
    return class_logits[:, 0], box_outputs.transpose(1, 2), objectness[:, 0]


def _run_tower(tower: nn.Module, features: Tensor, num_convs: int) -> Tensor:
    """Run a tower on its input, or on the output of the normalization of convolution `num_convs`, [B, C, H, W]."""
    if not num_convs:
        outputs: Tensor = tower(features)
        return outputs
    blocks: list[Any] = list(tower.children())
    last = blocks[num_convs - 1]
    conv = last.pconv if isinstance(last, DepthwiseSeparableConv) else last
    features = conv.act(features.clone())  # the activation works in place
    for block in blocks[num_convs:]:
        features = block(features)
    return features


class YOLOX(DenseDetector):
    """YOLOX with one class. `predict` applies non-maximum suppression at an IoU of 0.6."""

    capabilities = BaseDetector.capabilities | {"towers"}
    spec_type = YOLOXSpec
    part_prefixes: ClassVar[dict[str, DetectorPart]] = {"backbone.": "backbone", "neck.": "neck"}

    spec: YOLOXSpec

    def __init__(self, spec: YOLOXSpec, changes: ModelChanges = NO_CHANGES) -> None:
        super().__init__()
        self.spec, self.changes = spec, changes
        self.backbone, self.neck, self.head = CSPDarknet(spec), CSPPAFPN(spec), YOLOXHead(spec)
        apply_changes(self, changes)

    def forward(self, images: Tensor) -> DenseOutputs:
        """Run the network on images [B, 3, H, W], RGB, 0 to 255. See `BaseDetector.forward`."""
        head_outputs = self.head(self.forward_features(images))
        points, strides = self.make_anchor_points(images)
        branch = _make_branch(head_outputs, points, strides)
        return DenseOutputs(branch, None, points, strides, (images.shape[-2], images.shape[-1]))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Return the neck outputs [B, C_i, H_i, W_i], fine to coarse, of images [B, 3, H, W], RGB, 0 to 255."""
        features: list[Tensor] = self.neck(self.backbone(images.float()))
        return features

    def make_anchor_points(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the anchor points [A, 2] and strides [A] for images of this size, input pixels."""
        return make_anchors((images.shape[-2], images.shape[-1]), STRIDES, images.device)

    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """Run the network and non-maximum suppression. See `BaseDetector.predict`."""
        branch = self(images).one2many
        return batched_nms(branch.boxes_xyxy, branch.logits.sigmoid(), max_det, IOU_THRESHOLD, PRE_NMS_TOPK)

    def postprocess(self, outputs: DenseOutputs, max_det: int = 100) -> DetectionBatch:
        """Select as `predict` does. See `BaseDetector.postprocess`."""
        branch = outputs.one2many
        boxes, scores = batched_nms(branch.boxes_xyxy, branch.logits.sigmoid(), max_det, IOU_THRESHOLD, PRE_NMS_TOPK)
        return DetectionBatch(
            tuple(image_boxes[image_scores > 0] for image_boxes, image_scores in zip(boxes, scores, strict=True)),
            tuple(image_scores[image_scores > 0] for image_scores in scores),
        )

    def predict_traceable(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """Run `predict` with `cluster_nms`. See `BaseDetector.predict_traceable`."""
        class_logits, box_outputs, objectness = self.head(self.forward_features(images))
        boxes = decode_boxes(box_outputs, *self.make_anchor_points(images))
        return cluster_nms(boxes, class_logits.sigmoid() * objectness.sigmoid(), max_det, IOU_THRESHOLD, PRE_NMS_TOPK)

    def feature_info(self) -> list[FeatureInfo]:
        """Return the output layers of the neck, fine to coarse."""
        names = ("neck.C3_p3", "neck.C3_n3", "neck.C3_n4")
        return [
            FeatureInfo(name, stride, channels)
            for name, stride, channels in zip(names, STRIDES, self.spec.get_channels()[2:5], strict=True)
        ]

    def tower_layers(self) -> list[TowerLayers]:
        """Return the last normalization of each block of the head towers. See `BaseDetector.tower_layers`."""
        return [
            TowerLayers(
                *(self._list_tower_norms(f"head.{tower}.{level}", stride) for tower in ("cls_convs", "reg_convs"))
            )
            for level, stride in enumerate(STRIDES)
        ]

    def _list_tower_norms(self, tower: str, stride: int) -> tuple[FeatureInfo, ...]:
        layers = []
        for name, block in self.get_submodule(tower).named_children():
            conv = f"{tower}.{name}.pconv" if isinstance(block, DepthwiseSeparableConv) else f"{tower}.{name}"
            norm: Any = self.get_submodule(f"{conv}.bn")
            layers.append(FeatureInfo(f"{conv}.bn", stride, norm.num_features))
        return tuple(layers)

    def forward_towers(
        self, features: Sequence[tuple[Tensor, Tensor]], num_convs: int, images: Tensor
    ) -> BranchOutputs:
        """Run the rest of the head. See `BaseDetector.forward_towers`."""
        return _make_branch(self.head.forward_towers(features, num_convs), *self.make_anchor_points(images))

    def prunable_layers(self) -> list[PrunableLayer]:
        """Return the convolutions whose output is not added to another one, without the outputs of the neck."""
        modules = dict(self.named_modules())
        return [_make_prunable_layer(modules, *chain) for chain in (*self._backbone_chains(), *self._head_chains())]

    def _backbone_chains(self) -> list["_Chain"]:
        """Return producers and consumers in backbone and neck."""
        chains: list[_Chain] = [("backbone.stem", ["backbone.dark2.0"])]
        chains += [(f"backbone.dark{n}.0", _list_csp_inputs(f"backbone.dark{n}.1")) for n in (2, 3, 4)]
        chains += [("backbone.dark2.1.conv3", ["backbone.dark3.0"])]
        # The channels of a lateral connection follow those of the path that they are concatenated to.
        chains += [("backbone.dark3.1.conv3", ["backbone.dark4.0"], _list_csp_inputs("neck.C3_p3"))]
        chains += [("backbone.dark4.1.conv3", ["backbone.dark5.0"], _list_csp_inputs("neck.C3_p4"))]
        chains += [("backbone.dark5.0", ["backbone.dark5.1.conv1"])]
        chains += [("backbone.dark5.1.conv1", ["backbone.dark5.1.conv2"], [], 4)]
        chains += [("backbone.dark5.1.conv2", _list_csp_inputs("backbone.dark5.2"))]
        chains += [("backbone.dark5.2.conv3", ["neck.lateral_conv0"]), ("neck.C3_p4.conv3", ["neck.reduce_conv1"])]
        chains += [("neck.lateral_conv0", _list_csp_inputs("neck.C3_p4"), _list_csp_inputs("neck.C3_n4"))]
        chains += [("neck.reduce_conv1", _list_csp_inputs("neck.C3_p3"), _list_csp_inputs("neck.C3_n3"))]
        chains += [("neck.bu_conv2", _list_csp_inputs("neck.C3_n3")), ("neck.bu_conv1", _list_csp_inputs("neck.C3_n4"))]
        for name, module in self.named_modules():
            if isinstance(module, Bottleneck):
                chains.append((f"{name}.conv1", [f"{name}.conv2"]))
            elif isinstance(module, CSPLayer):
                chains.append((f"{name}.conv2", [], [f"{name}.conv3"]))
                if not module.m[0].shortcut:
                    blocks = [f"{name}.m.{index}" for index in range(len(module.m))]
                    chains.append((f"{name}.conv1", [f"{blocks[0]}.conv1"]))
                    next_convs = [*(f"{block}.conv1" for block in blocks[1:]), f"{name}.conv3"]
                    chains += [(f"{block}.conv2", [conv]) for block, conv in zip(blocks, next_convs, strict=True)]
        return chains

    def _head_chains(self) -> list["_Chain"]:
        """Return producers and consumers in the head."""
        chains: list[_Chain] = []
        for level in range(len(STRIDES)):
            cls, reg = f"head.cls_convs.{level}", f"head.reg_convs.{level}"
            chains += [(f"head.stems.{level}", [f"{cls}.0", f"{reg}.0"])]
            chains += [(f"{cls}.0", [f"{cls}.1"]), (f"{reg}.0", [f"{reg}.1"])]
            chains += [(f"{cls}.1", [f"head.cls_preds.{level}"])]
            chains += [(f"{reg}.1", [f"head.reg_preds.{level}", f"head.obj_preds.{level}"])]
        return chains


# Producer, consumers that read its channels first, consumers that read them last, copies of the channels.
_Chain = tuple[str, list[str]] | tuple[str, list[str], list[str]] | tuple[str, list[str], list[str], int]


def _list_csp_inputs(csp_layer: str) -> list[str]:
    return [f"{csp_layer}.conv1", f"{csp_layer}.conv2"]


def _make_prunable_layer(
    modules: dict[str, nn.Module], producer: str, first: Sequence[str], last: Sequence[str] = (), num_copies: int = 1
) -> PrunableLayer:
    """Return the last convolution of a block as prunable layer, with the blocks that read its output."""
    conv = f"{producer}.pconv" if isinstance(modules[producer], DepthwiseSeparableConv) else producer
    depthwise = [
        DepthwiseLayer(
            f"{name}.dconv.conv", f"{name}.dconv.bn", f"{name}.dconv.act", f"{name}.pconv.conv", f"{name}.pconv.bn"
        )
        for name in first
        if isinstance(modules[name], DepthwiseSeparableConv)
    ]
    last_inputs = [_get_first_dense_conv(modules, name) for name in last]
    return PrunableLayer(
        f"{conv}.conv",
        (f"{conv}.bn",),
        (*(_get_first_dense_conv(modules, name) for name in first), *last_inputs),
        tuple(depthwise),
        frozenset(last_inputs),
        num_copies,
    )


def _get_first_dense_conv(modules: dict[str, nn.Module], block: str) -> str:
    if isinstance(modules[block], nn.Conv2d):
        return block
    return f"{block}.pconv.conv" if isinstance(modules[block], DepthwiseSeparableConv) else f"{block}.conv"


def _make_branch(head_outputs: tuple[Tensor, Tensor, Tensor], points: Tensor, strides: Tensor) -> BranchOutputs:
    class_logits, box_outputs, objectness = head_outputs
    # The score is the product of both sigmoids: 1 / p - 1 = exp(-c) + exp(-o) + exp(-c - o).
    logits = -torch.stack([-class_logits, -objectness, -class_logits - objectness]).logsumexp(0)
    return BranchOutputs(logits, decode_boxes(box_outputs, points, strides))


def decode_boxes(box_outputs: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    """Convert box outputs to boxes.

    Args:
        box_outputs (Tensor[B, A, 4]): Center relative to the cell corner and logarithm of the sides, in strides.
        anchor_points (Tensor[A, 2]): Cell centers, input pixels.
        strides (Tensor[A]): Input pixels.

    Returns:
        boxes (Tensor[B, A, 4]): xyxy, input pixels.
    """
    centers = (box_outputs[..., :2] - 0.5) * strides[:, None] + anchor_points
    half_sides = box_outputs[..., 2:].clamp(max=MAX_BOX_LOGIT).exp() * (strides[:, None] / 2)
    return torch.cat([centers - half_sides, centers + half_sides], -1)


def _make_conv3x3(in_channels: int, out_channels: int, stride: int, spec: YOLOXSpec) -> nn.Module:
    if spec.depthwise:
        return DepthwiseSeparableConv(in_channels, out_channels, 3, stride, spec.act)
    return ConvNormAct(in_channels, out_channels, 3, stride, spec.act)


def _make_tower(channels: int, spec: YOLOXSpec) -> nn.Sequential:
    return nn.Sequential(*(_make_conv3x3(channels, channels, 1, spec) for _ in range(2)))


def _make_activation(act: Activation) -> nn.Module:
    match act:
        case "silu":
            return nn.SiLU(inplace=True)
        case "hardswish":
            return nn.Hardswish(inplace=True)
        case "relu":
            return nn.ReLU(inplace=True)


def _upsample(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2.0, mode="nearest")
