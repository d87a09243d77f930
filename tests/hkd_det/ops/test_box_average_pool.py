"""BoxAveragePool against closed forms and torchvision's RoIAlign."""

import torch
from torchvision.ops import roi_align

from hkd_det.ops.roi_pool import BoxAveragePool


def test_pooled_vector_of_a_ramp_is_its_value_at_the_box_center() -> None:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    ramp = torch.stack([x, y, 2 * x - y])[None].expand(2, -1, -1, -1)
    rois = torch.tensor([[0.0, 8.0, 8.0, 40.0, 50.0], [1.0, 20.0, 10.0, 31.0, 53.0]])
    center_x, center_y = ((rois[:, 1:3] + rois[:, 3:5]) / 2 / 4 - 0.5).unbind(1)
    expected = torch.stack([center_x, center_y, 2 * center_x - center_y], 1)
    torch.testing.assert_close(BoxAveragePool(rois, (64, 96))([ramp]), expected)


def test_one_level_matches_roi_align_with_one_bin() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 5, 16, 24, requires_grad=True)
    rois = torch.tensor([[2.0, 8, 8, 40, 50], [0, 20, 10, 31, 53], [2, 5.5, 3.3, 17.1, 61], [0, 0, 0, 96, 64]])
    pooled = BoxAveragePool(rois, (64, 96))([features])
    expected = roi_align(features, rois, 1, 0.25, 4, aligned=True).flatten(1)
    torch.testing.assert_close(pooled, expected)
    gradients = [torch.autograd.grad(vectors.square().sum(), features)[0] for vectors in (pooled, expected)]
    torch.testing.assert_close(*gradients)


def test_box_height_selects_the_level() -> None:
    features = [torch.full((1, 2, 128 // stride, 128 // stride), float(stride)) for stride in (8, 16)]
    rois = torch.tensor([[0.0, 2.0, 2.0, 20.0, 60.0], [0.0, 2.0, 2.0, 30.0, 120.0]])  # 58 px: stride 8; 118 px: 16
    assert BoxAveragePool(rois, (128, 128))(features)[:, 0].tolist() == [8.0, 16.0]
    assert BoxAveragePool(rois[:1], (128, 128))(features)[:, 0].tolist() == [8.0]  # one level without boxes


def test_gradients_reach_only_the_selected_levels() -> None:
    torch.manual_seed(0)
    features = [torch.randn(2, 3, 128 // stride, 128 // stride, requires_grad=True) for stride in (8, 16)]
    rois = torch.tensor([[1.0, 2, 2, 20, 60], [0, 2, 2, 30, 120], [1, 40, 3, 60, 62]])
    pooled = BoxAveragePool(rois, (128, 128))(features)
    fine, coarse = (
        roi_align(level, rois, 1, 1 / stride, 4, aligned=True) for level, stride in zip(features, (8, 16), strict=True)
    )
    expected = torch.stack([fine[0], coarse[1], fine[2]]).flatten(1)
    torch.testing.assert_close(pooled, expected)
    gradients = [torch.autograd.grad(vectors.square().sum(), features) for vectors in (pooled, expected)]
    for actual, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, reference)
