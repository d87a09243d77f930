"""Non-maximum suppression in a graph without the operator NonMaxSuppression.

How many boxes that operator leaves depends on values: TensorRT for RTX cannot build it, TensorRT 10.3 fails at it in
INT8, and a CUDA graph cannot hold it. Matrix products of fixed shape say the same everywhere (Cluster-NMS, Zheng et
al. 2021): in each round a box stays if no better box that stays overlaps it.
"""

import torch
from torch import Tensor

from hkd_det.models.suppression import CANDIDATES, IOU

BLOCK = 250  # boxes, by falling score, that are settled together before the next are looked at
# A round settles one more link of a chain within a block (A beats B, so B no longer beats C, ...). Chains in which
# scores fall from neighbour to neighbour 16 times are not seen where a detector has learnt anything.
ROUNDS = 16


def suppressed(boxes_xyxy: Tensor, scores: Tensor, top: int, iou: float = IOU) -> tuple[Tensor, Tensor]:
    """`hkd_det.models.suppression.suppressed`, the same answers, for boxes [B, A, 4] and scores [B, A]."""
    count = min(max(CANDIDATES, top), int(scores.shape[1]))
    scores, index = scores.topk(count)  # [B, C]
    boxes_xyxy = boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
    stays, left = [], torch.ones_like(scores)
    for start in range(0, count, BLOCK):
        block = boxes_xyxy[:, start : start + BLOCK]
        beats = _overlap(block, boxes_xyxy[:, start:], iou).float()  # [B, block, C - start]
        size = min(BLOCK, count - start)
        settled = _settled(left[:, :size], beats[:, :, :size])
        stays.append(settled)
        left = left[:, size:] * (settled[:, None] @ beats[:, :, size:] < 0.5)[:, 0]
    scores, index = (scores * torch.cat(stays, 1)).topk(min(top, count))
    return boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores


def _settled(left: Tensor, beats: Tensor) -> Tensor:
    """Which of the boxes that are left [B, N] stay, 1 or 0, where beats [B, N, N] says who overlaps whom."""
    size = beats.shape[1]
    rivals = beats * (torch.arange(size)[:, None] < torch.arange(size)).float()  # only the better beats
    left = left[:, None]
    stays = left
    for _ in range(ROUNDS):
        stays = torch.where(stays @ rivals < 0.5, left, 0.0)
    return stays[:, 0]


def _overlap(some: Tensor, others: Tensor, iou: float) -> Tensor:
    """[B, N, M]: whether the intersection of boxes [B, N, 4] and [B, M, 4] is more than `iou` of their union."""
    low, high = some[:, :, None], others[:, None]
    across = (torch.minimum(low[..., 2], high[..., 2]) - torch.maximum(low[..., 0], high[..., 0])).clamp(min=0)
    down = (torch.minimum(low[..., 3], high[..., 3]) - torch.maximum(low[..., 1], high[..., 1])).clamp(min=0)
    # i / (a + b - i) > t, without the division.
    areas = [((one[..., 2] - one[..., 0]) * (one[..., 3] - one[..., 1])) * (iou / (1 + iou)) for one in (low, high)]
    return across * down > areas[0] + areas[1]
