"""Backbones: any timm model with `features_only`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hkd_det.errors import DataError, UnavailableError, UsageError

MEAN_RGB = (123.675, 116.28, 103.53)  # of ImageNet, 0 to 255
STD_RGB = (58.395, 57.12, 57.375)


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
            dictionary with the names of timm or torchvision.

    Raises:
        UnavailableError: If the weights cannot be downloaded.
        DataError: If the file is not readable or does not fit the backbone.
    """
    weights = _download_weights(name) if source == "imagenet" else _read_weights(Path(source))
    expected = backbone.body.state_dict()
    fitting = {key: weights[key] for key in expected if key in weights and weights[key].shape == expected[key].shape}
    if len(fitting) < len(expected):
        missing = next(key for key in expected if key not in fitting)
        raise DataError(
            f"--pretrained {source}: fits {len(fitting)} of {len(expected)} tensors of backbone {name} "
            f"(first missing: {missing}). Provide weights of exactly this backbone."
        )
    backbone.body.load_state_dict(fitting)


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
