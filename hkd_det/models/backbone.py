"""Backbone: a picture in, feature maps at rising strides out. Any timm model with `features_only`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hkd_det.errors import DataError, UnavailableError, UsageError


class Backbone(nn.Module):
    """A timm feature extractor that returns the maps at `strides`.

    channels: widths of those maps, in the order of `strides`.
    """

    def __init__(self, name: str, strides: Sequence[int], model_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = timm.list_models(f"*{name}*")[:5]
            raise UsageError(f"backbone {name!r} is not a timm model; names like it: {', '.join(near) or 'none'}")
        try:
            every = timm.create_model(name, features_only=True, **(model_kwargs or {}))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UsageError(f"backbone {name!r} gives no feature pyramid: {error}") from error
        reductions = [int(reduction) for reduction in every.feature_info.reduction()]
        missing = [stride for stride in strides if stride not in reductions]
        if missing:
            raise UsageError(f"backbone {name!r} has maps at strides {reductions}, none at {missing}")
        indices = tuple(reductions.index(stride) for stride in strides)
        self.body = timm.create_model(name, features_only=True, out_indices=indices, **(model_kwargs or {}))
        self.channels = [int(width) for width in self.body.feature_info.channels()]

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] normalised pictures to one [B, C_i, H / s_i, W / s_i] map a stride."""
        maps: list[Tensor] = self.body(images)
        return maps


def load_pretrained(backbone: Backbone, name: str, source: str) -> None:
    """Fill the backbone with ImageNet weights: `source` is "imagenet" (timm's model hub) or a local file.

    A local file is a .safetensors or .pth state dictionary under timm's or torchvision's names; the
    classifier's weights are left out. Raises UnavailableError if the hub does not answer, DataError if
    the file does not fit this backbone.
    """
    weights = _download_weights(name) if source == "imagenet" else _read_weights(Path(source))
    wanted = backbone.body.state_dict()
    fitting = {key: weights[key] for key in wanted if key in weights and weights[key].shape == wanted[key].shape}
    if len(fitting) < len(wanted):
        lost = next(key for key in wanted if key not in fitting)
        raise DataError(
            f"--pretrained {source}: fits {len(fitting)} of {len(wanted)} tensors of backbone {name} "
            f"(first missing: {lost}); give weights of that very backbone"
        )
    backbone.body.load_state_dict(fitting)


def _download_weights(name: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        raise UnavailableError(
            f"--pretrained imagenet: the weights of {name} can't be fetched ({type(error).__name__}); "
            "fetch them elsewhere and give the file: --pretrained weights.safetensors"
        ) from error
    return weights


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"--pretrained {path}: no such file (or say 'imagenet' to fetch them)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415 - only this form of file needs it

            return load_file(path)
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # either library raises many kinds
        raise DataError(f"--pretrained {path}: not a weights file ({type(error).__name__})") from error
    return weights
