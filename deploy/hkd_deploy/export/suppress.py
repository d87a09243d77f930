"""Non-maximum suppression in a graph without the operator NonMaxSuppression.

How many boxes that operator leaves depends on values: TensorRT for RTX cannot build it, TensorRT 10.3 fails at it in
INT8, and a CUDA graph cannot hold it. Matrix products of fixed shape say the same everywhere (Cluster-NMS, Zheng et
al. 2021): in each round a box stays if no better box that stays overlaps it.
"""

import torch
from torch import Tensor

from hkd_det.models.suppression import IOU_THRESHOLD, PRE_NMS_TOPK

BLOCK_SIZE = 250  # boxes, by falling score, that are settled together before the next are looked at
# A round settles one more link of a chain within a block (A beats B, so B no longer beats C, ...). Chains in which
# scores fall from neighbour to neighbour 16 times are not seen where a detector has learnt anything.
MAX_ITERATIONS = 16


def cluster_nms(
    boxes_xyxy: Tensor, scores: Tensor, max_det: int, iou_threshold: float = IOU_THRESHOLD
) -> tuple[Tensor, Tensor]:
    """`hkd_det.models.suppression.suppressed`, the same answers, for boxes [B, A, 4] and scores [B, A]."""
    count = min(max(PRE_NMS_TOPK, max_det), int(scores.shape[1]))
    scores, index = scores.topk(count)  # [B, C]
    boxes_xyxy = boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
    stays, left = [], torch.ones_like(scores)
    for start in range(0, count, BLOCK_SIZE):
        block = boxes_xyxy[:, start : start + BLOCK_SIZE]
        beats = _exceeds_iou(block, boxes_xyxy[:, start:], iou_threshold).float()  # [B, block, C - start]
        size = min(BLOCK_SIZE, count - start)
        settled = _resolve_block(left[:, :size], beats[:, :, :size])
        stays.append(settled)
        left = left[:, size:] * (settled[:, None] @ beats[:, :, size:] < 0.5)[:, 0]
    scores, index = (scores * torch.cat(stays, 1)).topk(min(max_det, count))
    return boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores


def _resolve_block(candidates: Tensor, overlaps: Tensor) -> Tensor:
    """Which of the boxes that are left [B, N] stay, 1 or 0, where beats [B, N, N] says who overlaps whom."""
    size = overlaps.shape[1]
    rivals = overlaps * (torch.arange(size)[:, None] < torch.arange(size)).float()  # only the better beats
    candidates = candidates[:, None]
    stays = candidates
    for _ in range(MAX_ITERATIONS):
        stays = torch.where(stays @ rivals < 0.5, candidates, 0.0)
    return stays[:, 0]


def _exceeds_iou(boxes1: Tensor, boxes2: Tensor, iou_threshold: float) -> Tensor:
    """[B, N, M]: whether the intersection of boxes [B, N, 4] and [B, M, 4] is more than `iou` of their union."""
    low, high = boxes1[:, :, None], boxes2[:, None]
    across = (torch.minimum(low[..., 2], high[..., 2]) - torch.maximum(low[..., 0], high[..., 0])).clamp(min=0)
    down = (torch.minimum(low[..., 3], high[..., 3]) - torch.maximum(low[..., 1], high[..., 1])).clamp(min=0)
    # i / (a + b - i) > t, without the division.
    areas = [
        ((one[..., 2] - one[..., 0]) * (one[..., 3] - one[..., 1])) * (iou_threshold / (1 + iou_threshold))
        for one in (low, high)
    ]
    return across * down > areas[0] + areas[1]
