"""Region errors against torchvision's pooling, and with levels of different widths."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import roi_align as torchvision_roi_align

from hkd_det.ops.losses import pkd_loss
from hkd_det.ops.roi_pool import roi_align, roi_feature_loss, roi_sampling_weights

STRIDES = (8, 16, 32)
SIDE = 512
REGIONS = [
    torch.tensor([[10.0, 10, 60, 120], [0, 0, 500, 500], [100, 50, 260, 400]]),
    torch.zeros(0, 4),
    torch.tensor([[300.0, 200, 500, 510], [7, 9, 11, 30]]),
]
BOXES, PICTURE = torch.cat(REGIONS), torch.tensor([0, 0, 0, 2, 2])


def maps(seed: int, channels: tuple[int, int, int]) -> list[Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, width, SIDE // stride, SIDE // stride, generator=chance)
        for width, stride in zip(channels, STRIDES, strict=True)
    ]


def test_errors_are_those_of_torchvisions_pooling() -> None:
    mine, other = maps(0, (6, 6, 6)), maps(1, (6, 6, 6))
    pool = MultiScaleRoIAlign([str(stride) for stride in STRIDES], 7, 2)
    pooled, wanted = (
        pool({str(stride): level for stride, level in zip(STRIDES, of_one, strict=True)}, REGIONS, [(SIDE, SIDE)] * 3)
        for of_one in (mine, other)
    )
    expected = pkd_loss(pooled, wanted).mean((1, 2))
    assert expected.std() > 0.01
    torch.testing.assert_close(roi_feature_loss(mine, other, STRIDES, BOXES, PICTURE), expected)


def test_levels_may_differ_in_width() -> None:
    mine, other = maps(0, (3, 5, 7)), maps(1, (3, 5, 7))
    for level in mine:
        level.requires_grad_()
    errors = roi_feature_loss(mine, other, STRIDES, BOXES, PICTURE)
    assert errors.shape == (5,)
    errors.sum().backward()
    assert all(level.grad is not None and level.grad.any() for level in mine)
    torch.testing.assert_close(roi_feature_loss(other, other, STRIDES, BOXES, PICTURE), torch.zeros(5))


def test_no_regions_give_no_errors() -> None:
    mine = maps(0, (3, 5, 7))
    assert roi_feature_loss(mine, mine, STRIDES, BOXES[:0], PICTURE[:0]).shape == (0,)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_is_torchvisions_in_value_and_gradient(layout: torch.memory_format) -> None:
    """Regions inside, across the border, far outside, thinner than a cell, and turned inside out."""
    chance = torch.Generator().manual_seed(2)
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
    boxes = torch.cat([boxes, 120 * torch.rand(20, 4, generator=chance) - 10])
    picture = torch.randint(0, 2, (len(boxes),), generator=chance)
    maps = torch.randn(2, 5, 12, 10, generator=chance).to(memory_format=layout).requires_grad_()
    told = roi_align(maps, *roi_sampling_weights(boxes, picture, 8, (12, 10)))
    wanted = torchvision_roi_align(maps, torch.cat([picture[:, None], boxes], 1), 7, 1 / 8, 2)
    torch.testing.assert_close(told, wanted, atol=1e-5, rtol=1e-4)
    weight = torch.randn(wanted.shape, generator=chance)
    mine, theirs = (torch.autograd.grad((weight * pooled).sum(), maps)[0] for pooled in (told, wanted))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
