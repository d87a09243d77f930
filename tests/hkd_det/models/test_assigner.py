"""`TaskAlignedAssigner` on small examples computed by hand."""

import torch

from hkd_det.models.base import Targets
from hkd_det.models.criterion import TaskAlignedAssigner
from hkd_det.models.head import make_anchors

POINTS, STRIDES = make_anchors((64, 64), (8,))  # 8 x 8 points at 4, 12, ... 60


def make_targets(*boxes: list[float], ignore: list[bool] | None = None) -> Targets:
    ignored = torch.tensor([ignore or [False] * len(boxes)], dtype=torch.bool)
    return Targets(torch.tensor([boxes], dtype=torch.float32).view(1, -1, 4), ~ignored, ignored)


def make_predictions(box: list[float], score: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same box and score at every point."""
    return torch.full((1, len(POINTS)), score), torch.tensor(box).expand(1, len(POINTS), 4)


def test_assign_takes_at_most_topk_points_inside_the_box() -> None:
    person = [8.0, 8.0, 40.0, 40.0]  # 4 x 4 points inside
    result = TaskAlignedAssigner(topk=10)(*make_predictions(person), POINTS, STRIDES, make_targets(person))
    inside = ((POINTS > 8) & (POINTS < 40)).all(1)
    assert int(result.fg_mask.sum()) == 10
    assert bool(inside[result.fg_mask[0]].all())
    assert result.target_scores[result.fg_mask].tolist() == [1.0] * 10


def test_assign_topk_one_takes_the_highest_metric() -> None:
    person = [8.0, 8.0, 40.0, 40.0]
    scores, boxes = make_predictions(person, 0.2)
    best = 3 * 8 + 2
    scores[0, best] = 0.9
    result = TaskAlignedAssigner(topk=1)(scores, boxes, POINTS, STRIDES, make_targets(person))
    assert result.fg_mask.nonzero().tolist() == [[0, best]]


def test_assign_contested_point_goes_to_the_higher_iou() -> None:
    first, second = [0.0, 0.0, 32.0, 64.0], [16.0, 0.0, 48.0, 64.0]
    result = TaskAlignedAssigner(topk=64)(*make_predictions(second), POINTS, STRIDES, make_targets(first, second))
    both = (POINTS[:, 0] > 16) & (POINTS[:, 0] < 32)
    assert result.boxes_xyxy[0, both].tolist() == [second] * int(both.sum())


def test_assign_masks_background_in_ignore_regions() -> None:
    person, region = [0.0, 0.0, 24.0, 64.0], [16.0, 0.0, 64.0, 64.0]
    scores, boxes = make_predictions(person)
    result = TaskAlignedAssigner(topk=100)(
        scores, boxes, POINTS, STRIDES, make_targets(person, region, ignore=[False, True])
    )
    in_person, in_region = POINTS[:, 0] < 24, POINTS[:, 0] > 16
    assert torch.equal(result.fg_mask[0], in_person)
    assert torch.equal(result.loss_mask[0], in_person | ~in_region)


def test_assign_box_smaller_than_a_cell_gets_a_point() -> None:
    tiny_box = [7.0, 7.0, 9.0, 9.0]  # no cell center inside
    result = TaskAlignedAssigner(topk=1)(*make_predictions(tiny_box), POINTS, STRIDES, make_targets(tiny_box))
    assert int(result.fg_mask.sum()) == 1


def test_target_score_is_the_best_iou() -> None:
    person = [0.0, 0.0, 32.0, 32.0]
    scores, boxes = make_predictions([0.0, 0.0, 32.0, 16.0])  # IoU 0.5 everywhere
    result = TaskAlignedAssigner(topk=3)(scores, boxes, POINTS, STRIDES, make_targets(person))
    torch.testing.assert_close(result.target_scores[result.fg_mask], torch.full((3,), 0.5))


def test_assign_empty_image_counts_every_point_as_background() -> None:
    result = TaskAlignedAssigner(topk=10)(*make_predictions([0.0, 0.0, 8.0, 8.0]), POINTS, STRIDES, make_targets())
    assert not result.fg_mask.any() and result.loss_mask.all() and not result.target_scores.any()


def test_assign_padding_has_no_effect() -> None:
    person = [8.0, 8.0, 40.0, 40.0]
    unpadded = make_targets(person)
    padded = Targets(
        torch.cat([unpadded.boxes_xyxy, torch.zeros(1, 2, 4)], 1),
        torch.tensor([[True, False, False]]),
        torch.zeros(1, 3, dtype=torch.bool),
    )
    first, second = (
        TaskAlignedAssigner(topk=10)(*make_predictions(person), POINTS, STRIDES, t) for t in (unpadded, padded)
    )
    assert torch.equal(first.fg_mask, second.fg_mask) and torch.equal(first.loss_mask, second.loss_mask)


def test_center_weight_prefers_center_and_level_of_the_height() -> None:
    points, strides = make_anchors((256, 256), (8, 16, 32))
    person = [40.0, 60.0, 100.0, 188.0]  # 128 px tall: eight cells of stride 16; its middle is (70, 124)
    assigner = TaskAlignedAssigner(topk=1, beta=2.0, center_weight=1.0)
    scores, boxes = torch.full((1, len(points)), 0.5), torch.tensor(person).expand(1, len(points), 4)
    chosen = assigner(scores, boxes, points, strides, make_targets(person)).fg_mask[0]
    assert strides[chosen].tolist() == [16.0] and points[chosen].tolist() == [[72.0, 120.0]]
