"""Boxes as numpy arrays: xyxy, pixels, x right, y down, right and bottom edges exclusive.

A box (x1, y1, x2, y2) covers x1 <= x < x2; its width is x2 - x1. COCO's xywh and the 1-based
inclusive boxes of MATLAB tools end at the readers.
"""

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.floating]


def xyxy_from_xywh(boxes_xywh: Boxes) -> Boxes:
    """[N, 4] (x, y, width, height) to [N, 4] (x1, y1, x2, y2)."""
    boxes = np.asarray(boxes_xywh).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def xywh_from_xyxy(boxes_xyxy: Boxes) -> Boxes:
    """[N, 4] (x1, y1, x2, y2) to [N, 4] (x, y, width, height)."""
    boxes = np.asarray(boxes_xyxy).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def box_area(boxes_xyxy: Boxes) -> NDArray[np.floating]:
    """[N] areas in square pixels; 0 for an inverted box."""
    sides = np.clip(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0, None)
    return sides[:, 0] * sides[:, 1]


def box_intersection(boxes1_xyxy: Boxes, boxes2_xyxy: Boxes) -> NDArray[np.floating]:
    """[N, M] shared areas of N and M boxes, in square pixels."""
    low = np.maximum(boxes1_xyxy[:, None, :2], boxes2_xyxy[None, :, :2])  # [N, M, 2]
    high = np.minimum(boxes1_xyxy[:, None, 2:], boxes2_xyxy[None, :, 2:])  # [N, M, 2]
    sides = np.clip(high - low, 0, None)
    return sides[..., 0] * sides[..., 1]


def box_iou(boxes1_xyxy: Boxes, boxes2_xyxy: Boxes) -> NDArray[np.floating]:
    """[N, M] intersection over union, 0..1; 0 where both boxes are empty."""
    shared = box_intersection(boxes1_xyxy, boxes2_xyxy)
    union = box_area(boxes1_xyxy)[:, None] + box_area(boxes2_xyxy)[None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def clip_boxes(boxes_xyxy: Boxes, size_hw: tuple[int, int]) -> Boxes:
    """[N, 4] boxes cut at the borders of a picture of (height, width) pixels."""
    height, width = size_hw
    return np.clip(boxes_xyxy, 0, [width, height, width, height])


def nms(boxes_xyxy: Boxes, iou_threshold: float) -> NDArray[np.intp]:
    """Which of [N, 4] boxes, best first, stay: those that overlap no better one that stays by more than `iou`."""
    overlaps = box_iou(boxes_xyxy, boxes_xyxy) > iou_threshold
    gone = np.zeros(len(boxes_xyxy), bool)
    for index in range(len(boxes_xyxy)):
        if not gone[index]:
            gone[index + 1 :] |= overlaps[index, index + 1 :]
    return np.flatnonzero(~gone)
