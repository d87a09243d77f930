"""Suppression by matrix products keeps the boxes that torchvision's keeps."""

import pytest
import torch

from hkd_det.ops import nms as suppression
from hkd_det.ops.nms import MAX_ITERATIONS, cluster_nms


def piles(spread_px: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures with 1,500 boxes of 40 to 80 px each, their middles within `spread_px`."""
    chance = torch.Generator().manual_seed(seed)
    middles = torch.rand(2, 1500, 2, generator=chance) * spread_px
    sides = torch.rand(2, 1500, 2, generator=chance) * 40 + 40
    return torch.cat([middles - sides / 2, middles + sides / 2], -1), torch.rand(2, 1500, generator=chance)


@pytest.mark.parametrize("iou", [0.5, 0.7])
@pytest.mark.parametrize("spread_px", [20.0, 60.0, 200.0, 640.0])
def test_the_same_boxes_as_torchvision(spread_px: float, iou: float) -> None:
    boxes, scores = piles(spread_px, seed=int(spread_px))
    wanted_boxes, wanted_scores = suppression.batched_nms(boxes, scores, 300, iou)
    found_boxes, found_scores = cluster_nms(boxes, scores, 300, iou)
    assert torch.equal(found_scores, wanted_scores) and (found_scores > 0).sum() > 2
    assert torch.equal(found_boxes[found_scores > 0], wanted_boxes[wanted_scores > 0])


def test_a_chain_is_followed_round_by_round() -> None:
    """Each beats the next alone: every other one stays."""
    left = torch.arange(MAX_ITERATIONS) * 2.0
    boxes = torch.stack([left, 0 * left, left + 10, 0 * left + 10], -1)[None]
    _, scores = cluster_nms(
        boxes, torch.linspace(0.9, 0.1, MAX_ITERATIONS)[None], 300, iou_threshold=0.6
    )  # neighbours share 2/3
    assert (scores > 0).sum() == MAX_ITERATIONS / 2


def test_fewer_boxes_than_asked_for() -> None:
    boxes, scores = cluster_nms(torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 9]]]), torch.tensor([[0.4, 0.6]]), 300)
    assert torch.equal(scores, torch.tensor([[0.6, 0.0]])) and boxes.shape == (1, 2, 4)
