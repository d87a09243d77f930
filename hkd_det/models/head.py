"""Head: at every point of the pyramid, is a person centred here, and where are the four sides?

Decoupled (YOLOX) and shared between levels, each level with its own normalisation (RTMDet). Scores come in
two branches (YOLOv10): `many` learns from several points a person and shapes the features; `one` learns from
a single point a person, so that few answer twice and people who overlap both stay. `one` is `many` plus a learnt
correction that only has to silence the neighbours of the best point; its gradient stays out of all it
stands on. Sides are distributions over distances (GFL).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hkd_det.models.surgery import Inner

PRIOR = 0.01  # the share of points that hold a person, about: where the scores start (RetinaNet)


@dataclass(frozen=True, eq=False)
class RawMaps:
    """What the head says at A points, the levels' points in a row from fine to coarse.

    many, one: [B, A] score logits of the two branches.
    sides: [B, A, 4, bins] logits of the distances left, up, right, down, in strides.
    """

    many: Tensor
    one: Tensor
    sides: Tensor


class Tower(nn.Module):
    """`depth` 3x3 convolutions shared by all levels, with a normalisation of its own for each level."""

    def __init__(self, channels: int, depth: int, levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth)) for _ in range(levels))

    def forward(self, features: Tensor, level: int) -> Tensor:
        """[B, channels, H, W] of one level, the same shape out."""
        norms: nn.ModuleList = self.norms[level]  # type: ignore[assignment]
        for conv, norm in zip(self.convs, norms, strict=True):
            features = torch.relu(norm(conv(features)))
        return features


class Head(nn.Module):
    """Scores and side distributions for every point of a pyramid of `levels` maps."""

    def __init__(self, channels: int, depth: int, levels: int, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.tower_scores = Tower(channels, depth, levels)
        self.tower_one = Tower(channels, depth, levels)
        self.tower_sides = Tower(channels, depth, levels)
        self.many = nn.Conv2d(channels, 1, 1)
        self.one = nn.Conv2d(channels, 1, 1)
        self.sides = nn.Conv2d(channels, 4 * bins, 1)
        nn.init.constant_(self.many.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
        nn.init.zeros_(self.one.weight)
        nn.init.zeros_(self.one.bias)  # type: ignore[arg-type]

    def forward(self, pyramid: Sequence[Tensor]) -> RawMaps:
        """One [B, channels, H_i, W_i] map a level to the raw maps of all their points."""
        levels = [self._level(features, level) for level, features in enumerate(pyramid)]
        many, one, sides = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        return RawMaps(many, one, sides)

    def _level(self, features: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.tower_scores(features, level)
        many = self.many(scores)
        one = many.detach() + self.one(self.tower_one(scores.detach(), level))
        # Scores and sides leave here as float32: box arithmetic must not run in bfloat16.
        return many.float().flatten(1), one.float().flatten(1), self._sides(features, level)

    def _sides(self, features: Tensor, level: int) -> Tensor:
        logits = self.sides(self.tower_sides(features, level)).float()
        # Channels last all the way: processors compute convolutions so, and turning 64 channels takes as long as one.
        return logits.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (4, self.bins))


def head_inner_layers(head: Head, name: str) -> list[Inner]:
    """All convolutions of the towers of a head that bears this name in its detector."""
    readers = {
        "tower_scores": (f"{name}.many", f"{name}.tower_one.convs.0"),
        "tower_one": (f"{name}.one",),
        "tower_sides": (f"{name}.sides",),
    }
    layers = []
    for tower, last in readers.items():
        inside = f"{name}.{tower}"
        levels, depth = len(getattr(head, tower).norms), len(getattr(head, tower).convs)
        for index in range(depth):
            norms = tuple(f"{inside}.norms.{level}.{index}" for level in range(levels))
            readers_here = (f"{inside}.convs.{index + 1}",) if index + 1 < depth else last
            layers.append(Inner(f"{inside}.convs.{index}", norms, readers_here))
    return layers
