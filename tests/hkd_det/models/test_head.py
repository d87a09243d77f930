"""Anchor points, and boxes as distances from them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.models.head import Head, bbox2dist, dist2bbox, make_anchors, make_prior_box_logits


def test_make_anchors_returns_cell_centers() -> None:
    points, strides = make_anchors((16, 32), (8, 16))
    assert points.tolist() == [
        [4, 4], [12, 4], [20, 4], [28, 4],
        [4, 12], [12, 12], [20, 12], [28, 12],
        [8, 8], [24, 8],
    ]  # fmt: skip
    assert strides.tolist() == [8] * 8 + [16] * 2


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 13.9), min_size=4, max_size=4), st.sampled_from([8.0, 16.0, 32.0]))
def test_dist2bbox_inverts_bbox2dist(distances: list[float], stride: float) -> None:
    point, step = torch.tensor([[200.0, 100.0]]), torch.tensor([stride])
    left, up, right, down = (distance * stride for distance in distances)
    box = torch.tensor([[200 - left, 100 - up, 200 + right, 100 + down]])
    encoded = bbox2dist(box, point, step, reg_max=16)
    low = encoded.long()
    upper_weight = encoded - low
    probability = torch.zeros(1, 4, 16).scatter_(2, low[..., None], (1 - upper_weight)[..., None])
    probability = probability.scatter_add(2, low[..., None] + 1, upper_weight[..., None])
    decoded = dist2bbox(probability.clamp(min=1e-30).log()[None], point, step)
    torch.testing.assert_close(decoded[0], box, atol=1e-2, rtol=1e-4)


def test_bbox2dist_clamps_to_the_last_bin() -> None:
    encoded = bbox2dist(torch.tensor([[-1000.0, 0, 10, 10]]), torch.tensor([[5.0, 5.0]]), torch.tensor([8.0]), 16)
    assert encoded[0, 0] < 15 and encoded[0, 0] > 14.9


def test_first_boxes_have_the_shape_of_a_person() -> None:
    """Without features, a box is eight strides high. Truncation at distance 0 makes it a little wider than 0.41."""
    boxes = dist2bbox(make_prior_box_logits(16).view(1, 1, 4, 16), torch.tensor([[100.0, 200.0]]), torch.tensor([16.0]))
    x1, y1, x2, y2 = boxes[0, 0].tolist()
    assert (y1 + y2) / 2 == pytest.approx(200) and (x1 + x2) / 2 == pytest.approx(100)
    assert y2 - y1 == pytest.approx(8 * 16, rel=0.01)
    assert 0.41 < (x2 - x1) / (y2 - y1) < 0.47
    head = Head(channels=8, depth=1, num_levels=1, reg_max=16)
    torch.testing.assert_close(head.box_logits.bias, make_prior_box_logits(16))
