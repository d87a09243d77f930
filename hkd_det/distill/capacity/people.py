"""People and distractors as vectors: a layer's map averaged over a box."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from hkd_det.losses.two_stage import people_and_ignored
from hkd_det.models.assignment import CELLS_A_PERSON, TruthBatch

SAMPLES = 4  # places across and down a box whose mean is its vector
APART = 0.3  # IoU with people and ignore regions up to which a box is background


@dataclass(frozen=True, eq=False)
class Regions:
    """Boxes of a batch: people first, then as many distractors at most, if any were drawn.

    rois: [R, 5] picture, xyxy in input pixels. people: how many of them are people.
    """

    rois: Tensor
    people: int


def drawn_regions(truth: TruthBatch, input_hw: tuple[int, int], distractors: bool = True) -> Regions:
    """The people, and, with `distractors`, for each a box of the same size at a place of chance, if there is nobody."""
    people, ignored = people_and_ignored(truth)
    rois = [_rois(people)]
    if distractors:
        moved = [
            _elsewhere(boxes, torch.cat([boxes, left_out]), input_hw)
            for boxes, left_out in zip(people, ignored, strict=True)
        ]
        rois.append(_rois(moved))
    return Regions(torch.cat(rois), len(rois[0]))


class Pooling:
    """Reads boxes [R, 5] as vectors from maps of a network, as RoIAlign with one cell a box.

    RoIAlign itself turns whole maps into float32 and back, forwards and backwards. Which cells a box reads depends on
    the maps' sizes alone, and few sizes serve many layers: worked out once for each, so a step makes one of these.
    """

    def __init__(self, rois: Tensor, input_hw: tuple[int, int]) -> None:
        self.rois, self.input_hw = rois, input_hw
        self._cells: dict[tuple[tuple[torch.Size, ...], torch.dtype], list[_Cells]] = {}

    def __call__(self, maps: Sequence[Tensor]) -> Tensor:
        """[R, C] float32, means over the boxes of a layer's map [B, C, H, W], or of its maps, fine to coarse.

        Of several each box is read from the one on which it is about `CELLS_A_PERSON` cells high.
        """
        key = tuple(level[:, 0].shape for level in maps), maps[0].dtype
        if key not in self._cells:
            self._cells[key] = self._look(*key)
        first, *others = (_Read.apply(level, cells) for level, cells in zip(maps, self._cells[key], strict=True))
        # All levels but a box's own say 0 of it, so that their sum is exact.
        return sum(others, first).float()

    def _look(self, sizes: Sequence[torch.Size], dtype: torch.dtype) -> "list[_Cells]":
        strides = [self.input_hw[0] / height for _, height, _ in sizes]
        high_px = (self.rois[:, 4] - self.rois[:, 2]).clamp(min=1)
        octaves = high_px.new_tensor([math.log2(CELLS_A_PERSON * stride) for stride in strides])
        level_of = (high_px.log2()[:, None] - octaves).abs().argmin(1)  # [R]
        return [
            _Cells.of(self.rois, level_of == level, stride, size, dtype)
            for level, (stride, size) in enumerate(zip(strides, sizes, strict=True))
        ]


@dataclass(frozen=True, eq=False)
class _Cells:
    """What boxes read of maps [B, C, H, W]: of each cell a share, zeros left out.

    cells, shares: [N] of all boxes, cells counted through the batch. starts: [R] where each box's begin.
    whole: [B, most, H W] the same shares with their zeros; box R is in place `place[R]` of picture `picture[R]`.
    """

    cells: Tensor
    shares: Tensor
    starts: Tensor
    whole: Tensor
    picture: Tensor
    place: Tensor

    @classmethod
    def of(cls, rois: Tensor, mine: Tensor, stride: float, size: torch.Size, dtype: torch.dtype) -> "_Cells":
        """Of the boxes that are `mine` [R] bool; the others read nothing."""
        batch, height, width = size
        rows, columns = _shares(rois[:, 2], rois[:, 4], stride, height), _shares(rois[:, 1], rois[:, 3], stride, width)
        dense = (mine[:, None, None] * rows[:, :, None] * columns[:, None]).flatten(1).to(dtype)  # [R, H W]
        picture = rois[:, 0].long()
        box, cell = dense.nonzero(as_tuple=True)
        counts = (dense != 0).sum(1)
        alike = picture[:, None] == picture  # [R, R]
        place = alike.tril(-1).sum(1)
        whole = dense.new_zeros(batch, int(alike.sum(1).amax()) if len(rois) else 0, height * width)
        whole[picture, place] = dense
        cells = picture[box] * (height * width) + cell
        return cls(cells, dense[box, cell], counts.cumsum(0) - counts, whole, picture, place)


class _Read(torch.autograd.Function):
    """Forwards the boxes' cells alone are looked at; backwards a whole map has to be written, quickest by a product."""

    @staticmethod
    def forward(ctx: Any, level: Tensor, read: _Cells) -> Tensor:
        """[R, C]."""
        ctx.read, ctx.size = read, level.shape
        table = level.permute(0, 2, 3, 1).flatten(0, 2)  # [B H W, C], a view where channels come last
        if not len(read.starts):
            return table.new_zeros(0, level.shape[1])
        return F.embedding_bag(read.cells, table, read.starts, mode="sum", per_sample_weights=read.shares)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """[B, C, H, W]."""
        read: _Cells = ctx.read
        batch, channels, height, width = ctx.size
        padded = gradient.new_zeros(batch, read.whole.shape[1], channels)
        padded[read.picture, read.place] = gradient
        written = read.whole.transpose(1, 2) @ padded  # [B, H W, C]
        return written.view(batch, height, width, channels).permute(0, 3, 1, 2), None


def _shares(low: Tensor, high: Tensor, stride: float, cells: int) -> Tensor:
    """[R, cells] how much each cell counts in a line's mean from `low` to `high` [R], input pixels, interpolated."""
    within = (torch.arange(SAMPLES, device=low.device) + 0.5) / SAMPLES
    places = ((low[:, None] + (high - low)[:, None] * within) / stride - 0.5).clamp(0, cells - 1)  # [R, samples]
    return (1 - (places[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0).mean(1)


def _elsewhere(boxes: Tensor, taken: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """[N, 4] the boxes moved to places of chance inside the picture, without those that overlap a taken one."""
    size = boxes[:, 2:] - boxes[:, :2]
    room = (boxes.new_tensor([input_hw[1], input_hw[0]]) - size).clamp(min=0)
    corner = torch.rand(len(boxes), 2, device=boxes.device) * room
    moved = torch.cat([corner, corner + size], 1)
    return moved[(box_iou(moved, taken) <= APART).all(1)]


def _rois(boxes: Sequence[Tensor]) -> Tensor:
    picture = torch.cat([torch.full_like(of_one[:, :1], index) for index, of_one in enumerate(boxes)])
    return torch.cat([picture, torch.cat(list(boxes))], 1)
