"""Doubles: of boxes that show the same person only the best keeps its score, from whatever points and levels they are.

Training tells all points but one to be silent. Each learns it by itself, and in few epochs not well enough
(docs/architecture.md).
"""

import torch
from torch import Tensor

# Share of two boxes' union that they have in common: up to the first they are two people, from the second on one. Of
# the Reasonable people in CityPersons' validation set 4.4 % share more than 0.6 with another, 0.8 % more than 0.8
# (benchmarks/studies/doubles.py --crowd).
IOU_LIMITS = (0.6, 0.8)
# From 0 to this lead in logits a better box takes a worse one's score. Steps would make each runtime choose differently
# where scores or overlaps differ by rounding; of two that are the same to the last digit both stay, as peaks do.
LOGIT_MARGIN = 0.02
# The best boxes are compared with each other: further down nobody is found, once or twice. Over the second half of them
# it fades out, as who is the hundredth is rounding's choice, too.
NMS_TOPK = 100


def decay_duplicate_scores(boxes_xyxy: Tensor, logits: Tensor) -> Tensor:
    """Scores [B, K], 0..1, of boxes [B, K, 4] with logits [B, K], falling: less the more a better box shows the same.

    s_j = sigmoid(l_j) (1 - f_j max_i same(IoU_ij) lead(l_i - l_j)); same and lead rise from 0 to 1 within `SAME` and
    `LEAD`, f falls from 1 to 0 over the second half of `RIVALS`. A Matrix NMS (SOLOv2, Wang et al. 2020) that is
    continuous in all that it is given. Shapes depend on no value.
    """
    best, leads = boxes_xyxy[:, :NMS_TOPK].float(), logits[:, :NMS_TOPK].float() / LOGIT_MARGIN
    steep = 1 / (IOU_LIMITS[1] - IOU_LIMITS[0])
    same = (_broadcast_box_iou(best[:, :, None], best[:, None]) * steep - IOU_LIMITS[0] * steep).clamp(0, 1)
    lead = (leads[:, :, None] - leads[:, None]).clamp(0, 1)
    rank = torch.arange(best.shape[1], dtype=best.dtype, device=best.device)
    fade = (2 - rank * (2 / NMS_TOPK)).clamp(0, 1)
    scores = logits.float().sigmoid()
    return torch.cat([scores[:, :NMS_TOPK] * (1 - fade * (same * lead).amax(1)), scores[:, NMS_TOPK:]], 1)


def suppress_duplicates(boxes_xyxy: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [B, K, 4] and their `distinct` scores [B, K], falling, of boxes and logits that fall."""
    scores, index = decay_duplicate_scores(boxes_xyxy, logits).topk(logits.shape[1])
    return boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores


def _broadcast_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4] that broadcast; 0 where both are empty."""
    across = (torch.minimum(boxes1[..., 2], boxes2[..., 2]) - torch.maximum(boxes1[..., 0], boxes2[..., 0])).clamp(
        min=0
    )
    down = (torch.minimum(boxes1[..., 3], boxes2[..., 3]) - torch.maximum(boxes1[..., 1], boxes2[..., 1])).clamp(min=0)
    shared = across * down
    # The millionth of a square pixel keeps empty boxes from dividing by 0.
    areas = [(one[..., 2] - one[..., 0]) * (one[..., 3] - one[..., 1]) + 1e-6 for one in (boxes1, boxes2)]
    return shared / (areas[0] + areas[1] - shared)
