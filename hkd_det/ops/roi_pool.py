"""RoIAlign (He et al. 2017) as a weighted sum of cells: several times faster on a CPU than torchvision's kernel.

Two samples across and two down in each of 7x7 bins, each read from four cells: 16 cells and weights a bin, the same for
all channels and for every map of that size. What sums them is `embedding_bag`, over maps as they lie in memory, and
what takes the gradient back is another one.

Regions: features of boxes, each read from the pyramid level of its size; the levels may differ in width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchvision.ops.poolers import LevelMapper

from hkd_det.ops.boxes import CELLS_PER_GT_HEIGHT
from hkd_det.ops.losses import pkd_loss

OUTPUT_SIZE = 7  # bins across and down a region


SAMPLING_RATIO = 2  # across and down a bin


def roi_sampling_weights(
    boxes_xyxy: Tensor, image_index: Tensor, stride: int, feature_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Which cells of maps [B, C, H, W] the bins of R regions read, [R * 49, 16], and with which weights.

    boxes_xyxy: [R, 4] input pixels. picture: [R] which of the B the region lies in.
    """
    rows, down = _compute_axis_weights(boxes_xyxy[:, 1], boxes_xyxy[:, 3], stride, feature_hw[0])
    columns, across = _compute_axis_weights(boxes_xyxy[:, 0], boxes_xyxy[:, 2], stride, feature_hw[1])
    rows = rows + feature_hw[0] * image_index.int()[:, None, None]
    cells = feature_hw[1] * rows[:, :, None, :, None] + columns[:, None, :, None, :]  # [R, 7, 7, 4, 4]
    weights = down[:, :, None, :, None] * across[:, None, :, None, :]
    return cells.reshape(-1, (2 * SAMPLING_RATIO) ** 2), weights.reshape(-1, (2 * SAMPLING_RATIO) ** 2)


def roi_align(features: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """[R, C, 7, 7] float32 of maps [B, C, H, W], from the cells that `region_cells` gives."""
    channels = features.shape[1]
    in_a_row = features.permute(0, 2, 3, 1).reshape(-1, channels).float()
    pooled: Tensor = _WeightedRowSum.apply(in_a_row, cells, weights)
    return pooled.view(-1, OUTPUT_SIZE, OUTPUT_SIZE, channels).permute(0, 3, 1, 2)


class _WeightedRowSum(torch.autograd.Function):
    """[S, C] sums of rows [N, C] float32, those that `cells` [S, K] names, weighted by `weights` [S, K].

    A row's gradient is a weighted sum, too, of the sums that read it. torch's own backward pass of `embedding_bag` adds
    up the same numbers in the same order, but takes a CPU four times as long.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(cells, weights)
        ctx.rows = len(rows)
        return F.embedding_bag(cells, rows, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cells, weights = ctx.saved_tensors
        ordered, order = cells.flatten().sort(stable=True)
        first = torch.searchsorted(ordered, torch.arange(ctx.rows, dtype=cells.dtype, device=cells.device))
        readers, weights = order // cells.shape[1], weights.flatten().index_select(0, order)
        return F.embedding_bag(readers, gradient, first, per_sample_weights=weights, mode="sum"), None, None


def _compute_axis_weights(low: Tensor, high: Tensor, stride: int, num_cells: int) -> tuple[Tensor, Tensor]:
    """Along one axis, of R regions [R] .. [R]: the cells [R, 7, 4] that each bin reads and their weights.

    As torchvision has it: a region is a cell wide at least, and a sample more than a cell outside counts 0.
    """
    low, high = low.float() / stride, high.float() / stride
    position = (torch.arange(OUTPUT_SIZE * SAMPLING_RATIO, device=low.device) + 0.5) / (OUTPUT_SIZE * SAMPLING_RATIO)
    at = low[:, None] + (high - low).clamp(min=1)[:, None] * position  # [R, 14]
    counts = ((at >= -1) & (at <= num_cells)).float() / SAMPLING_RATIO
    at = at.clamp(0, num_cells - 1)
    before = at.floor()
    share = at - before
    read = torch.stack([before, (before + 1).clamp(max=num_cells - 1)], -1).int()
    weights = torch.stack([counts * (1 - share), counts * share], -1)
    return read.view(-1, OUTPUT_SIZE, 2 * SAMPLING_RATIO), weights.view(-1, OUTPUT_SIZE, 2 * SAMPLING_RATIO)


def roi_feature_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    strides: Sequence[int],
    boxes_xyxy: Tensor,
    image_index: Tensor,
) -> Tensor:
    """[R] imitation errors of the pooled features of regions [R, 4] in input pixels, of pictures [R] of the batch.

    mine, other: [B, C_i, H_i, W_i] a level, fine to coarse, with the same C_i. strides: powers of two, rising. Which
    level reads which region is FPN's rule (Lin et al. 2017, eq. 1), as in torchvision's MultiScaleRoIAlign, which wants
    one C for all levels; where the rule's stride is not among them, the nearest does, the finer in a draw.
    """
    octaves = [int(math.log2(stride)) for stride in strides]
    nearest = [
        min(range(len(octaves)), key=lambda level: abs(octaves[level] - octave))
        for octave in range(octaves[0], octaves[-1] + 1)
    ]
    level_of = torch.tensor(nearest, device=image_index.device)[LevelMapper(octaves[0], octaves[-1])([boxes_xyxy])]
    errors = student_features[0].new_zeros(len(image_index), dtype=torch.float32)
    for level, stride in enumerate(strides):
        chosen = (level_of == level).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        height, width = student_features[level].shape[-2:]
        cells = roi_sampling_weights(boxes_xyxy[chosen], image_index[chosen], stride, (height, width))
        pooled, wanted = (roi_align(maps[level], *cells) for maps in (student_features, teacher_features))
        errors = errors.index_add(0, chosen, pkd_loss(pooled, wanted).mean((1, 2)))
    return errors


SAMPLES_PER_AXIS = 4  # places across and down a box whose mean is its vector


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
