"""Regions: features of boxes, each read from the pyramid level of its size; the levels may differ in width."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops.poolers import LevelMapper

from hkd_det.distill.pooling import pooled_regions, region_cells
from hkd_det.losses.imitation import imitation_error


def region_errors(
    mine: Sequence[Tensor], other: Sequence[Tensor], strides: Sequence[int], boxes_xyxy: Tensor, picture: Tensor
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
    level_of = torch.tensor(nearest, device=picture.device)[LevelMapper(octaves[0], octaves[-1])([boxes_xyxy])]
    errors = mine[0].new_zeros(len(picture), dtype=torch.float32)
    for level, stride in enumerate(strides):
        chosen = (level_of == level).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        height, width = mine[level].shape[-2:]
        cells = region_cells(boxes_xyxy[chosen], picture[chosen], stride, (height, width))
        pooled, wanted = (pooled_regions(maps[level], *cells) for maps in (mine, other))
        errors = errors.index_add(0, chosen, imitation_error(pooled, wanted).mean((1, 2)))
    return errors
