"""Dense detectors, and the project's own family: a one-stage, anchor-free detector with one class, person.

The neck is a feature pyramid (Lin et al. 2017) followed by a bottom-up path (PANet, Liu et al. 2018).
Backbones are models of timm with `features_only`, with their pretrained weights and normalization.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.models.base import (
    BaseDetector,
    BranchOutputs,
    DenseOutputs,
    DetectionBatch,
    DetectorPart,
    FeatureInfo,
    ModelSpec,
    Targets,
    TowerLayers,
)
from hkd_det.models.criterion import CRITERION, dense_soft_label_losses
from hkd_det.models.head import Head, HeadOutputs, dist2bbox, find_tower_layers, make_anchors
from hkd_det.models.surgery import (
    NO_CHANGES,
    ModelChanges,
    PrunableLayer,
    apply_changes,
    filter_dense_convs,
    find_residual_layers,
)
from hkd_det.ops.boxes import peak_nms, suppress_duplicates
from hkd_det.ops.losses import ReduceMean, clamp_min_one

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Layers of a block: EfficientNet-PyTorch -> timm.
EFFICIENTNET_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
EFFICIENTNET_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def get_normalization(name: str) -> dict[str, Tensor]:
    """Return the input normalization that the pretrained weights of a timm model expect.

    Args:
        name: Name of the model.

    Returns:
        `mean` and `std`, Tensor[1, 3, 1, 1], for RGB images of 0 to 255. Those of ImageNet if timm knows no others.
    """
    config = timm.get_pretrained_cfg(name)
    mean, std = (config.mean, config.std) if config is not None else (IMAGENET_MEAN, IMAGENET_STD)
    return {key: 255 * torch.tensor(values).view(1, 3, 1, 1) for key, values in (("mean", mean), ("std", std))}


class Backbone(nn.Module):
    """A timm feature extractor that returns the feature maps at given strides.

    Args:
        name: Name of a timm model.
        strides: Strides of the returned feature maps, fine to coarse.
        model_kwargs: Arguments of `timm.create_model`.

    Attributes:
        channels: Channels of the returned feature maps.

    Raises:
        UsageError: If the model is unknown or has no feature map at one of the strides.
    """

    def __init__(self, name: str, strides: Sequence[int], model_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__()
        if not timm.is_model(name):
            similar = timm.list_models(f"*{name}*")[:5]
            raise UsageError(f"--backbone {name}: not a timm model. Similar names: {', '.join(similar) or 'none'}.")
        try:
            probe = timm.create_model(name, features_only=True, **(model_kwargs or {}))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UsageError(
                f"--backbone {name}: the model cannot return feature maps ({error}). Choose another timm model."
            ) from error
        reductions = [int(reduction) for reduction in probe.feature_info.reduction()]
        missing = [stride for stride in strides if stride not in reductions]
        if missing:
            raise UsageError(
                f"--backbone {name}: expected feature maps at strides {list(strides)}, got {reductions}. "
                "Choose another timm model."
            )
        indices = tuple(reductions.index(stride) for stride in strides)
        self.body = timm.create_model(name, features_only=True, out_indices=indices, **(model_kwargs or {}))
        self.channels = [int(width) for width in self.body.feature_info.channels()]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps.

        Args:
            images (Tensor[B, 3, H, W]): Normalized RGB images.

        Returns:
            features (list of Tensor[B, C_i, H / s_i, W / s_i]): One per stride.
        """
        features: list[Tensor] = self.body(images)
        return features


def load_backbone_weights(backbone: Backbone, name: str, source: str) -> None:
    """Load pretrained weights into a backbone. Weights of the classifier are dropped.

    Args:
        backbone: Backbone to fill.
        name: Its timm name.
        source: "imagenet" to download the weights that timm provides, or the path of a local .safetensors or .pth state
            dictionary with the names of timm, torchvision or, for EfficientNet, of lukemelas/EfficientNet-PyTorch.

    Raises:
        UnavailableError: If the weights cannot be downloaded.
        DataError: If the file is not readable or does not fit the backbone.
    """
    weights = _download_weights(name) if source == "imagenet" else _read_weights(Path(source))
    expected = backbone.body.state_dict()
    if "_conv_stem.weight" in weights:
        weights = _rename_efficientnet(weights, list(expected))
    fitting = {key: weights[key] for key in expected if key in weights and weights[key].shape == expected[key].shape}
    if len(fitting) < len(expected):
        missing = next(key for key in expected if key not in fitting)
        raise DataError(
            f"--pretrained {source}: fits {len(fitting)} of {len(expected)} tensors of backbone {name} "
            f"(first missing: {missing}). Provide weights of exactly this backbone."
        )
    backbone.body.load_state_dict(fitting)


def freeze_batch_norm(model: nn.Module) -> None:
    """Freeze all batch normalizations of a model: running statistics, weights and biases no longer change."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)


def _download_weights(name: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        raise UnavailableError(
            f"--pretrained imagenet: the weights of {name} cannot be downloaded ({type(error).__name__}). "
            "Download them elsewhere and set --pretrained to the file."
        ) from error
    return weights


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"--pretrained {path}: no such file. Set a file, or 'imagenet' to download the weights.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415 - only this file format needs it

            return load_file(path)
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many types
        raise DataError(
            f"--pretrained {path}: not a weights file, or damaged. Provide a .safetensors or .pth state dictionary."
        ) from error
    return weights


def _rename_efficientnet(weights: dict[str, Tensor], expected: Sequence[str]) -> dict[str, Tensor]:
    """Rename the weights of EfficientNet-PyTorch, which numbers all blocks, to timm's names, which number stages."""
    blocks = list(dict.fromkeys(match[0] for name in expected if (match := re.match(r"blocks\.\d+\.\d+", name))))
    renamed = {}
    for name, value in weights.items():
        part, _, key = name.rpartition(".")
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)", part):
            index, layer = int(match[1]), match[2]
            has_expansion = f"_blocks.{index}._expand_conv.weight" in weights
            layers = EFFICIENTNET_BLOCK if has_expansion else EFFICIENTNET_FIRST_BLOCK
            if index < len(blocks) and layer in layers:
                renamed[f"{blocks[index]}.{layers[layer]}.{key}"] = value
        elif part in ("_conv_stem", "_bn0"):
            renamed[f"{'conv_stem' if part == '_conv_stem' else 'bn1'}.{key}"] = value
    return renamed


class DenseDetector(BaseDetector):
    """Base class of the families whose `forward` returns `DenseOutputs`: they share losses and raw outputs."""

    def loss(
        self, outputs: DenseOutputs, targets: Targets, reduce_mean: ReduceMean = clamp_min_one
    ) -> dict[str, Tensor]:
        """Compute the losses of `DetectionCriterion`. See `BaseDetector.loss`."""
        return CRITERION(outputs, targets, reduce_mean)

    def soft_label_loss(
        self,
        outputs: DenseOutputs,
        detections: DetectionBatch,
        targets: Targets,
        reduce_mean: ReduceMean = clamp_min_one,
        background_weight: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Compute `dense_soft_label_losses`. See `BaseDetector.soft_label_loss`."""
        return dense_soft_label_losses(outputs, detections, targets, reduce_mean, background_weight)

    def raw_outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes and logits of the branch that `predict` uses. See `BaseDetector.raw_outputs`."""
        outputs: DenseOutputs = self(images)
        branch = outputs.one2one or outputs.one2many
        return branch.boxes_xyxy, branch.logits


def make_conv_norm_act(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Build convolution, batch normalization and ReLU. Stride 1 keeps the size, stride 2 halves it."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class PAFPN(nn.Module):
    """Path aggregation feature pyramid: a top-down and a bottom-up path with one width on all levels.

    Args:
        in_channels: Channels of the backbone levels, fine to coarse.
        out_channels: Channels of all output levels.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(make_conv_norm_act(width, out_channels, kernel_size=1) for width in in_channels)
        self.downs = nn.ModuleList(make_conv_norm_act(out_channels, out_channels, stride=2) for _ in in_channels[1:])
        self.outputs = nn.ModuleList(make_conv_norm_act(out_channels, out_channels) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute the output levels.

        Args:
            features (sequence of Tensor[B, C_i, H_i, W_i]): Fine to coarse, each half the size of the one before.

        Returns:
            levels (list of Tensor[B, out_channels, H_i, W_i]): Fine to coarse.
        """
        levels = [lateral(level) for lateral, level in zip(self.laterals, features, strict=True)]
        for fine in range(len(levels) - 2, -1, -1):
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], scale_factor=2.0, mode="nearest")
        outputs = [self.outputs[0](levels[0])]
        for level, down, output in zip(levels[1:], self.downs, self.outputs[1:], strict=True):
            outputs.append(output(level + down(outputs[-1])))
        return outputs


@dataclass(frozen=True)
class HKDDetectorSpec(ModelSpec):
    """Architecture of an `HKDDetector`.

    Attributes:
        backbone: Name of a timm model.
        backbone_kwargs: Arguments of `timm.create_model`.
        strides: Strides of the pyramid levels, fine to coarse, each twice the one before.
        channels: Channels of neck and head.
        head_depth: Number of 3x3 convolutions per head tower.
        reg_max: Number of distance bins, 0 to reg_max - 1 strides. The largest box side is 2 * (reg_max - 1) times the
            coarsest stride.
    """

    backbone: str
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    strides: tuple[int, ...] = (8, 16, 32)
    channels: int = 96
    head_depth: int = 2
    reg_max: int = 16


class HKDDetector(DenseDetector):
    """Backbone from timm, `PAFPN` neck, and a head with a one-to-many and a one-to-one branch."""

    capabilities = BaseDetector.capabilities | {"towers"}
    spec_type = HKDDetectorSpec
    part_prefixes: ClassVar[dict[str, DetectorPart]] = {"backbone.": "backbone", "neck.": "neck"}

    spec: HKDDetectorSpec
    mean: Tensor
    std: Tensor

    def __init__(self, spec: HKDDetectorSpec, changes: ModelChanges = NO_CHANGES) -> None:
        super().__init__()
        self.spec, self.changes = spec, changes
        self.backbone = Backbone(spec.backbone, spec.strides, spec.backbone_kwargs)
        self.neck = PAFPN(self.backbone.channels, spec.channels)
        self.head = Head(spec.channels, spec.head_depth, len(spec.strides), spec.reg_max)
        for name, values in get_normalization(spec.backbone).items():
            self.register_buffer(name, values, persistent=False)
        apply_changes(self, changes)

    def forward(self, images: Tensor) -> DenseOutputs:
        """Run the network on images [B, 3, H, W], RGB, 0 to 255. See `BaseDetector.forward`."""
        raw: HeadOutputs = self.head(self.forward_features(images))
        points, strides = self.make_anchor_points(images)
        boxes = dist2bbox(raw.box_logits, points, strides)
        return DenseOutputs(
            one2many=BranchOutputs(raw.one2many, boxes, raw.box_logits),
            one2one=BranchOutputs(raw.one2one, boxes, has_box_loss=False),
            anchor_points=points,
            strides=strides,
            input_hw=(images.shape[-2], images.shape[-1]),
        )

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Return the neck outputs [B, channels, H_i, W_i], fine to coarse, of images [B, 3, H, W], RGB, 0 to 255."""
        features: list[Tensor] = self.neck(self.backbone((images.float() - self.mean) / self.std))
        return features

    def make_anchor_points(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the anchor points [A, 2] and strides [A] for images of this size, input pixels."""
        height, width = images.shape[-2:]
        return make_anchors((height, width), self.spec.strides, images.device)

    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """Select the score peaks of the one-to-one branch and suppress duplicates. See `BaseDetector.predict`.

        K is the number of anchor points if that is smaller than `max_det`. Shapes do not depend on values.
        """
        raw: HeadOutputs = self.head(self.forward_features(images))
        points, strides = self.make_anchor_points(images)
        peaks = peak_nms(raw.one2one, (images.shape[-2], images.shape[-1]), self.spec.strides)
        best, index = peaks.topk(min(max_det, peaks.shape[1]))  # [B, K]
        # Decode the boxes of the selected points only.
        box_logits = raw.box_logits.gather(1, index[..., None, None].expand(-1, -1, *raw.box_logits.shape[2:]))
        return suppress_duplicates(dist2bbox(box_logits, points[index], strides[index]), best)

    def postprocess(self, outputs: DenseOutputs, max_det: int = 100) -> DetectionBatch:
        """Select the score peaks of the one-to-one branch and suppress duplicates. See `BaseDetector.postprocess`."""
        assert outputs.one2one is not None
        logits, index = peak_nms(outputs.one2one.logits, outputs.input_hw, self.spec.strides).topk(
            min(max_det, outputs.one2one.logits.shape[1])
        )
        boxes = outputs.one2one.boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
        boxes, scores = suppress_duplicates(boxes, logits)
        return DetectionBatch(tuple(boxes), tuple(scores))

    def feature_info(self) -> list[FeatureInfo]:
        """Return the output layers of the neck, fine to coarse."""
        return [
            FeatureInfo(f"neck.outputs.{level}", stride, self.spec.channels)
            for level, stride in enumerate(self.spec.strides)
        ]

    def tower_layers(self) -> list[TowerLayers]:
        """Return the normalizations of the head towers. See `BaseDetector.tower_layers`."""
        return [
            TowerLayers(*(self._list_tower_norms(tower, level, stride) for tower in ("cls_tower", "reg_tower")))
            for level, stride in enumerate(self.spec.strides)
        ]

    def _list_tower_norms(self, tower: str, level: int, stride: int) -> tuple[FeatureInfo, ...]:
        prefix = f"head.{tower}.norms.{level}"
        norms: Any = self.get_submodule(prefix)
        return tuple(FeatureInfo(f"{prefix}.{index}", stride, norm.num_features) for index, norm in enumerate(norms))

    def forward_towers(
        self, features: Sequence[tuple[Tensor, Tensor]], num_convs: int, images: Tensor
    ) -> BranchOutputs:
        """Run the rest of the head; all levels share the convolutions. See `BaseDetector.forward_towers`."""
        logits, box_logits = self.head.forward_towers(features, num_convs)
        return BranchOutputs(logits, dist2bbox(box_logits, *self.make_anchor_points(images)), box_logits)

    def prunable_layers(self) -> list[PrunableLayer]:
        """Return the inner layers of the residual blocks of the backbone and the layers of the head towers."""
        return [*find_residual_layers(self), *filter_dense_convs(self, find_tower_layers(self.head, "head"))]

    def load_pretrained(self, source: str) -> None:
        """Load pretrained backbone weights. See `BaseDetector.load_pretrained`."""
        load_backbone_weights(self.backbone, self.spec.backbone, source)
