"""Non-maximum suppression with shapes that depend on no value, so that it can be exported."""

import torch
from torch import Tensor
from torchvision.ops import nms

IOU_THRESHOLD = 0.7  # Ultralytics' own threshold
PRE_NMS_TOPK = 1000  # the best of a picture that suppression looks at


def batched_nms(
    boxes_xyxy: Tensor, scores: Tensor, max_det: int, iou_threshold: float = IOU_THRESHOLD
) -> tuple[Tensor, Tensor]:
    """The best boxes [B, K, 4] and scores [B, K], falling, of boxes [B, A, 4] and scores [B, A], 0..1.

    K is `top`, or A where that is smaller. Who overlaps a better one by more than `iou` is gone; 0 fills up.
    """
    count = min(max(PRE_NMS_TOPK, max_det), scores.shape[1])
    scores, index = scores.topk(count)  # [B, C]
    boxes_xyxy = boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
    # All pictures at once, each moved to ground of its own. index.shape[0], not len(index), stays free when exported.
    width = boxes_xyxy.max() - boxes_xyxy.min() + 1
    ground = torch.arange(index.shape[0], device=index.device)[:, None, None] * width
    kept = nms((boxes_xyxy + ground).flatten(0, 1), scores.flatten(), iou_threshold)
    stays = torch.zeros_like(scores).flatten().index_fill(0, kept, 1.0).view_as(scores)
    scores, index = (scores * stays).topk(min(max_det, count))
    return boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores
