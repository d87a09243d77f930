"""Regions: features of boxes, each read from the pyramid level of its size; the levels may differ in width."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from hkd_det.losses.imitation import imitation_error

SIDE = 7  # cells of a pooled region


def region_errors(
    mine: Sequence[Tensor], other: Sequence[Tensor], strides: Sequence[int], regions: Sequence[Tensor]
) -> Tensor:
    """[R] imitation errors of the pooled features of all pictures' regions, one [N, 4] xyxy input pixels a picture.

    mine, other: [B, C_i, H_i, W_i] a level, fine to coarse, with the same C_i. strides: powers of two, rising. Which
    level reads which region is FPN's rule (Lin et al. 2017, eq. 1), as in torchvision's MultiScaleRoIAlign, which wants
    one C for all levels; where the rule's stride is not among them, the nearest does, the finer in a draw.
    """
    boxes = torch.cat(list(regions)).to(mine[0].device)
    picture = torch.cat([torch.full_like(of_one[:, :1], b) for b, of_one in enumerate(regions)]).to(boxes)
    octaves = [int(math.log2(stride)) for stride in strides]
    nearest = [
        min(range(len(octaves)), key=lambda level: abs(octaves[level] - octave))
        for octave in range(octaves[0], octaves[-1] + 1)
    ]
    level_of = torch.tensor(nearest, device=boxes.device)[LevelMapper(octaves[0], octaves[-1])([boxes])]
    errors = mine[0].new_zeros(len(boxes), dtype=torch.float32)
    for level, stride in enumerate(strides):
        chosen = (level_of == level).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        rois = torch.cat([picture, boxes], 1)[chosen]
        pooled, wanted = (roi_align(maps[level].float(), rois, SIDE, 1 / stride, 2) for maps in (mine, other))
        errors = errors.index_add(0, chosen, imitation_error(pooled, wanted).mean((1, 2)))
    return errors
