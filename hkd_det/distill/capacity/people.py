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


def pooled(maps: Sequence[Tensor], rois: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """[R, C] means over the boxes [R, 5] of a layer's map [B, C, H, W], or of its maps, fine to coarse.

    Of several each box is read from the one on which it is about `CELLS_A_PERSON` cells high.
    """
    strides = [input_hw[0] / level.shape[-2] for level in maps]
    height_px = (rois[:, 4] - rois[:, 2]).clamp(min=1)
    octaves = torch.tensor([math.log2(CELLS_A_PERSON * stride) for stride in strides], device=rois.device)
    level_of = (height_px.log2()[:, None] - octaves).abs().argmin(1)  # [R]
    vectors = maps[0].new_zeros((len(rois), maps[0].shape[1]), dtype=torch.float32)
    for level, stride in enumerate(strides):
        chosen = (level_of == level).nonzero()[:, 0]
        vectors = vectors.index_add(0, chosen, _means(maps[level], rois[chosen], stride))
    return vectors


def _means(features: Tensor, rois: Tensor, stride: float) -> Tensor:
    """[R, C] RoIAlign with one cell a box: a sum over [B, C, H, W] weighted by rows times columns.

    As one product a picture, since RoIAlign itself turns whole maps into float32 and back, forwards and backwards.
    """
    height, width = features.shape[-2:]
    rows, columns = _shares(rois[:, 2], rois[:, 4], stride, height), _shares(rois[:, 1], rois[:, 3], stride, width)
    shares = (rows[:, :, None] * columns[:, None]).flatten(1)  # [R, H W]
    picture = rois[:, 0].long()
    mine = picture[:, None] == torch.arange(len(features), device=rois.device)  # [R, B]
    place = mine.cumsum(0).gather(1, picture[:, None])[:, 0] - 1  # among the picture's own
    placed = shares.new_zeros(len(features), int(mine.sum(0).max()), height * width)
    placed[picture, place] = shares
    means = placed.to(features.dtype) @ features.flatten(2).transpose(1, 2)  # [B, most, C]
    return means[picture, place].float()


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
