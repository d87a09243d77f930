"""The detector's loss: what moves it and what must not."""

import torch

from hkd_det.models.base import BranchOutputs, DenseOutputs, Targets
from hkd_det.models.criterion import DetectionCriterion
from hkd_det.models.head import dist2bbox, make_anchors
from hkd_det.ops.losses import sum_losses


def prediction(logits: torch.Tensor, sides: torch.Tensor) -> DenseOutputs:
    points, strides = make_anchors((64, 64), (8, 16, 32))
    boxes = dist2bbox(sides, points, strides)
    one = BranchOutputs(logits, boxes, has_box_loss=False)
    return DenseOutputs(BranchOutputs(logits, boxes, sides), one, points, strides, (64, 64))


def random_maps() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 84, generator=generator) - 3, torch.randn(1, 84, 4, 16, generator=generator)


def test_scores_inside_an_ignore_region_do_not_matter() -> None:
    logits, sides = random_maps()
    boxes = torch.tensor([[[0.0, 0.0, 20.0, 60.0], [24.0, 0.0, 64.0, 64.0]]])
    truth = Targets(boxes, torch.tensor([[True, False]]), torch.tensor([[False, True]]))
    logits.requires_grad_()
    sum_losses(DetectionCriterion()(prediction(logits, sides), truth)).backward()
    points, _ = make_anchors((64, 64), (8, 16, 32))
    ignored = points[:, 0] > 24
    assert logits.grad is not None
    assert not logits.grad[0, ignored].any() and logits.grad[0, ~ignored].all()


def test_an_empty_picture_pushes_every_score_down_and_no_box() -> None:
    logits, sides = random_maps()
    logits.requires_grad_()
    sides.requires_grad_()
    nobody = Targets(torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.bool), torch.zeros(1, 0, dtype=torch.bool))
    terms = DetectionCriterion()(prediction(logits, sides), nobody)
    sum_losses(terms).backward()
    assert terms["box"] == 0 and terms["dfl"] == 0
    assert logits.grad is not None and (logits.grad > 0).all()
    assert sides.grad is None or not sides.grad.any()


def test_descent_on_one_picture_finds_its_person() -> None:
    logits, sides = random_maps()
    logits.requires_grad_()
    sides.requires_grad_()
    person = torch.tensor([10.0, 6.0, 34.0, 58.0])
    truth = Targets(person.view(1, 1, 4), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool))
    optimizer = torch.optim.Adam([logits, sides], lr=0.1)
    for _ in range(300):
        loss = sum_losses(DetectionCriterion()(prediction(logits, sides), truth))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    final = prediction(logits.detach(), sides.detach())
    best = int(final.one2one.logits.argmax())
    torch.testing.assert_close(final.one2many.boxes_xyxy[0, best], person, atol=1.5, rtol=0)
    assert final.one2one.logits.sigmoid().max() > 0.8
