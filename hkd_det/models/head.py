"""Head: at every point of the pyramid, is a person centred here, and where are the four sides?

Decoupled (YOLOX) and shared between levels, each level with its own normalisation (RTMDet). Scores come in
two branches (YOLOv10): `many` learns from several points a person and shapes the features; `one` learns from
a single point a person, so that few answer twice and people who overlap both stay. `one` is `many` plus a learnt
correction that only has to silence the neighbours of the best point; its gradient stays out of all it
stands on. Sides are distributions over distances (GFL).

Anchor points: the centres of the pyramid's cells, and boxes as distances from them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hkd_det.models.surgery import PrunableLayer

PRIOR_PROB = 0.01  # the share of points that hold a person, about: where the scores start (RetinaNet)


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """What the head says at A points, the levels' points in a row from fine to coarse.

    many, one: [B, A] score logits of the two branches.
    sides: [B, A, 4, bins] logits of the distances left, up, right, down, in strides.
    """

    one2many: Tensor
    one2one: Tensor
    box_logits: Tensor


class ConvTower(nn.Module):
    """`depth` 3x3 convolutions shared by all levels, with a normalisation of its own for each level."""

    def __init__(self, channels: int, depth: int, num_levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth)) for _ in range(num_levels)
        )

    def forward(self, features: Tensor, level: int) -> Tensor:
        """[B, channels, H, W] of one level, the same shape out."""
        norms: nn.ModuleList = self.norms[level]  # type: ignore[assignment]
        for conv, norm in zip(self.convs, norms, strict=True):
            features = torch.relu(norm(conv(features)))
        return features


class Head(nn.Module):
    """Scores and side distributions for every point of a pyramid of `levels` maps."""

    def __init__(self, channels: int, depth: int, num_levels: int, reg_max: int) -> None:
        super().__init__()
        self.reg_max = reg_max
        self.cls_tower = ConvTower(channels, depth, num_levels)
        self.one2one_tower = ConvTower(channels, depth, num_levels)
        self.reg_tower = ConvTower(channels, depth, num_levels)
        self.one2many = nn.Conv2d(channels, 1, 1)
        self.one2one = nn.Conv2d(channels, 1, 1)
        self.box_logits = nn.Conv2d(channels, 4 * reg_max, 1)
        nn.init.constant_(self.one2many.bias, -math.log((1 - PRIOR_PROB) / PRIOR_PROB))  # type: ignore[arg-type]
        nn.init.zeros_(self.one2one.weight)
        nn.init.zeros_(self.one2one.bias)  # type: ignore[arg-type]

    def forward(self, feature_maps: Sequence[Tensor]) -> HeadOutputs:
        """One [B, channels, H_i, W_i] map a level to the raw maps of all their points."""
        levels = [self._forward_level(features, level) for level, features in enumerate(feature_maps)]
        many, one, sides = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        return HeadOutputs(many, one, sides)

    def _forward_level(self, features: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.cls_tower(features, level)
        many = self.one2many(scores)
        one = many.detach() + self.one2one(self.one2one_tower(scores.detach(), level))
        # Scores and sides leave here as float32: box arithmetic must not run in bfloat16.
        return many.float().flatten(1), one.float().flatten(1), self._forward_box_logits(features, level)

    def _forward_box_logits(self, features: Tensor, level: int) -> Tensor:
        logits = self.box_logits(self.reg_tower(features, level)).float()
        # Channels last all the way: processors compute convolutions so, and turning 64 channels takes as long as one.
        return logits.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (4, self.reg_max))


def find_tower_layers(head: Head, name: str) -> list[PrunableLayer]:
    """All convolutions of the towers of a head that bears this name in its detector."""
    readers = {
        "cls_tower": (f"{name}.one2many", f"{name}.one2one_tower.convs.0"),
        "one2one_tower": (f"{name}.one2one",),
        "reg_tower": (f"{name}.box_logits",),
    }
    layers = []
    for tower, last in readers.items():
        inside = f"{name}.{tower}"
        levels, depth = len(getattr(head, tower).norms), len(getattr(head, tower).convs)
        for index in range(depth):
            norms = tuple(f"{inside}.norms.{level}.{index}" for level in range(levels))
            readers_here = (f"{inside}.convs.{index + 1}",) if index + 1 < depth else last
            layers.append(PrunableLayer(f"{inside}.convs.{index}", norms, readers_here))
    return layers


def make_anchors(
    input_hw: tuple[int, int], strides: Sequence[int], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Centres [A, 2] (x, y) in input pixels and strides [A] of all cells, fine level first, row by row."""
    points, steps = [], []
    for stride in strides:
        rows = torch.arange(input_hw[0] // stride, device=device)
        columns = torch.arange(input_hw[1] // stride, device=device)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points.append((torch.stack([x, y], -1).reshape(-1, 2).float() + 0.5) * stride)
        # shape[0], not len(), stays free when exported.
        steps.append(torch.full((points[-1].shape[0],), float(stride), device=device))
    return torch.cat(points), torch.cat(steps)


def dist2bbox(box_logits: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    """Side distributions [B, A, 4, bins] at points [A, 2] to boxes [B, A, 4] xyxy in input pixels.

    The distance is the distribution's mean (GFL, Li et al. 2020, eq. 5) times the point's stride.
    """
    bins = torch.arange(box_logits.shape[-1], device=box_logits.device, dtype=box_logits.dtype)
    distances = (box_logits.softmax(-1) * bins).sum(-1) * strides[..., None]  # [B, A, 4]
    return torch.cat([anchor_points - distances[..., :2], anchor_points + distances[..., 2:]], -1)


def bbox2dist(boxes_xyxy: Tensor, anchor_points: Tensor, strides: Tensor, reg_max: int) -> Tensor:
    """Boxes [..., 4] to the distances [..., 4] of their sides from the points, in strides, 0 .. bins - 1.01."""
    left_up = anchor_points - boxes_xyxy[..., :2]
    right_down = boxes_xyxy[..., 2:] - anchor_points
    return (torch.cat([left_up, right_down], -1) / strides[..., None]).clamp(0, reg_max - 1.01)
