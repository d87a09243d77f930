"""NumPy box functions and the data structures that hold boxes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms as torchvision_nms

from hkd_det.boxes import box_area, box_intersection, box_iou, nms, xywh_from_xyxy, xyxy_from_xywh
from hkd_det.structures import Detections, GroundTruth

BOXES = st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 20)] * 2).map(
    lambda box: [box[0], box[1], box[0] + box[2], box[1] + box[3]]
)


def draw_mask(box: list[int]) -> np.ndarray:
    mask = np.zeros((60, 60), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


@settings(deadline=None)
@given(st.lists(BOXES, min_size=1, max_size=4), st.lists(BOXES, min_size=1, max_size=4))
def test_overlaps_equal_counted_pixels(first: list[list[int]], second: list[list[int]]) -> None:
    boxes1, boxes2 = np.array(first, float), np.array(second, float)
    intersection, iou = box_intersection(boxes1, boxes2), box_iou(boxes1, boxes2)
    for i, box1 in enumerate(first):
        for j, box2 in enumerate(second):
            expected = int((draw_mask(box1) & draw_mask(box2)).sum())
            assert intersection[i, j] == expected
            assert iou[i, j] == pytest.approx(expected / (draw_mask(box1) | draw_mask(box2)).sum())
    np.testing.assert_array_equal(xyxy_from_xywh(xywh_from_xyxy(boxes1)), boxes1)


def test_empty_and_inverted_boxes_have_no_area() -> None:
    no_boxes = np.zeros((0, 4))
    assert box_iou(no_boxes, no_boxes).shape == (0, 0)
    assert box_area(np.array([[5.0, 5.0, 1.0, 9.0]])).tolist() == [0]
    point = np.array([[3.0, 3.0, 3.0, 3.0]])
    assert box_iou(point, point).tolist() == [[0]]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(0, 40), st.floats(0.05, 0.95))
def test_nms_equals_torchvision(seed: int, count: int, iou_threshold: float) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 40, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (count, 2))], 1)
    scores = torch.arange(count, 0, -1, dtype=torch.float64)
    expected = torchvision_nms(torch.from_numpy(boxes), scores, iou_threshold)
    assert nms(boxes, iou_threshold).tolist() == expected.tolist()


def test_detections_are_sorted_by_score() -> None:
    detections = Detections(np.arange(12, dtype=np.float64).reshape(3, 4), np.array([0.1, 0.9, 0.5]))
    np.testing.assert_allclose(detections.scores, [0.9, 0.5, 0.1])
    assert detections.boxes_xyxy[0].tolist() == [4, 5, 6, 7] and detections.boxes_xyxy.dtype == np.float32
    assert len(detections.filter(0.5)) == 2 and len(Detections.empty()) == 0


def test_arrays_of_different_lengths_are_rejected() -> None:
    with pytest.raises(ValueError, match="2 boxes but 1 scores"):
        Detections(np.zeros((2, 4)), np.zeros(1))
    boxes = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="2 labels"):
        GroundTruth(boxes, np.zeros(1, bool), boxes, ("person", "person"))
