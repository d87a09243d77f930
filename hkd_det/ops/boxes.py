"""Operations on box tensors that torchvision does not have, and suppression of duplicate detections.

`peak_nms`, `decay_duplicate_scores` and `cluster_nms` have shapes that do not depend on values, so they can be exported
to every runtime.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, nms

CELLS_PER_GT_HEIGHT = 8  # Height of a box in cells of the feature level that it belongs to.

SUPPRESSED_LOGIT = -20.0  # a score of 2e-9

# Neighbors in flat regions of a score map differ by rounding only, and the highest one depends on the runtime. All
# neighbors within this tolerance of the maximum are kept.
TIE_TOLERANCE = 1e-3

# Two boxes with an IoU up to the first value are two persons; from the second value on, they are one person. In the
# Reasonable setup of the CityPersons validation set, 4.4 % of the persons overlap another one by more than 0.6, and
# 0.8 % by more than 0.8 (benchmarks/studies/duplicate_suppression.py --crowd).
IOU_LIMITS = (0.6, 0.8)

# A box with a higher logit suppresses another one completely if the difference is at least this margin, and partly
# below it. With a hard comparison, the result would depend on the rounding of the runtime. Two boxes with equal logits
# are both kept, as in `peak_nms`.
LOGIT_MARGIN = 0.02

# Boxes with a lower rank are not compared. Suppression fades out over the second half of these ranks, because rounding
# also determines which box has the last rank.
NMS_TOPK = 100

IOU_THRESHOLD = 0.7  # the default of Ultralytics
PRE_NMS_TOPK = 1000  # boxes per image that enter non-maximum suppression
CHUNK_SIZE = 250  # boxes of `cluster_nms` that are resolved together, in descending order of score

# Each iteration resolves one more link of a chain within a chunk (A suppresses B, so B does not suppress C, ...).
# Longer chains do not occur in the outputs of a trained detector.
MAX_ITERATIONS = 16


def pairwise_intersection(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the intersection areas of all pairs of boxes.

    Args:
        boxes1 (Tensor[..., N, 4]): xyxy.
        boxes2 (Tensor[..., M, 4]): xyxy.

    Returns:
        area (Tensor[..., N, M]): Intersection areas.
    """
    # Per coordinate: operations on a trailing axis of two are several times slower.
    boxes1, boxes2 = boxes1[..., :, None, :], boxes2[..., None, :, :]
    width = (torch.minimum(boxes1[..., 2], boxes2[..., 2]) - torch.maximum(boxes1[..., 0], boxes2[..., 0])).clamp(min=0)
    height = (torch.minimum(boxes1[..., 3], boxes2[..., 3]) - torch.maximum(boxes1[..., 1], boxes2[..., 1])).clamp(
        min=0
    )
    return width * height


def batched_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the IoU of all pairs of boxes per image, as `torchvision.ops.box_iou` does for one image.

    Args:
        boxes1 (Tensor[B, N, 4]): xyxy.
        boxes2 (Tensor[B, M, 4]): xyxy. Inverted boxes have area 0.

    Returns:
        iou (Tensor[B, N, M]): 0 to 1; 0 for two empty boxes.
    """
    intersection = pairwise_intersection(boxes1, boxes2)
    union = _clamped_area(boxes1)[..., :, None] + _clamped_area(boxes2)[..., None, :] - intersection
    return intersection / union.clamp(min=1e-6)  # below any real area, and above 0 in float16


def giou_loss(boxes_xyxy: Tensor, target_boxes_xyxy: Tensor) -> Tensor:
    """Compute torchvision's `generalized_box_iou_loss` for boxes that may be inverted (Rezatofighi et al. 2019).

    A detector that regresses plain distances can predict x2 < x1 or y2 < y1. Such a box would have a negative area.
    This function treats it as a box of area 0: along an inverted axis, the point between both coordinates that is
    nearest to the target center replaces them. The enclosing box and its gradient do not change.

    Args:
        boxes_xyxy (Tensor[..., 4]): Predicted boxes.
        target_boxes_xyxy (Tensor[..., 4]): Target boxes, not inverted.

    Returns:
        loss (Tensor[...]): 1 - GIoU, 0 to 2, not reduced.
    """
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    target_center = (target_boxes_xyxy[..., :2] + target_boxes_xyxy[..., 2:]) / 2
    point = torch.minimum(torch.maximum(target_center, high), low)
    is_inverted = high < low
    boxes_xyxy = torch.cat([torch.where(is_inverted, point, low), torch.where(is_inverted, point, high)], -1)
    loss: Tensor = generalized_box_iou_loss(boxes_xyxy, target_boxes_xyxy)
    return loss


def points_in_boxes(points: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Test which points are strictly inside which boxes.

    Args:
        points (Tensor[A, 2]): (x, y).
        boxes_xyxy (Tensor[B, M, 4]): xyxy.

    Returns:
        inside (Tensor[B, M, A]): bool.
    """
    x1, y1, x2, y2 = boxes_xyxy[..., None, :].unbind(-1)  # [B, M, 1]
    x, y = points.unbind(-1)  # [A]
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)


def clip_boxes_traceable(boxes_xyxy: Tensor, image_hw: Tensor) -> Tensor:
    """Clip boxes to the image, with the image size as tensor.

    Args:
        boxes_xyxy (Tensor[..., 4]): xyxy, pixels.
        image_hw (Tensor[2]): Height and width of the image, pixels.

    Returns:
        boxes (Tensor[..., 4]): Clipped boxes.
    """
    return torch.minimum(boxes_xyxy.clamp(min=0), image_hw.flip(0).repeat(2))


def _clamped_area(boxes_xyxy: Tensor) -> Tensor:
    width, height = boxes_xyxy[..., 2] - boxes_xyxy[..., 0], boxes_xyxy[..., 3] - boxes_xyxy[..., 1]
    return width.clamp(min=0) * height.clamp(min=0)


def peak_nms(logits: Tensor, input_hw: tuple[int, int], strides: Sequence[int]) -> Tensor:
    """Keep only the local maxima of each score map (CenterNet, Zhou et al. 2019).

    Args:
        logits (Tensor[B, A]): Score logits of all anchor points, fine level first, row by row.
        input_hw: Height and width of the input images, pixels.
        strides: Strides of the levels, fine to coarse, pixels.

    Returns:
        logits (Tensor[B, A]): `logits`, or `SUPPRESSED_LOGIT` where one of the 8 neighbors is higher by more than
            `TIE_TOLERANCE`.
    """
    levels, start = [], 0
    for stride in strides:
        height, width = input_hw[0] // stride, input_hw[1] // stride
        level = logits[:, start : start + height * width].reshape(-1, 1, height, width)
        highest = F.max_pool2d(level, 3, stride=1, padding=1)
        peaks = torch.where(level >= highest - TIE_TOLERANCE, level, torch.full_like(level, SUPPRESSED_LOGIT))
        levels.append(peaks.flatten(1))
        start += height * width
    return torch.cat(levels, 1)


def decay_duplicate_scores(boxes_xyxy: Tensor, logits: Tensor) -> Tensor:
    """Reduce the scores of boxes that overlap a better box: Matrix NMS (SOLOv2, Wang et al. 2020) without steps.

    s_j = sigmoid(l_j) * (1 - f_j * max_i duplicate(IoU_ij) * lead(l_i - l_j)). `duplicate` rises linearly from 0 to 1
    within `IOU_LIMITS`, `lead` within 0 and `LOGIT_MARGIN`. f_j falls from 1 to 0 over the second half of the first
    `NMS_TOPK` ranks. The result is continuous in all inputs.

    Args:
        boxes_xyxy (Tensor[B, K, 4]): Boxes, in descending order of logit.
        logits (Tensor[B, K]): Score logits.

    Returns:
        scores (Tensor[B, K]): float32, 0 to 1, in the order of the boxes.
    """
    top_boxes, top_logits = boxes_xyxy[:, :NMS_TOPK].float(), logits[:, :NMS_TOPK].float() / LOGIT_MARGIN
    slope = 1 / (IOU_LIMITS[1] - IOU_LIMITS[0])
    duplicate = (batched_box_iou(top_boxes, top_boxes) * slope - IOU_LIMITS[0] * slope).clamp(0, 1)  # [B, i, j]
    lead = (top_logits[:, :, None] - top_logits[:, None]).clamp(0, 1)
    rank = torch.arange(top_boxes.shape[1], dtype=top_boxes.dtype, device=top_boxes.device)
    fade = (2 - rank * (2 / NMS_TOPK)).clamp(0, 1)
    scores = logits.float().sigmoid()
    return torch.cat([scores[:, :NMS_TOPK] * (1 - fade * (duplicate * lead).amax(1)), scores[:, NMS_TOPK:]], 1)


def suppress_duplicates(boxes_xyxy: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Apply `decay_duplicate_scores` and sort the result.

    Args:
        boxes_xyxy (Tensor[B, K, 4]): Boxes, in descending order of logit.
        logits (Tensor[B, K]): Score logits.

    Returns:
        boxes (Tensor[B, K, 4]): Sorted boxes.
        scores (Tensor[B, K]): 0 to 1, descending.
    """
    scores, index = decay_duplicate_scores(boxes_xyxy, logits).topk(logits.shape[1])
    return boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores


def batched_nms(
    boxes_xyxy: Tensor,
    scores: Tensor,
    max_det: int,
    iou_threshold: float = IOU_THRESHOLD,
    pre_nms_topk: int = PRE_NMS_TOPK,
) -> tuple[Tensor, Tensor]:
    """Run torchvision's non-maximum suppression on all images at once.

    Args:
        boxes_xyxy (Tensor[B, A, 4]): Boxes.
        scores (Tensor[B, A]): Scores, 0 to 1.
        max_det: Maximum number of detections per image.
        iou_threshold: A box is removed if its IoU with a better box that remains is higher.
        pre_nms_topk: Number of boxes per image that are compared, at least `max_det`.

    Returns:
        boxes (Tensor[B, K, 4]): Remaining boxes, K = min(max_det, A).
        scores (Tensor[B, K]): Descending. Unused rows have score 0.
    """
    count = min(max(pre_nms_topk, max_det), scores.shape[1])
    scores, index = scores.topk(count)  # [B, C]
    boxes_xyxy = boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
    # An offset per image separates the images. index.shape[0] stays symbolic in an export, len(index) does not.
    span = boxes_xyxy.max() - boxes_xyxy.min() + 1
    offset = torch.arange(index.shape[0], device=index.device)[:, None, None] * span
    kept = nms((boxes_xyxy + offset).flatten(0, 1), scores.flatten(), iou_threshold)
    is_kept = torch.zeros_like(scores).flatten().index_fill(0, kept, 1.0).view_as(scores)
    scores, index = (scores * is_kept).topk(min(max_det, count))
    return boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores


def cluster_nms(
    boxes_xyxy: Tensor,
    scores: Tensor,
    max_det: int,
    iou_threshold: float = IOU_THRESHOLD,
    pre_nms_topk: int = PRE_NMS_TOPK,
) -> tuple[Tensor, Tensor]:
    """Compute the result of `batched_nms` by matrix products of fixed shape (Cluster-NMS, Zheng et al. 2021).

    The number of outputs of the ONNX operator NonMaxSuppression depends on values. TensorRT for RTX cannot build it,
    TensorRT 10.3 fails at it in INT8, and a CUDA graph cannot contain it.

    Args:
        boxes_xyxy (Tensor[B, A, 4]): Boxes.
        scores (Tensor[B, A]): Scores, 0 to 1.
        max_det: Maximum number of detections per image.
        iou_threshold: A box is removed if its IoU with a better box that remains is higher.
        pre_nms_topk: Number of boxes per image that are compared, at least `max_det`.

    Returns:
        boxes (Tensor[B, K, 4]): Remaining boxes, K = min(max_det, A).
        scores (Tensor[B, K]): Descending. Unused rows have score 0.
    """
    count = min(max(pre_nms_topk, max_det), int(scores.shape[1]))
    scores, index = scores.topk(count)  # [B, C]
    boxes_xyxy = boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4))
    kept_chunks, candidates = [], torch.ones_like(scores)
    for start in range(0, count, CHUNK_SIZE):
        chunk = boxes_xyxy[:, start : start + CHUNK_SIZE]
        overlaps = _exceeds_iou(chunk, boxes_xyxy[:, start:], iou_threshold).float()  # [B, chunk, C - start]
        size = min(CHUNK_SIZE, count - start)
        kept = _resolve_chunk(candidates[:, :size], overlaps[:, :, :size])
        kept_chunks.append(kept)
        candidates = candidates[:, size:] * (kept[:, None] @ overlaps[:, :, size:] < 0.5)[:, 0]
    scores, index = (scores * torch.cat(kept_chunks, 1)).topk(min(max_det, count))
    return boxes_xyxy.gather(1, index[..., None].expand(-1, -1, 4)), scores


def nms_detections(
    boxes_xyxy: Sequence[Tensor], scores: Sequence[Tensor], iou_threshold: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run torchvision's non-maximum suppression on lists of detections.

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


def _resolve_chunk(candidates: Tensor, overlaps: Tensor) -> Tensor:
    """Return [B, N], 1 for each candidate [B, N] that no better remaining box overlaps, given overlaps [B, N, N]."""
    size = overlaps.shape[1]
    suppressors = overlaps * (torch.arange(size)[:, None] < torch.arange(size)).float()  # better boxes only
    candidates = candidates[:, None]
    kept = candidates
    for _ in range(MAX_ITERATIONS):
        kept = torch.where(kept @ suppressors < 0.5, candidates, 0.0)
    return kept[:, 0]


def _exceeds_iou(boxes1: Tensor, boxes2: Tensor, iou_threshold: float) -> Tensor:
    """Return [B, N, M] bool: whether the IoU of boxes [B, N, 4] and [B, M, 4] is above the threshold."""
    # i / (a + b - i) > t without a division.
    scale = iou_threshold / (1 + iou_threshold)
    areas1, areas2 = (
        ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])) * scale for boxes in (boxes1, boxes2)
    )
    return pairwise_intersection(boxes1, boxes2) > areas1[..., :, None] + areas2[..., None, :]
