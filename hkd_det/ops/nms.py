"""Doubles: of boxes that show the same person only the best keeps its score, from whatever points and levels they are.

Training tells all points but one to be silent. Each learns it by itself, and in few epochs not well enough
(docs/explanation/architecture.md).

Peaks: of neighbouring points that see one person only the best keeps its score (CenterNet, Zhou et al. 2019).

Non-maximum suppression with shapes that depend on no value, so that it can be exported.

Non-maximum suppression in a graph without the operator NonMaxSuppression.

How many boxes that operator leaves depends on values: TensorRT for RTX cannot build it, TensorRT 10.3 fails at it in
INT8, and a CUDA graph cannot hold it. Matrix products of fixed shape say the same everywhere (Cluster-NMS, Zheng et
al. 2021): in each round a box stays if no better box that stays overlaps it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

from hkd_det.ops.boxes import batched_box_iou, pairwise_intersection

# Share of two boxes' union that they have in common: up to the first they are two people, from the second on one. Of
# the Reasonable people in CityPersons' validation set 4.4 % share more than 0.6 with another, 0.8 % more than 0.8
# (benchmarks/studies/duplicate_suppression.py --crowd).
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
    same = (batched_box_iou(best, best) * steep - IOU_LIMITS[0] * steep).clamp(0, 1)
    lead = (leads[:, :, None] - leads[:, None]).clamp(0, 1)
    rank = torch.arange(best.shape[1], dtype=best.dtype, device=best.device)
    fade = (2 - rank * (2 / NMS_TOPK)).clamp(0, 1)
    scores = logits.float().sigmoid()
    return torch.cat([scores[:, :NMS_TOPK] * (1 - fade * (same * lead).amax(1)), scores[:, NMS_TOPK:]], 1)


def suppress_duplicates(boxes_xyxy: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [B, K, 4] and their `distinct` scores [B, K], falling, of boxes and logits that fall."""
    scores, index = decay_duplicate_scores(boxes_xyxy, logits).topk(logits.shape[1])
    return boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores


SUPPRESSED_LOGIT = -20.0  # a logit: a score of 2e-9


# Over flat ground neighbours differ by rounding alone, and each runtime would choose another: such ties all stay.
TIE_TOLERANCE = 1e-3


def peak_nms(logits: Tensor, input_hw: tuple[int, int], strides: Sequence[int]) -> Tensor:
    """[B, A] score logits with those silenced that a point next to them, on their own level, exceeds.

    A max-pooling, not a suppression by boxes: every runtime has it, and it costs nothing.
    """
    kept, start = [], 0
    for stride in strides:
        height, width = input_hw[0] // stride, input_hw[1] // stride
        level = logits[:, start : start + height * width].reshape(-1, 1, height, width)
        highest = F.max_pool2d(level, 3, stride=1, padding=1)
        kept.append(
            torch.where(level >= highest - TIE_TOLERANCE, level, torch.full_like(level, SUPPRESSED_LOGIT)).flatten(1)
        )
        start += height * width
    return torch.cat(kept, 1)


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


def nms_detections(
    boxes_xyxy: Sequence[Tensor], scores: Sequence[Tensor], iou_threshold: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run non-maximum suppression on each image.

    Args:
        boxes_xyxy (sequence of Tensor[N, 4]): Boxes per image.
        scores (sequence of Tensor[N]): Scores per image.
        iou_threshold: A box is removed if its IoU with a better box that remains is higher.

    Returns:
        boxes (tuple of Tensor[K, 4]): Remaining boxes per image, best first.
        scores (tuple of Tensor[K]): Their scores.
    """
    kept = [
        nms(image_boxes.float(), image_scores.float(), iou_threshold)
        for image_boxes, image_scores in zip(boxes_xyxy, scores, strict=True)
    ]
    return (
        tuple(image_boxes[index] for image_boxes, index in zip(boxes_xyxy, kept, strict=True)),
        tuple(image_scores[index] for image_scores, index in zip(scores, kept, strict=True)),
    )


BLOCK_SIZE = 250  # boxes, by falling score, that are settled together before the next are looked at


# A round settles one more link of a chain within a block (A beats B, so B no longer beats C, ...). Chains in which
# scores fall from neighbour to neighbour 16 times are not seen where a detector has learnt anything.
MAX_ITERATIONS = 16


def cluster_nms(
    boxes_xyxy: Tensor, scores: Tensor, max_det: int, iou_threshold: float = IOU_THRESHOLD
) -> tuple[Tensor, Tensor]:
    """`hkd_det.ops.nms.suppressed`, the same answers, for boxes [B, A, 4] and scores [B, A]."""
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
    # i / (a + b - i) > t without a division.
    scale = iou_threshold / (1 + iou_threshold)
    areas1, areas2 = (
        ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])) * scale for boxes in (boxes1, boxes2)
    )
    return pairwise_intersection(boxes1, boxes2) > areas1[..., :, None] + areas2[..., None, :]
