"""People and distractors as vectors: a layer's map averaged over a box."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from hkd_det.losses.two_stage import people_and_ignored
from hkd_det.models.assignment import CELLS_A_PERSON, TruthBatch

SAMPLES = 4  # places across and down a box whose mean is its vector
APART = 0.3  # IoU with people and ignore regions up to which a box is background


@dataclass(frozen=True, eq=False)
class Regions:
    """Boxes of a batch: people first, then as many distractors at most.

    rois: [R, 5] picture, xyxy in input pixels. people: how many of them are people.
    """

    rois: Tensor
    people: int


def drawn_regions(truth: TruthBatch, input_hw: tuple[int, int]) -> Regions:
    """The people, and for each a box of the same size at a place of chance, if there is nobody."""
    people, ignored = people_and_ignored(truth)
    distractors = [
        _elsewhere(boxes, torch.cat([boxes, left_out]), input_hw)
        for boxes, left_out in zip(people, ignored, strict=True)
    ]
    rois = [_rois(boxes) for boxes in (people, distractors)]
    return Regions(torch.cat(rois), len(rois[0]))


class Pooling:
    """Reads boxes [R, 5] as vectors from maps of a network; a step makes one for all layers.

    Which cells a box reads depends on a map's size alone, and few sizes serve many layers: worked out once for each.
    """

    def __init__(self, rois: Tensor, input_hw: tuple[int, int]) -> None:
        self.rois, self.input_hw = rois, input_hw
        self._readings: dict[tuple[torch.Size, ...], list[_Reading]] = {}

    def __call__(self, maps: Sequence[Tensor]) -> Tensor:
        """[R, C] means over the boxes of a layer's map [B, C, H, W], or of its maps, fine to coarse.

        Of several each box is read from the one on which it is about `CELLS_A_PERSON` cells high.
        """
        sizes = tuple(level[:, 0].shape for level in maps)
        if sizes not in self._readings:
            self._readings[sizes] = self._look(sizes, maps[0].dtype)
        vectors = [reading(level) for reading, level in zip(self._readings[sizes], maps, strict=True)]
        if len(vectors) == 1:
            return vectors[0]
        joined = maps[0].new_zeros((len(self.rois), maps[0].shape[1]), dtype=torch.float32)
        for reading, of_level in zip(self._readings[sizes], vectors, strict=True):
            joined = joined.index_add(0, reading.boxes, of_level)
        return joined

    def _look(self, sizes: Sequence[torch.Size], dtype: torch.dtype) -> "list[_Reading]":
        strides = [self.input_hw[0] / height for _, height, _ in sizes]
        height_px = (self.rois[:, 4] - self.rois[:, 2]).clamp(min=1)
        octaves = torch.tensor([math.log2(CELLS_A_PERSON * stride) for stride in strides], device=self.rois.device)
        level_of = (height_px.log2()[:, None] - octaves).abs().argmin(1)  # [R]
        readings = []
        for level, (stride, size) in enumerate(zip(strides, sizes, strict=True)):
            boxes = (level_of == level).nonzero()[:, 0]
            readings.append(_Reading.of(boxes, self.rois[boxes], stride, size, dtype))
        return readings


@dataclass(frozen=True, eq=False)
class _Reading:
    """RoIAlign with one cell a box: a sum over maps [B, C, H, W] weighted by rows times columns.

    As one product a picture, since RoIAlign itself turns whole maps into float32 and back, forwards and backwards.
    boxes: [R] which of all. picture, place: [R] its picture, and which of the picture's own. shares: [B, most, H W].
    """

    boxes: Tensor
    picture: Tensor
    place: Tensor
    shares: Tensor

    @classmethod
    def of(cls, boxes: Tensor, rois: Tensor, stride: float, size: torch.Size, dtype: torch.dtype) -> "_Reading":
        batch, height, width = size
        rows, columns = _shares(rois[:, 2], rois[:, 4], stride, height), _shares(rois[:, 1], rois[:, 3], stride, width)
        picture = rois[:, 0].long()
        mine = picture[:, None] == torch.arange(batch, device=rois.device)  # [R, B]
        place = mine.cumsum(0).gather(1, picture[:, None])[:, 0] - 1
        shares = rois.new_zeros(batch, int(mine.sum(0).max()), height * width)
        shares[picture, place] = (rows[:, :, None] * columns[:, None]).flatten(1)
        return cls(boxes, picture, place, shares.to(dtype))

    def __call__(self, features: Tensor) -> Tensor:
        """[R, C] float32."""
        means = self.shares.to(features.dtype) @ features.flatten(2).transpose(1, 2)  # [B, most, C]
        return means[self.picture, self.place].float()


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
