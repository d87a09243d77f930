"""Regions: features of boxes, each read from the pyramid level of its size; the levels may differ in width."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops.poolers import LevelMapper

from hkd_det.distill.pooling import roi_align, roi_sampling_weights
from hkd_det.losses.imitation import pkd_loss


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
