"""Cluster NMS: agreement with torchvision, and its limit of iterations."""

import pytest
import torch

from hkd_det.ops.boxes import MAX_ITERATIONS, batched_nms, cluster_nms


def make_clusters(spread_px: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make boxes [2, 1500, 4] with sides of 40 to 80 px and centers within `spread_px`, and scores [2, 1500]."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(2, 1500, 2, generator=generator) * spread_px
    sides = torch.rand(2, 1500, 2, generator=generator) * 40 + 40
    return torch.cat([centers - sides / 2, centers + sides / 2], -1), torch.rand(2, 1500, generator=generator)


@pytest.mark.parametrize("iou_threshold", [0.5, 0.7])
@pytest.mark.parametrize("spread_px", [20.0, 60.0, 200.0, 640.0])
def test_cluster_nms_agrees_with_torchvision(spread_px: float, iou_threshold: float) -> None:
    boxes, scores = make_clusters(spread_px, seed=int(spread_px))
    expected_boxes, expected_scores = batched_nms(boxes, scores, 300, iou_threshold)
    actual_boxes, actual_scores = cluster_nms(boxes, scores, 300, iou_threshold)
    assert torch.equal(actual_scores, expected_scores) and (actual_scores > 0).sum() > 2
    assert torch.equal(actual_boxes[actual_scores > 0], expected_boxes[expected_scores > 0])


def test_cluster_nms_resolves_chain_of_overlaps() -> None:
    """Each box overlaps only the next, so that every second box remains."""
    left = torch.arange(MAX_ITERATIONS) * 2.0
    boxes = torch.stack([left, 0 * left, left + 10, 0 * left + 10], -1)[None]
    scores = torch.linspace(0.9, 0.1, MAX_ITERATIONS)[None]
    _, scores = cluster_nms(boxes, scores, 300, iou_threshold=0.6)  # neighboring boxes have an IoU of 2/3
    assert (scores > 0).sum() == MAX_ITERATIONS / 2


def test_cluster_nms_with_fewer_boxes_than_max_det() -> None:
    boxes, scores = cluster_nms(torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 9]]]), torch.tensor([[0.4, 0.6]]), 300)
    assert torch.equal(scores, torch.tensor([[0.6, 0.0]])) and boxes.shape == (1, 2, 4)
