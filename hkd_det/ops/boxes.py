"""Operations on box tensors that torchvision does not have: batches, inverted boxes and traceable forms."""

import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

CELLS_PER_GT_HEIGHT = 8  # Height of a box in cells of the feature level that it belongs to.


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
