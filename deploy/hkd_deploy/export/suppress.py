"""Non-maximum suppression in a graph without the operator NonMaxSuppression.

How many boxes that operator leaves depends on values: TensorRT for RTX cannot build it, TensorRT 10.3 fails at it in
INT8, and a CUDA graph cannot hold it. Matrix products of fixed shape say the same everywhere (Cluster-NMS, Zheng et
al. 2021): in each round a box stays if no better box that stays overlaps it.
"""

import torch
from torch import Tensor

from hkd_det.models.suppression import CANDIDATES, IOU

# A round settles one more link of a chain (A beats B, so B no longer beats C, ...): ever longer ones are ever rarer.
ROUNDS = 16


def suppressed(boxes_xyxy: Tensor, scores: Tensor, top: int, iou: float = IOU) -> tuple[Tensor, Tensor]:
    """`hkd_det.models.suppression.suppressed`, the same answers, for boxes [B, A, 4] and scores [B, A]."""
    count = min(max(CANDIDATES, top), int(scores.shape[1]))
    scores, index = scores.topk(count)  # [B, C]
    boxes_xyxy = boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
    beats = _overlap(boxes_xyxy, iou) & (torch.arange(count)[:, None] < torch.arange(count))  # [B, C, C], better first
    rivals, stays = beats.float(), torch.ones_like(scores)
    for _ in range(ROUNDS):
        stays = ((stays[:, None] @ rivals)[:, 0] < 0.5).float()
    scores, index = (scores * stays).topk(min(top, count))
    return boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores


def _overlap(boxes_xyxy: Tensor, iou: float) -> Tensor:
    """[B, C, C]: whether two boxes' intersection is more than `iou` of their union."""
    low, high = boxes_xyxy[:, :, None], boxes_xyxy[:, None]
    across = (torch.minimum(low[..., 2], high[..., 2]) - torch.maximum(low[..., 0], high[..., 0])).clamp(min=0)
    down = (torch.minimum(low[..., 3], high[..., 3]) - torch.maximum(low[..., 1], high[..., 1])).clamp(min=0)
    # i / (a + b - i) > t, without the division.
    area = (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1]) * (iou / (1 + iou))
    return across * down > area[:, :, None] + area[:, None]
