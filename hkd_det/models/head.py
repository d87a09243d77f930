"""The head of `HKDDetector`: scores and distance distributions at every anchor point, and their conversion to boxes.

The head is decoupled (YOLOX) and shared by all levels, with separate normalizations per level (RTMDet). Scores have two
branches (YOLOv10). `one2many` is trained with several anchor points per box, and its gradient trains the backbone.
`one2one` is trained with one anchor point per box, so that duplicates are rare and overlapping persons are kept. It is
`one2many` plus a learned correction that suppresses the neighbors of the best point. Its gradient reaches neither
`one2many` nor the features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hkd_det.models.surgery import PrunableLayer

PRIOR_PROB = 0.01  # initial score, about the ratio of anchor points on persons (RetinaNet)
# Initial distances left, up, right, down, in strides: a person of eight cells, with CityPersons' aspect ratio of 0.41.
# With equal distances, short trainings end with more misses (benchmarks/results/distillation_trials.md).
PRIOR_DISTANCES = (1.6, 4.0, 1.6, 4.0)
PRIOR_STD = 1.5  # standard deviation of the initial distributions, strides


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """Head outputs at all anchor points, fine level first, row by row.

    Attributes:
        one2many (Tensor[B, A]): Score logits of the one-to-many branch.
        one2one (Tensor[B, A]): Score logits of the one-to-one branch.
        box_logits (Tensor[B, A, 4, reg_max]): Logits of the distances left, up, right, down, in strides.
    """

    one2many: Tensor
    one2one: Tensor
    box_logits: Tensor


class ConvTower(nn.Module):
    """A stack of 3x3 convolutions that all levels share, each with one batch normalization per level.

    Args:
        channels: Number of channels.
        depth: Number of convolutions.
        num_levels: Number of feature levels.
    """

    def __init__(self, channels: int, depth: int, num_levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth)) for _ in range(num_levels)
        )

    def forward(self, features: Tensor, level: int) -> Tensor:
        """Process the features [B, channels, H, W] of one level; the shape stays the same."""
        return self._run_convs(features, level, 0)

    def forward_rest(self, features: Tensor, level: int, num_convs: int) -> Tensor:
        """Process the output [B, C, H, W] of normalization `num_convs` of a level; returns [B, channels, H, W]."""
        return self._run_convs(torch.relu(features), level, num_convs)

    def _run_convs(self, features: Tensor, level: int, first: int) -> Tensor:
        norms: nn.ModuleList = self.norms[level]  # type: ignore[assignment]  # typed as Module by torch
        for conv, norm in zip(self.convs[first:], norms[first:], strict=True):
            features = torch.relu(norm(conv(features)))
        return features


class Head(nn.Module):
    """Predicts scores and distance distributions from feature levels.

    Args:
        channels: Channels of the levels.
        depth: Number of convolutions per tower.
        num_levels: Number of levels.
        reg_max: Number of distance bins.
    """

    def __init__(self, channels: int, depth: int, num_levels: int, reg_max: int) -> None:
        super().__init__()
        self.reg_max = reg_max
        self.cls_tower = ConvTower(channels, depth, num_levels)
        self.one2one_tower = ConvTower(channels, depth, num_levels)
        self.reg_tower = ConvTower(channels, depth, num_levels)
        self.one2many = nn.Conv2d(channels, 1, 1)
        self.one2one = nn.Conv2d(channels, 1, 1)
        self.box_logits = nn.Conv2d(channels, 4 * reg_max, 1)
        prior_logit = -math.log((1 - PRIOR_PROB) / PRIOR_PROB)
        nn.init.constant_(self.one2many.bias, prior_logit)  # type: ignore[arg-type]  # the bias is not None
        self.box_logits.bias = nn.Parameter(make_prior_box_logits(reg_max))
        nn.init.zeros_(self.one2one.weight)
        nn.init.zeros_(self.one2one.bias)  # type: ignore[arg-type]  # the bias is not None

    def forward(self, feature_maps: Sequence[Tensor]) -> HeadOutputs:
        """Run the head on levels [B, channels, H_i, W_i], fine to coarse."""
        levels = [self._forward_level(features, level) for level, features in enumerate(feature_maps)]
        one2many, one2one, box_logits = (torch.cat(outputs, 1) for outputs in zip(*levels, strict=True))
        return HeadOutputs(one2many, one2one, box_logits)

    def _forward_level(self, features: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        cls_features = self.cls_tower(features, level)
        one2many = self.one2many(cls_features)
        one2one = one2many.detach() + self.one2one(self.one2one_tower(cls_features.detach(), level))
        # float32 from here on. bfloat16 is too coarse for box coordinates.
        box_logits = self._predict_box_logits(self.reg_tower(features, level))
        return one2many.float().flatten(1), one2one.float().flatten(1), box_logits

    def forward_towers(self, features: Sequence[tuple[Tensor, Tensor]], num_convs: int) -> tuple[Tensor, Tensor]:
        """Run the rest of the head on features inside its towers. See `BaseDetector.forward_towers`.

        Args:
            features (sequence of pairs of Tensor[B, C, H_i, W_i]): Classification and regression features per level.
            num_convs: Number of convolutions that the features have passed.

        Returns:
            one2many (Tensor[B, A]): Score logits of the one-to-many branch.
            box_logits (Tensor[B, A, 4, reg_max]): Logits of the distances.
        """
        one2many, box_logits = [], []
        for level, (cls_features, box_features) in enumerate(features):
            logits: Tensor = self.one2many(self.cls_tower.forward_rest(cls_features, level, num_convs))
            one2many.append(logits.float().flatten(1))
            box_logits.append(self._predict_box_logits(self.reg_tower.forward_rest(box_features, level, num_convs)))
        return torch.cat(one2many, 1), torch.cat(box_logits, 1)

    def _predict_box_logits(self, features: Tensor) -> Tensor:
        logits = self.box_logits(features).float()
        # Stay in channels last, the layout of convolutions on CPUs. Transposing costs as much as a convolution.
        return logits.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (4, self.reg_max))


def make_prior_box_logits(reg_max: int) -> Tensor:
    """Return the initial bias of the box logits: normal distributions around `PRIOR_DISTANCES`.

    Args:
        reg_max: Number of distance bins.

    Returns:
        Tensor[4 * reg_max]: Logits of left, up, right and down.
    """
    deviations = torch.arange(reg_max) - torch.tensor(PRIOR_DISTANCES)[:, None]  # [4, reg_max]
    return (-0.5 * (deviations / PRIOR_STD).square()).flatten()


def find_tower_layers(head: Head, name: str) -> list[PrunableLayer]:
    """Return all tower convolutions of a head as prunable layers.

    Args:
        head: The head.
        name: Its module name in the detector.

    Returns:
        The layers, tower by tower.
    """
    tower_consumers = {
        "cls_tower": (f"{name}.one2many", f"{name}.one2one_tower.convs.0"),
        "one2one_tower": (f"{name}.one2one",),
        "reg_tower": (f"{name}.box_logits",),
    }
    layers = []
    for tower, last_consumers in tower_consumers.items():
        prefix = f"{name}.{tower}"
        num_levels, depth = len(getattr(head, tower).norms), len(getattr(head, tower).convs)
        for index in range(depth):
            norms = tuple(f"{prefix}.norms.{level}.{index}" for level in range(num_levels))
            consumers = (f"{prefix}.convs.{index + 1}",) if index + 1 < depth else last_consumers
            layers.append(PrunableLayer(f"{prefix}.convs.{index}", norms, consumers))
    return layers


def make_anchors(
    input_hw: tuple[int, int], strides: Sequence[int], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the anchor points: the centers of all cells, fine level first, row by row.

    Args:
        input_hw: Height and width of the input, pixels.
        strides: Strides of the levels, fine to coarse, pixels.
        device: Device of the result.

    Returns:
        points (Tensor[A, 2]): (x, y), input pixels.
        strides (Tensor[A]): Stride of each point, input pixels.
    """
    points, point_strides = [], []
    for stride in strides:
        rows = torch.arange(input_hw[0] // stride, device=device)
        columns = torch.arange(input_hw[1] // stride, device=device)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points.append((torch.stack([x, y], -1).reshape(-1, 2).float() + 0.5) * stride)
        # shape[0] stays symbolic in an export, len() does not.
        point_strides.append(torch.full((points[-1].shape[0],), float(stride), device=device))
    return torch.cat(points), torch.cat(point_strides)


def dist2bbox(box_logits: Tensor, anchor_points: Tensor, strides: Tensor) -> Tensor:
    """Decode distance distributions to boxes. A distance is the mean of its distribution (GFL, Li et al. 2020, eq. 5).

    Args:
        box_logits (Tensor[B, A, 4, reg_max]): Logits of the distances left, up, right, down, in strides.
        anchor_points (Tensor[A, 2]): (x, y), input pixels. [B, A, 2] is allowed, too.
        strides (Tensor[A]): Strides of the points, input pixels. [B, A] is allowed, too.

    Returns:
        boxes (Tensor[B, A, 4]): xyxy, input pixels.
    """
    bins = torch.arange(box_logits.shape[-1], device=box_logits.device, dtype=box_logits.dtype)
    distances = (box_logits.softmax(-1) * bins).sum(-1) * strides[..., None]  # [B, A, 4]
    return torch.cat([anchor_points - distances[..., :2], anchor_points + distances[..., 2:]], -1)


def bbox2dist(boxes_xyxy: Tensor, anchor_points: Tensor, strides: Tensor, reg_max: int) -> Tensor:
    """Encode boxes as distances from anchor points.

    Args:
        boxes_xyxy (Tensor[..., 4]): Boxes, input pixels.
        anchor_points (Tensor[..., 2]): (x, y), input pixels.
        strides (Tensor[...]): Strides of the points, input pixels.
        reg_max: Number of distance bins.

    Returns:
        distances (Tensor[..., 4]): Left, up, right, down, in strides, clamped to 0 and reg_max - 1.01.
    """
    left_up = anchor_points - boxes_xyxy[..., :2]
    right_down = boxes_xyxy[..., 2:] - anchor_points
    return (torch.cat([left_up, right_down], -1) / strides[..., None]).clamp(0, reg_max - 1.01)
