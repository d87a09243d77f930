"""Backbones from timm: any model with `features_only`, its pretrained weights and their normalization."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hkd_det.errors import DataError, UnavailableError, UsageError

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
