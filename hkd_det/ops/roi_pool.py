"""RoI pooling as weighted sums of feature map cells. On a CPU it is several times faster than torchvision's kernels.

`roi_align` is RoIAlign (He et al. 2017) with 7 x 7 bins and 2 x 2 samples per bin. Each sample interpolates four cells,
so a bin reads 16 cells. Cells and weights are the same for all channels and all feature maps of one size.
`embedding_bag` sums them in the forward pass and in the backward pass.

`BoxAveragePool` reads one vector per box, the mean of 4 x 4 samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchvision.ops.poolers import LevelMapper

from hkd_det.ops.boxes import CELLS_PER_GT_HEIGHT
from hkd_det.ops.losses import pkd_loss

OUTPUT_SIZE = 7  # bins per side of an RoI
SAMPLING_RATIO = 2  # samples per side of a bin
SAMPLES_PER_AXIS = 4  # samples per side of a box in `BoxAveragePool`

RoILevelRule = Literal["fpn", "height", "all"]
"""Level from which an RoI is pooled. fpn: the rule of FPN (Lin et al. 2017, eq. 1), as in torchvision's
`MultiScaleRoIAlign`; if no level has the stride of the rule, the nearest one, the finer of two. height: the level on
which the box is nearest to `CELLS_PER_GT_HEIGHT` cells high. all: every level."""

RoINorm = Literal["region", "batch"]
"""Positions over which a channel of RoI features is standardized. region: the 7x7 bins of one RoI, which removes the
differences between RoIs. batch: the bins of all RoIs of a level."""


def compute_roi_sampling_weights(
    boxes_xyxy: Tensor, image_index: Tensor, stride: int, feature_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Compute which cells of feature maps [B, C, H, W] the bins of R RoIs read, and with which weights.

    Args:
        boxes_xyxy (Tensor[R, 4]): RoIs, input pixels.
        image_index (Tensor[R]): int64, index of the image of each RoI, 0 to B - 1.
        stride: Stride of the feature maps, input pixels.
        feature_hw: H and W.

    Returns:
        cells (Tensor[R * 49, 16]): int32, cell indices into the flattened [B * H * W].
        weights (Tensor[R * 49, 16]): Weights.
    """
    rows, row_weights = _compute_axis_weights(boxes_xyxy[:, 1], boxes_xyxy[:, 3], stride, feature_hw[0])
    columns, column_weights = _compute_axis_weights(boxes_xyxy[:, 0], boxes_xyxy[:, 2], stride, feature_hw[1])
    rows = rows + feature_hw[0] * image_index.int()[:, None, None]
    cells = feature_hw[1] * rows[:, :, None, :, None] + columns[:, None, :, None, :]  # [R, 7, 7, 4, 4]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    return cells.reshape(-1, (2 * SAMPLING_RATIO) ** 2), weights.reshape(-1, (2 * SAMPLING_RATIO) ** 2)


def roi_align(features: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """Pool RoIs from feature maps, with the values and gradients of `torchvision.ops.roi_align`.

    Args:
        features (Tensor[B, C, H, W]): Feature maps.
        cells (Tensor[R * 49, 16]): Cell indices of `compute_roi_sampling_weights`.
        weights (Tensor[R * 49, 16]): Weights of `compute_roi_sampling_weights`.

    Returns:
        pooled (Tensor[R, C, 7, 7]): float32.
    """
    channels = features.shape[1]
    rows = features.permute(0, 2, 3, 1).reshape(-1, channels).float()
    pooled: Tensor = _WeightedRowSum.apply(rows, cells, weights)
    return pooled.view(-1, OUTPUT_SIZE, OUTPUT_SIZE, channels).permute(0, 3, 1, 2)


def roi_feature_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    strides: Sequence[int],
    boxes_xyxy: Tensor,
    image_index: Tensor,
    level_rule: RoILevelRule = "fpn",
    norm: RoINorm = "region",
) -> Tensor:
    """Compute the mean `pkd_loss` of the pooled features of each RoI.

    Args:
        student_features (sequence of Tensor[B, C_i, H_i, W_i]): Levels of the student, fine to coarse.
        teacher_features (sequence of Tensor[B, C_i, H_i, W_i]): Levels of the teacher of the same shapes.
        strides: Strides of the levels, ascending powers of two.
        boxes_xyxy (Tensor[R, 4]): RoIs, input pixels.
        image_index (Tensor[R]): int64, index of the image of each RoI.
        level_rule: Levels from which an RoI is pooled.
        norm: Positions over which a channel is standardized.

    Returns:
        loss (Tensor[R]): float32, loss per RoI, the mean over its levels.
    """
    selected = select_roi_levels(boxes_xyxy, strides, level_rule)  # [R, levels]
    losses = student_features[0].new_zeros(len(image_index), dtype=torch.float32)
    for level, stride in enumerate(strides):
        index = selected[:, level].nonzero()[:, 0]
        if len(index) == 0:
            continue
        height, width = student_features[level].shape[-2:]
        sampling = compute_roi_sampling_weights(boxes_xyxy[index], image_index[index], stride, (height, width))
        student, teacher = (roi_align(features[level], *sampling) for features in (student_features, teacher_features))
        if norm == "batch":
            # One item whose positions are the bins of all RoIs.
            student, teacher = (pooled.transpose(0, 1)[None].flatten(3) for pooled in (student, teacher))
            level_losses = pkd_loss(student, teacher)[0].mean(1)
        else:
            level_losses = pkd_loss(student, teacher).mean((1, 2))
        losses = losses.index_add(0, index, level_losses)
    return losses / selected.sum(1)


def select_roi_levels(boxes_xyxy: Tensor, strides: Sequence[int], rule: RoILevelRule) -> Tensor:
    """Select the levels from which each RoI is pooled.

    Args:
        boxes_xyxy (Tensor[R, 4]): RoIs, input pixels.
        strides: Strides of the L levels, ascending powers of two.
        rule: See `RoILevelRule`.

    Returns:
        Tensor[R, L]: bool, True for a level from which the RoI is pooled.
    """
    if rule == "all":
        return boxes_xyxy.new_ones((len(boxes_xyxy), len(strides)), dtype=torch.bool)
    if rule == "height":
        level = _find_level_by_height(boxes_xyxy[:, 3] - boxes_xyxy[:, 1], strides)
    else:
        octaves = [int(math.log2(stride)) for stride in strides]
        nearest_level = [
            min(range(len(octaves)), key=lambda level: abs(octaves[level] - octave))
            for octave in range(octaves[0], octaves[-1] + 1)
        ]
        octave_index = LevelMapper(octaves[0], octaves[-1])([boxes_xyxy])
        level = torch.tensor(nearest_level, device=boxes_xyxy.device)[octave_index]
    return level[:, None] == torch.arange(len(strides), device=boxes_xyxy.device)


class BoxAveragePool:
    """Pools one vector per box from the feature maps of many layers.

    The result is that of RoIAlign with one bin. RoIAlign would convert whole feature maps to float32 and back. The
    sampling weights depend on the size of the feature maps only and are computed once per size, so that one object
    serves all layers of a training step.

    Args:
        rois (Tensor[R, 5]): Image index and xyxy box, input pixels.
        input_hw: Height and width of the input images, pixels.
    """

    def __init__(self, rois: Tensor, input_hw: tuple[int, int]) -> None:
        self.rois, self.input_hw = rois, input_hw
        self._weights_cache: dict[tuple[tuple[torch.Size, ...], torch.dtype], list[_PoolingWeights]] = {}

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        """Pool the boxes from a feature map, or each from one of several levels.

        Args:
            features (sequence of Tensor[B, C, H_i, W_i]): The levels of one layer, fine to coarse. A box is pooled from
                the level on which its height is nearest to `CELLS_PER_GT_HEIGHT` cells.

        Returns:
            vectors (Tensor[R, C]): float32.
        """
        key = tuple(level[:, 0].shape for level in features), features[0].dtype
        if key not in self._weights_cache:
            self._weights_cache[key] = self._compute_weights(*key)
        first, *others = (
            _WeightedSumPool.apply(level, weights)
            for level, weights in zip(features, self._weights_cache[key], strict=True)
        )
        # All levels except that of the box contribute exactly 0.
        return sum(others, first).float()

    def _compute_weights(self, sizes: Sequence[torch.Size], dtype: torch.dtype) -> "list[_PoolingWeights]":
        strides = [self.input_hw[0] / height for _, height, _ in sizes]
        box_level = _find_level_by_height(self.rois[:, 4] - self.rois[:, 2], strides)
        return [
            _PoolingWeights.from_rois(self.rois, box_level == level, stride, size, dtype)
            for level, (stride, size) in enumerate(zip(strides, sizes, strict=True))
        ]


class _WeightedRowSum(torch.autograd.Function):
    """Computes S weighted sums [S, C] of float32 rows [N, C], given cells [S, K] and weights [S, K].

    The gradient of a row is a weighted sum of the gradients of the sums that read it. torch's own backward pass of
    `embedding_bag` adds the same numbers in the same order but takes four times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(cells, weights)
        ctx.num_rows = len(rows)
        return F.embedding_bag(cells, rows, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        cells, weights = ctx.saved_tensors
        sorted_cells, order = cells.flatten().sort(stable=True)
        offsets = torch.searchsorted(sorted_cells, torch.arange(ctx.num_rows, dtype=cells.dtype, device=cells.device))
        readers, weights = order // cells.shape[1], weights.flatten().index_select(0, order)
        return F.embedding_bag(readers, grad_output, offsets, per_sample_weights=weights, mode="sum"), None, None


@dataclass(frozen=True, eq=False)
class _PoolingWeights:
    """What R boxes read from feature maps [B, C, H, W]: weights per cell, as a sparse list and as dense matrices.

    Attributes:
        cell_indices (Tensor[N]): Cells with a nonzero weight, box by box, indices into the flattened [B * H * W].
        weights (Tensor[N]): Their weights.
        offsets (Tensor[R]): Start of each box in the two lists.
        dense_weights (Tensor[B, S, H * W]): All weights; S is the largest number of boxes in one image.
        image_index (Tensor[R]): Image of each box.
        slot (Tensor[R]): Row of each box in `dense_weights[image_index]`.
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
        """Compute the weights of the boxes in `level_mask` [R] bool; the other boxes read nothing."""
        batch, height, width = size
        rows = _compute_interpolation_weights(rois[:, 2], rois[:, 4], stride, height)
        columns = _compute_interpolation_weights(rois[:, 1], rois[:, 3], stride, width)
        weights = (level_mask[:, None, None] * rows[:, :, None] * columns[:, None]).flatten(1).to(dtype)  # [R, H W]
        image_index = rois[:, 0].long()
        box, cell = weights.nonzero(as_tuple=True)
        counts = (weights != 0).sum(1)
        same_image = image_index[:, None] == image_index  # [R, R]
        slot = same_image.tril(-1).sum(1)
        dense = weights.new_zeros(batch, int(same_image.sum(1).amax()) if len(rois) else 0, height * width)
        dense[image_index, slot] = weights
        cells = image_index[box] * (height * width) + cell
        return cls(cells, weights[box, cell], counts.cumsum(0) - counts, dense, image_index, slot)


class _WeightedSumPool(torch.autograd.Function):
    """Pools sparsely in the forward pass. The backward pass writes whole maps, fastest by a dense matrix product."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weights: _PoolingWeights) -> Tensor:
        """Return [R, C]."""
        ctx.pooling_weights, ctx.size = weights, features.shape
        table = features.permute(0, 2, 3, 1).flatten(0, 2)  # [B H W, C], a view of channels-last features
        if not len(weights.offsets):
            return table.new_zeros(0, features.shape[1])
        return F.embedding_bag(
            weights.cell_indices, table, weights.offsets, mode="sum", per_sample_weights=weights.weights
        )

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Return [B, C, H, W]."""
        weights: _PoolingWeights = ctx.pooling_weights
        batch, channels, height, width = ctx.size
        padded = grad_output.new_zeros(batch, weights.dense_weights.shape[1], channels)
        padded[weights.image_index, weights.slot] = grad_output
        grad = weights.dense_weights.transpose(1, 2) @ padded  # [B, H W, C]
        return grad.view(batch, height, width, channels).permute(0, 3, 1, 2), None


def _find_level_by_height(height_px: Tensor, strides: Sequence[float]) -> Tensor:
    """Return [R] int64: the level on which a box of this height [R] is nearest to `CELLS_PER_GT_HEIGHT` cells high."""
    octaves = height_px.new_tensor([math.log2(CELLS_PER_GT_HEIGHT * stride) for stride in strides])
    return (height_px.clamp(min=1).log2()[:, None] - octaves).abs().argmin(1)


def _compute_axis_weights(low: Tensor, high: Tensor, stride: int, num_cells: int) -> tuple[Tensor, Tensor]:
    """Return the cells [R, 7, 4] that each bin reads along one axis, and their weights, for RoIs from low to high [R].

    As in torchvision, an RoI is at least one cell wide, and a sample more than one cell outside the map counts as 0.
    """
    low, high = low.float() / stride, high.float() / stride
    steps = (torch.arange(OUTPUT_SIZE * SAMPLING_RATIO, device=low.device) + 0.5) / (OUTPUT_SIZE * SAMPLING_RATIO)
    samples = low[:, None] + (high - low).clamp(min=1)[:, None] * steps  # [R, 14]
    sample_weight = ((samples >= -1) & (samples <= num_cells)).float() / SAMPLING_RATIO
    samples = samples.clamp(0, num_cells - 1)
    lower = samples.floor()
    upper_weight = samples - lower
    cells = torch.stack([lower, (lower + 1).clamp(max=num_cells - 1)], -1).int()
    weights = torch.stack([sample_weight * (1 - upper_weight), sample_weight * upper_weight], -1)
    return cells.view(-1, OUTPUT_SIZE, 2 * SAMPLING_RATIO), weights.view(-1, OUTPUT_SIZE, 2 * SAMPLING_RATIO)


def _compute_interpolation_weights(start: Tensor, end: Tensor, stride: float, num_cells: int) -> Tensor:
    """Return [R, cells]: the weight of each cell in the mean along one axis from start to end [R], input pixels."""
    steps = (torch.arange(SAMPLES_PER_AXIS, device=start.device) + 0.5) / SAMPLES_PER_AXIS
    samples = ((start[:, None] + (end - start)[:, None] * steps) / stride - 0.5).clamp(0, num_cells - 1)  # [R, samples]
    return (1 - (samples[..., None] - torch.arange(num_cells, device=start.device)).abs()).clamp(min=0).mean(1)
