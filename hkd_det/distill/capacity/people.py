"""People and distractors as vectors: a layer's map averaged over a box."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from hkd_det.losses.two_stage import split_ignored
from hkd_det.models.assignment import CELLS_PER_GT_HEIGHT, Targets

SAMPLES_PER_AXIS = 4  # places across and down a box whose mean is its vector
MAX_NEGATIVE_IOU = 0.3  # IoU with people and ignore regions up to which a box is background


@dataclass(frozen=True, eq=False)
class SampledRegions:
    """Boxes of a batch: people first, then as many distractors at most, if any were drawn.

    rois: [R, 5] picture, xyxy in input pixels. people: how many of them are people.
    """

    rois: Tensor
    num_gt: int


def sample_regions(targets: Targets, input_hw: tuple[int, int], has_negatives: bool = True) -> SampledRegions:
    """The people, and, with `distractors`, for each a box of the same size at a place of chance, if there is nobody."""
    people, ignored = split_ignored(targets)
    rois = [_boxes_to_rois(people)]
    if has_negatives:
        moved = [
            _sample_negatives(boxes, torch.cat([boxes, left_out]), input_hw)
            for boxes, left_out in zip(people, ignored, strict=True)
        ]
        rois.append(_boxes_to_rois(moved))
    return SampledRegions(torch.cat(rois), len(rois[0]))


class BoxAveragePool:
    """Reads boxes [R, 5] as vectors from maps of a network, as RoIAlign with one cell a box.

    RoIAlign itself turns whole maps into float32 and back, forwards and backwards. Which cells a box reads depends on
    the maps' sizes alone, and few sizes serve many layers: worked out once for each, so a step makes one of these.
    """

    def __init__(self, rois: Tensor, input_hw: tuple[int, int]) -> None:
        self.rois, self.input_hw = rois, input_hw
        self._weights_cache: dict[tuple[tuple[torch.Size, ...], torch.dtype], list[_PoolingWeights]] = {}

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        """[R, C] float32, means over the boxes of a layer's map [B, C, H, W], or of its maps, fine to coarse.

        Of several each box is read from the one on which it is about `CELLS_A_PERSON` cells high.
        """
        key = tuple(level[:, 0].shape for level in features), features[0].dtype
        if key not in self._weights_cache:
            self._weights_cache[key] = self._compute_weights(*key)
        first, *others = (
            _WeightedSumPool.apply(level, cells)
            for level, cells in zip(features, self._weights_cache[key], strict=True)
        )
        # All levels but a box's own say 0 of it, so that their sum is exact.
        return sum(others, first).float()

    def _compute_weights(self, sizes: Sequence[torch.Size], dtype: torch.dtype) -> "list[_PoolingWeights]":
        strides = [self.input_hw[0] / height for _, height, _ in sizes]
        high_px = (self.rois[:, 4] - self.rois[:, 2]).clamp(min=1)
        octaves = high_px.new_tensor([math.log2(CELLS_PER_GT_HEIGHT * stride) for stride in strides])
        level_of = (high_px.log2()[:, None] - octaves).abs().argmin(1)  # [R]
        return [
            _PoolingWeights.from_rois(self.rois, level_of == level, stride, size, dtype)
            for level, (stride, size) in enumerate(zip(strides, sizes, strict=True))
        ]


@dataclass(frozen=True, eq=False)
class _PoolingWeights:
    """What boxes read of maps [B, C, H, W]: of each cell a share, zeros left out.

    cells, shares: [N] of all boxes, cells counted through the batch. starts: [R] where each box's begin.
    whole: [B, most, H W] the same shares with their zeros; box R is in place `place[R]` of picture `picture[R]`.
    """

    cell_indices: Tensor
    weights: Tensor
    offsets: Tensor
    dense_weights: Tensor
    image_index: Tensor
    slot: Tensor

    @classmethod
    def from_rois(
        cls, rois: Tensor, level_mask: Tensor, stride: float, size: torch.Size, dtype: torch.dtype
    ) -> "_PoolingWeights":
        """Of the boxes that are `mine` [R] bool; the others read nothing."""
        batch, height, width = size
        rows, columns = (
            _interpolation_weights(rois[:, 2], rois[:, 4], stride, height),
            _interpolation_weights(rois[:, 1], rois[:, 3], stride, width),
        )
        dense = (level_mask[:, None, None] * rows[:, :, None] * columns[:, None]).flatten(1).to(dtype)  # [R, H W]
        picture = rois[:, 0].long()
        box, cell = dense.nonzero(as_tuple=True)
        counts = (dense != 0).sum(1)
        alike = picture[:, None] == picture  # [R, R]
        place = alike.tril(-1).sum(1)
        whole = dense.new_zeros(batch, int(alike.sum(1).amax()) if len(rois) else 0, height * width)
        whole[picture, place] = dense
        cells = picture[box] * (height * width) + cell
        return cls(cells, dense[box, cell], counts.cumsum(0) - counts, whole, picture, place)


class _WeightedSumPool(torch.autograd.Function):
    """Forwards the boxes' cells alone are looked at; backwards a whole map has to be written, quickest by a product."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: _PoolingWeights) -> Tensor:
        """[R, C]."""
        ctx.read, ctx.size = weights, features.shape
        table = features.permute(0, 2, 3, 1).flatten(0, 2)  # [B H W, C], a view where channels come last
        if not len(weights.offsets):
            return table.new_zeros(0, features.shape[1])
        return F.embedding_bag(
            weights.cell_indices, table, weights.offsets, mode="sum", per_sample_weights=weights.weights
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """[B, C, H, W]."""
        read: _PoolingWeights = ctx.read
        batch, channels, height, width = ctx.size
        padded = grad_output.new_zeros(batch, read.dense_weights.shape[1], channels)
        padded[read.image_index, read.slot] = grad_output
        written = read.dense_weights.transpose(1, 2) @ padded  # [B, H W, C]
        return written.view(batch, height, width, channels).permute(0, 3, 1, 2), None


def _interpolation_weights(start: Tensor, end: Tensor, stride: float, num_cells: int) -> Tensor:
    """[R, cells] how much each cell counts in a line's mean from `low` to `high` [R], input pixels, interpolated."""
    within = (torch.arange(SAMPLES_PER_AXIS, device=start.device) + 0.5) / SAMPLES_PER_AXIS
    places = ((start[:, None] + (end - start)[:, None] * within) / stride - 0.5).clamp(0, num_cells - 1)  # [R, samples]
    return (1 - (places[..., None] - torch.arange(num_cells, device=start.device)).abs()).clamp(min=0).mean(1)


def _sample_negatives(boxes: Tensor, occupied_boxes: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """[N, 4] the boxes moved to places of chance inside the picture, without those that overlap a taken one."""
    size = boxes[:, 2:] - boxes[:, :2]
    room = (boxes.new_tensor([input_hw[1], input_hw[0]]) - size).clamp(min=0)
    corner = torch.rand(len(boxes), 2, device=boxes.device) * room
    moved = torch.cat([corner, corner + size], 1)
    return moved[(box_iou(moved, occupied_boxes) <= MAX_NEGATIVE_IOU).all(1)]


def _boxes_to_rois(boxes: Sequence[Tensor]) -> Tensor:
    picture = torch.cat([torch.full_like(of_one[:, :1], index) for index, of_one in enumerate(boxes)])
    return torch.cat([picture, torch.cat(list(boxes))], 1)
