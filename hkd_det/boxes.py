"""Box functions for NumPy arrays.

Boxes are xyxy in pixels: x to the right, y down, the right and bottom edges exclusive. A box
(x1, y1, x2, y2) covers x1 <= x < x2, so its width is x2 - x1. The readers convert other formats,
such as COCO's xywh and the 1-based inclusive boxes of MATLAB tools.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.floating]


def xyxy_from_xywh(boxes_xywh: Boxes) -> Boxes:
    """Convert boxes from (x, y, width, height) to (x1, y1, x2, y2).

    Args:
        boxes_xywh (array[N, 4] or array[4]): xywh.

    Returns:
        array[N, 4]: xyxy.
    """
    boxes = np.asarray(boxes_xywh).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def xywh_from_xyxy(boxes_xyxy: Boxes) -> Boxes:
    """Convert boxes from (x1, y1, x2, y2) to (x, y, width, height).

    Args:
        boxes_xyxy (array[N, 4] or array[4]): xyxy.

    Returns:
        array[N, 4]: xywh.
    """
    boxes = np.asarray(boxes_xyxy).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def box_area(boxes_xyxy: Boxes) -> NDArray[np.floating]:
    """Compute box areas.

    Args:
        boxes_xyxy (array[N, 4]): xyxy, pixels.

    Returns:
        array[N]: Areas in square pixels; 0 for an inverted box.
    """
    sides = np.clip(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0, None)
    return sides[:, 0] * sides[:, 1]


def box_intersection(boxes1_xyxy: Boxes, boxes2_xyxy: Boxes) -> NDArray[np.floating]:
    """Compute the intersection area of each pair of boxes.

    Args:
        boxes1_xyxy (array[N, 4]): xyxy, pixels.
        boxes2_xyxy (array[M, 4]): xyxy, pixels.

    Returns:
        array[N, M]: Areas in square pixels.
    """
    low = np.maximum(boxes1_xyxy[:, None, :2], boxes2_xyxy[None, :, :2])  # [N, M, 2]
    high = np.minimum(boxes1_xyxy[:, None, 2:], boxes2_xyxy[None, :, 2:])  # [N, M, 2]
    sides = np.clip(high - low, 0, None)
    return sides[..., 0] * sides[..., 1]


def box_iou(boxes1_xyxy: Boxes, boxes2_xyxy: Boxes) -> NDArray[np.floating]:
    """Compute the intersection over union (Jaccard index) of each pair of boxes.

    Args:
        boxes1_xyxy (array[N, 4]): xyxy, pixels.
        boxes2_xyxy (array[M, 4]): xyxy, pixels.

    Returns:
        array[N, M]: IoU, 0 to 1; 0 if both boxes are empty.
    """
    intersection = box_intersection(boxes1_xyxy, boxes2_xyxy)
    union = box_area(boxes1_xyxy)[:, None] + box_area(boxes2_xyxy)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def clip_boxes(boxes_xyxy: Boxes, size_hw: tuple[int, int]) -> Boxes:
    """Clip boxes to the image.

    Args:
        boxes_xyxy (array[N, 4]): xyxy, pixels.
        size_hw: Image height and width in pixels.

    Returns:
        array[N, 4]: Clipped boxes, xyxy.
    """
    height, width = size_hw
    return np.clip(boxes_xyxy, 0, [width, height, width, height])


def rotate_boxes(boxes_xyxy: Boxes, num_turns: int, size_hw: tuple[int, int]) -> Boxes:
    """Rotate boxes with their image by multiples of 90 degrees, counterclockwise, as `np.rot90`.

    Args:
        boxes_xyxy (array[N, 4]): xyxy, pixels.
        num_turns: Number of turns by 90 degrees, at least 0.
        size_hw: Height and width of the image before the rotation, in pixels.

    Returns:
        array[N, 4]: xyxy, pixels of the rotated image.
    """
    height, width = size_hw
    for _ in range(num_turns % 4):
        x1, y1, x2, y2 = boxes_xyxy.T
        boxes_xyxy = np.stack([y1, width - x2, y2, width - x1], axis=1)
        height, width = width, height
    return boxes_xyxy


def nms(boxes_xyxy: Boxes, iou_threshold: float) -> NDArray[np.intp]:
    """Perform greedy non-maximum suppression.

    Args:
        boxes_xyxy (array[N, 4]): xyxy, in descending order of score.
        iou_threshold: A box is removed if its IoU with a kept box of higher score is above this value.

    Returns:
        array[K]: Ascending indices of the kept boxes.
    """
    if not len(boxes_xyxy):
        return np.zeros(0, np.intp)
    boxes_xywh = np.clip(xywh_from_xyxy(boxes_xyxy), (-np.inf, -np.inf, 0, 0), None)
    scores = np.arange(len(boxes_xyxy), 0, -1, dtype=np.float32)  # keeps the order of the boxes
    return np.asarray(cv2.dnn.NMSBoxes(boxes_xywh.tolist(), scores.tolist(), 0.0, iou_threshold), np.intp)
