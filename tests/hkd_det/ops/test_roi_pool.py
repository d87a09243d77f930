"""RoI pooling against torchvision, and losses of RoIs on levels of different widths."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import roi_align as torchvision_roi_align

from hkd_det.ops.losses import pkd_loss
from hkd_det.ops.roi_pool import compute_roi_sampling_weights, roi_align, roi_feature_loss, select_roi_levels

STRIDES = (8, 16, 32)
SIDE = 512
ROIS = [
    torch.tensor([[10.0, 10, 60, 120], [0, 0, 500, 500], [100, 50, 260, 400]]),
    torch.zeros(0, 4),
    torch.tensor([[300.0, 200, 500, 510], [7, 9, 11, 30]]),
]
BOXES, IMAGE = torch.cat(ROIS), torch.tensor([0, 0, 0, 2, 2])


def random_features(seed: int, channels: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, width, SIDE // stride, SIDE // stride, generator=generator)
        for width, stride in zip(channels, STRIDES, strict=True)
    ]


def test_roi_feature_loss_equals_torchvision_pooling() -> None:
    student, teacher = random_features(0, (6, 6, 6)), random_features(1, (6, 6, 6))
    pool = MultiScaleRoIAlign([str(stride) for stride in STRIDES], 7, 2)
    pooled, expected = (
        pool({str(stride): level for stride, level in zip(STRIDES, levels, strict=True)}, ROIS, [(SIDE, SIDE)] * 3)
        for levels in (student, teacher)
    )
    expected = pkd_loss(pooled, expected).mean((1, 2))
    assert expected.std() > 0.01
    torch.testing.assert_close(roi_feature_loss(student, teacher, STRIDES, BOXES, IMAGE), expected)


def test_roi_feature_loss_accepts_levels_of_different_width() -> None:
    student, teacher = random_features(0, (3, 5, 7)), random_features(1, (3, 5, 7))
    for level in student:
        level.requires_grad_()
    errors = roi_feature_loss(student, teacher, STRIDES, BOXES, IMAGE)
    assert errors.shape == (5,)
    errors.sum().backward()
    assert all(level.grad is not None and level.grad.any() for level in student)
    torch.testing.assert_close(roi_feature_loss(teacher, teacher, STRIDES, BOXES, IMAGE), torch.zeros(5))


def test_roi_feature_loss_without_rois_is_empty() -> None:
    student = random_features(0, (3, 5, 7))
    assert roi_feature_loss(student, student, STRIDES, BOXES[:0], IMAGE[:0]).shape == (0,)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_roi_align_equals_torchvision_in_value_and_gradient(layout: torch.memory_format) -> None:
    """RoIs inside, across the border, far outside, thinner than a cell, and inverted."""
    generator = torch.Generator().manual_seed(2)
    boxes = torch.tensor(
        [
            [3.0, 5, 60, 90],
            [-40, -30, 30, 20],
            [70, 80, 140, 160],
            [500, 500, 600, 600],
            [9, 9, 10, 9.5],
            [50, 60, 20, 9],
        ]
    )
    boxes = torch.cat([boxes, 120 * torch.rand(20, 4, generator=generator) - 10])
    image = torch.randint(0, 2, (len(boxes),), generator=generator)
    features = torch.randn(2, 5, 12, 10, generator=generator).to(memory_format=layout).requires_grad_()
    actual = roi_align(features, *compute_roi_sampling_weights(boxes, image, 8, (12, 10)))
    expected = torchvision_roi_align(features, torch.cat([image[:, None], boxes], 1), 7, 1 / 8, 2)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    weight = torch.randn(expected.shape, generator=generator)
    grad, expected_grad = (torch.autograd.grad((weight * pooled).sum(), features)[0] for pooled in (actual, expected))
    torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


def test_roi_feature_loss_uses_the_nearest_stride() -> None:
    """Strides 8 and 32: an RoI of the rule's stride 16 is pooled at 8."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = ([torch.randn(1, 3, 512 // s, 512 // s, generator=generator) for s in (8, 32)] for _ in range(2))
    boxes = torch.tensor([[10.0, 10, 60, 120], [50, 50, 270, 270], [0, 0, 500, 500]])  # the rule: 8, 16, 32
    rois = boxes, torch.zeros(3, dtype=torch.int64)
    actual = roi_feature_loss(student, teacher, (8, 32), *rois)
    fine = roi_feature_loss(student[:1], teacher[:1], (8,), *rois)
    coarse = roi_feature_loss(student[1:], teacher[1:], (32,), *rois)
    torch.testing.assert_close(actual, torch.stack([fine[0], fine[1], coarse[2]]))


def test_level_by_height_is_the_one_with_eight_cells() -> None:
    """Heights of 8 cells at strides 8, 16 and 32, of any width; beyond the last level, the last one."""
    heights = torch.tensor([64.0, 128, 256, 400])
    boxes = torch.stack([torch.zeros(4), torch.zeros(4), torch.tensor([20.0, 500, 3, 160]), heights], 1)
    assert select_roi_levels(boxes, STRIDES, "height").int().argmax(1).tolist() == [0, 1, 2, 2]
    assert select_roi_levels(boxes, STRIDES, "height").sum(1).tolist() == [1, 1, 1, 1]
    # 0.41 times as wide as high: the rule of FPN reads a person of 256 px at stride 8.
    person = torch.tensor([[0.0, 0, 105, 256]])
    assert select_roi_levels(person, STRIDES, "fpn").tolist() == [[True, False, False]]


def test_loss_of_all_levels_is_the_mean_of_single_levels() -> None:
    student, teacher = random_features(0, (3, 5, 7)), random_features(1, (3, 5, 7))
    single = [
        roi_feature_loss([s], [t], (stride,), BOXES, IMAGE)
        for s, t, stride in zip(student, teacher, STRIDES, strict=True)
    ]
    actual = roi_feature_loss(student, teacher, STRIDES, BOXES, IMAGE, level_rule="all")
    torch.testing.assert_close(actual, torch.stack(single).mean(0))


def test_batch_norm_keeps_differences_between_regions() -> None:
    """Teacher features are 1 in the left and -1 in the right region, student features 0 everywhere.

    Standardized over one region both are 0. Over both regions, the teacher is +-1: the loss is 0.5 * 1^2.
    """
    student, teacher = torch.zeros(1, 2, 16, 16), torch.ones(1, 2, 16, 16)
    teacher[..., 8:] = -1
    rois = torch.tensor([[0.0, 16, 48, 112], [80, 16, 128, 112]]), torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(roi_feature_loss([student], [teacher], (8,), *rois), torch.zeros(2))
    actual = roi_feature_loss([student], [teacher], (8,), *rois, norm="batch")
    torch.testing.assert_close(actual, torch.tensor([0.5, 0.5]), atol=1e-4, rtol=1e-4)
