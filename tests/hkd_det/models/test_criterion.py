"""`DetectionCriterion`: what has an influence on the losses and what has none."""

import pytest
import torch

from hkd_det.models.base import BranchOutputs, DenseOutputs, Targets
from hkd_det.models.criterion import DetectionCriterion
from hkd_det.models.head import dist2bbox, make_anchors
from hkd_det.ops.losses import sum_losses


def make_outputs(logits: torch.Tensor, box_logits: torch.Tensor) -> DenseOutputs:
    points, strides = make_anchors((64, 64), (8, 16, 32))
    boxes = dist2bbox(box_logits, points, strides)
    one = BranchOutputs(logits, boxes, has_box_loss=False)
    return DenseOutputs(BranchOutputs(logits, boxes, box_logits), one, points, strides, (64, 64))


def random_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 84, generator=generator) - 3, torch.randn(1, 84, 4, 16, generator=generator)


def test_scores_in_ignore_regions_have_no_gradient() -> None:
    logits, box_logits = random_logits()
    boxes = torch.tensor([[[0.0, 0.0, 20.0, 60.0], [24.0, 0.0, 64.0, 64.0]]])
    targets = Targets(boxes, torch.tensor([[True, False]]), torch.tensor([[False, True]]))
    logits.requires_grad_()
    sum_losses(DetectionCriterion()(make_outputs(logits, box_logits), targets)).backward()
    points, _ = make_anchors((64, 64), (8, 16, 32))
    ignored = points[:, 0] > 24
    assert logits.grad is not None
    assert not logits.grad[0, ignored].any() and logits.grad[0, ~ignored].all()


def test_empty_image_trains_scores_only() -> None:
    logits, box_logits = random_logits()
    logits.requires_grad_()
    box_logits.requires_grad_()
    empty = Targets(torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.bool), torch.zeros(1, 0, dtype=torch.bool))
    losses = DetectionCriterion()(make_outputs(logits, box_logits), empty)
    sum_losses(losses).backward()
    assert losses["box"] == 0 and losses["dfl"] == 0
    assert logits.grad is not None and (logits.grad > 0).all()
    assert box_logits.grad is None or not box_logits.grad.any()


@pytest.mark.slow
def test_gradient_descent_fits_one_person() -> None:
    logits, box_logits = random_logits()
    logits.requires_grad_()
    box_logits.requires_grad_()
    person = torch.tensor([10.0, 6.0, 34.0, 58.0])
    targets = Targets(person.view(1, 1, 4), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool))
    optimizer = torch.optim.Adam([logits, box_logits], lr=0.1)
    for _ in range(300):
        loss = sum_losses(DetectionCriterion()(make_outputs(logits, box_logits), targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    final = make_outputs(logits.detach(), box_logits.detach())
    best = int(final.one2one.logits.argmax())
    torch.testing.assert_close(final.one2many.boxes_xyxy[0, best], person, atol=1.5, rtol=0)
    assert final.one2one.logits.sigmoid().max() > 0.8
