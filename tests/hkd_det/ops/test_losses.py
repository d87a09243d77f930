"""Each loss against its closed form or a second implementation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torchvision.ops import box_iou as torchvision_box_iou
from torchvision.ops import generalized_box_iou_loss as torchvision_giou_loss

from hkd_det.ops.boxes import batched_box_iou, giou_loss
from hkd_det.ops.losses import (
    distribution_focal_loss,
    fg_balanced_mean,
    localization_distillation_loss,
    pkd_loss,
    quality_focal_kd_loss,
    varifocal_loss,
)


def random_boxes(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 100
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 50 + 0.1], 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_batched_box_iou_and_giou_loss_equal_torchvision(seed: int) -> None:
    a, b = random_boxes(seed, 5), random_boxes(seed + 1, 5)
    torch.testing.assert_close(batched_box_iou(a[None], b[None])[0], torchvision_box_iou(a, b))
    torch.testing.assert_close(giou_loss(a, b), torchvision_giou_loss(a, b), atol=1e-4, rtol=1e-4)


def test_giou_loss_of_inverted_boxes_has_area_zero() -> None:
    """Values and gradients of the formula with clamped areas."""
    boxes = random_boxes(0, 200)[:, torch.tensor([2, 1, 0, 3])]
    boxes[100:] = random_boxes(1, 100)[:, torch.tensor([2, 3, 0, 1])]
    target = random_boxes(2, 200)
    boxes.requires_grad_()
    low, high = torch.minimum(boxes[:, :2], target[:, :2]), torch.maximum(boxes[:, 2:], target[:, 2:])
    hull, union = (high - low).prod(1), (target[:, 2:] - target[:, :2]).prod(1)
    expected = 1 + (hull - union) / hull
    torch.testing.assert_close(giou_loss(boxes, target), expected, atol=1e-5, rtol=1e-5)
    grad, expected_grad = (torch.autograd.grad(loss.sum(), boxes)[0] for loss in (giou_loss(boxes, target), expected))
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-4)


def test_varifocal_equals_values_by_hand() -> None:
    logit = torch.tensor([0.0, 0.0])
    loss = varifocal_loss(logit, torch.tensor([0.8, 0.0]))
    # p = 0.5: BCE(p, q) is log 2 for any q; weights are q, and alpha p^gamma.
    torch.testing.assert_close(loss, torch.tensor([0.8 * math.log(2), 0.75 * 0.25 * math.log(2)]))


def test_varifocal_weight_has_no_gradient() -> None:
    logit = torch.tensor([1.0], requires_grad=True)
    varifocal_loss(logit, torch.tensor([0.0])).sum().backward()
    p = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(logit.grad, (0.75 * p**2 * p).view(1))


def test_distribution_focal_minimum_is_the_linear_split() -> None:
    distance = torch.tensor([2.25])
    ideal = torch.full((1, 6), -30.0)
    ideal[0, 2], ideal[0, 3] = math.log(0.75), math.log(0.25)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(distribution_focal_loss(ideal, distance), torch.tensor([entropy]))
    assert distribution_focal_loss(torch.zeros(1, 6), distance) == pytest.approx(math.log(6))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(-5, 5))
def test_pkd_is_one_minus_pearson_correlation(seed: int, scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 4, 5, 6, generator=generator)
    assert pkd_loss(a, a * scale + offset).max() < 1e-4
    stacked = torch.stack([a.flatten(2), b.flatten(2)])
    centered = stacked - stacked.mean(-1, keepdim=True)
    pearson = (centered[0] * centered[1]).sum(-1) / centered.square().sum(-1).sqrt().prod(0)
    torch.testing.assert_close(pkd_loss(a, b).mean((1, 2)), 1 - pearson.mean(1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(pkd_loss(a, -a).mean(), torch.tensor(2.0), atol=1e-3, rtol=1e-3)


def test_pkd_of_constant_features_is_finite() -> None:
    flat = torch.zeros(1, 2, 4, 4, requires_grad=True)
    pkd_loss(flat, torch.ones(1, 2, 4, 4)).sum().backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()


def test_fg_balanced_mean_weight_does_not_depend_on_area() -> None:
    error = torch.zeros(3, 4, 4)
    error[:, 0, 0] = 8.0  # the only foreground cell of image 0
    fg_mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    fg_mask[0, 0, 0] = True
    fg_mask[2] = True
    torch.testing.assert_close(fg_balanced_mean(error, fg_mask, 0.5), torch.tensor([4.0, 0.5, 0.5]))


def test_fg_balanced_mean_uses_relative_weights() -> None:
    """Weights 1 and 3 share the 0.8 of the foreground; the 14 other cells share 0.2."""
    error = torch.full((1, 4, 4), 7.0)
    error[0, 0, 0], error[0, 3, 3] = 10.0, 20.0
    fg_weights = torch.zeros(1, 4, 4)
    fg_weights[0, 0, 0], fg_weights[0, 3, 3] = 0.5, 1.5
    expected = 0.8 * (10 * 0.25 + 20 * 0.75) + 0.2 * 7
    torch.testing.assert_close(fg_balanced_mean(error, fg_weights, 0.8), torch.tensor([expected]))


def test_quality_focal_kd_gradient_points_to_the_teacher() -> None:
    teacher = torch.tensor([2.0, -3.0, 0.0])
    torch.testing.assert_close(quality_focal_kd_loss(teacher, teacher), torch.zeros(3))
    student = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
    quality_focal_kd_loss(student, teacher).sum().backward()
    s, t = student.detach().sigmoid(), teacher.sigmoid()
    torch.testing.assert_close(student.grad, (s - t).abs() * (s - t))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_quality_focal_kd_equals_weighted_bernoulli_kl(beta: float) -> None:
    teacher, student = torch.tensor([2.0, -3.0, 0.5]), torch.tensor([-1.0, 0.0, 4.0])
    divergence = kl_divergence(Bernoulli(logits=teacher), Bernoulli(logits=student))
    weight = (teacher.sigmoid() - student.sigmoid()).abs() ** beta
    torch.testing.assert_close(quality_focal_kd_loss(student, teacher, beta), weight * divergence)


def test_localization_distillation_equals_kl_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, 16, generator=generator)
    softened = [Categorical(logits=sides / 2) for sides in (teacher, student)]
    torch.testing.assert_close(localization_distillation_loss(student, teacher), 4 * kl_divergence(*softened).mean(-1))
    torch.testing.assert_close(localization_distillation_loss(teacher, teacher), torch.zeros(5), atol=1e-6, rtol=0)
    student = student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda sides: localization_distillation_loss(sides, teacher.double()), (student,))


def test_pkd_gradient_equals_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 3, 4, generator=generator)
    direction = torch.randn(student.shape, generator=generator)
    weight = torch.rand(2, 3, 4, generator=generator)

    def loss(features: torch.Tensor) -> torch.Tensor:
        return (weight * pkd_loss(features, teacher)).sum()

    student.requires_grad_()
    along = (torch.autograd.grad(loss(student), student)[0] * direction).sum()
    with torch.no_grad():
        difference = (loss(student + 1e-2 * direction) - loss(student - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close(along, difference, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pkd_equals_instance_norm_in_value_and_gradient(layout: torch.memory_format) -> None:
    """Includes a repeated backward pass and a constant channel."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 + torch.randn(2, 5, 6, 7, generator=generator).to(memory_format=layout) for _ in range(2))
    student[0, 1] = 2.0
    before = student.clone(), teacher.clone()
    weight = torch.rand(2, 6, 7, generator=generator)
    student.requires_grad_()
    errors = pkd_loss(student, teacher)
    standardized = (torch.nn.functional.instance_norm(features) for features in (student, teacher))
    expected = 0.5 * (next(standardized) - next(standardized)).square().mean(1)
    torch.testing.assert_close(errors, expected)
    expected = torch.autograd.grad((weight * expected).sum(), student)[0]
    for retain in (True, False):
        actual = torch.autograd.grad((weight * errors).sum(), student, retain_graph=retain)[0]
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
