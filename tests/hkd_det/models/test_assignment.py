"""The assigner against small pictures worked out by hand."""

import torch

from hkd_det.models.assigner import TaskAlignedAssigner
from hkd_det.models.base import Targets
from hkd_det.models.head import make_anchors

POINTS, STRIDES = make_anchors((64, 64), (8,))  # 8 x 8 points at 4, 12, ... 60


def truth(*boxes: list[float], ignore: list[bool] | None = None) -> Targets:
    ignored = torch.tensor([ignore or [False] * len(boxes)], dtype=torch.bool)
    return Targets(torch.tensor([boxes], dtype=torch.float32).view(1, -1, 4), ~ignored, ignored)


def answers(box: list[float], score: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Every point says the same box with the same score."""
    return torch.full((1, len(POINTS)), score), torch.tensor(box).expand(1, len(POINTS), 4)


def test_only_points_inside_the_person_answer_and_at_most_top_of_them() -> None:
    person = [8.0, 8.0, 40.0, 40.0]  # 4 x 4 points inside
    targets = TaskAlignedAssigner(topk=10)(*answers(person), POINTS, STRIDES, truth(person))
    inside = ((POINTS > 8) & (POINTS < 40)).all(1)
    assert int(targets.fg_mask.sum()) == 10
    assert bool(inside[targets.fg_mask[0]].all())
    assert targets.target_scores[targets.fg_mask].tolist() == [1.0] * 10


def test_one_to_one_takes_the_point_with_the_largest_claim() -> None:
    person = [8.0, 8.0, 40.0, 40.0]
    scores, boxes = answers(person, 0.2)
    best = 3 * 8 + 2
    scores[0, best] = 0.9
    targets = TaskAlignedAssigner(topk=1)(scores, boxes, POINTS, STRIDES, truth(person))
    assert targets.fg_mask.nonzero().tolist() == [[0, best]]


def test_a_point_claimed_twice_goes_to_the_person_it_overlaps_more() -> None:
    first, second = [0.0, 0.0, 32.0, 64.0], [16.0, 0.0, 48.0, 64.0]
    targets = TaskAlignedAssigner(topk=64)(*answers(second), POINTS, STRIDES, truth(first, second))
    both = (POINTS[:, 0] > 16) & (POINTS[:, 0] < 32)
    assert targets.boxes_xyxy[0, both].tolist() == [second] * int(both.sum())


def test_ignore_regions_give_neither_positives_nor_negatives() -> None:
    person, region = [0.0, 0.0, 24.0, 64.0], [16.0, 0.0, 64.0, 64.0]
    scores, boxes = answers(person)
    targets = TaskAlignedAssigner(topk=100)(scores, boxes, POINTS, STRIDES, truth(person, region, ignore=[False, True]))
    in_person, in_region = POINTS[:, 0] < 24, POINTS[:, 0] > 16
    assert torch.equal(targets.fg_mask[0], in_person)
    assert torch.equal(targets.loss_mask[0], in_person | ~in_region)


def test_a_person_smaller_than_a_cell_still_has_a_point() -> None:
    speck = [7.0, 7.0, 9.0, 9.0]  # no cell centre inside
    targets = TaskAlignedAssigner(topk=1)(*answers(speck), POINTS, STRIDES, truth(speck))
    assert int(targets.fg_mask.sum()) == 1


def test_the_quality_asked_for_is_the_best_overlap() -> None:
    person = [0.0, 0.0, 32.0, 32.0]
    scores, boxes = answers([0.0, 0.0, 32.0, 16.0])  # IoU 0.5 everywhere
    targets = TaskAlignedAssigner(topk=3)(scores, boxes, POINTS, STRIDES, truth(person))
    torch.testing.assert_close(targets.target_scores[targets.fg_mask], torch.full((3,), 0.5))


def test_an_empty_picture_has_no_positives_and_judges_every_point() -> None:
    targets = TaskAlignedAssigner(topk=10)(*answers([0.0, 0.0, 8.0, 8.0]), POINTS, STRIDES, truth())
    assert not targets.fg_mask.any() and targets.loss_mask.all() and not targets.target_scores.any()


def test_padding_is_nobody() -> None:
    person = [8.0, 8.0, 40.0, 40.0]
    alone = truth(person)
    padded = Targets(
        torch.cat([alone.boxes_xyxy, torch.zeros(1, 2, 4)], 1),
        torch.tensor([[True, False, False]]),
        torch.zeros(1, 3, dtype=torch.bool),
    )
    one, other = (TaskAlignedAssigner(topk=10)(*answers(person), POINTS, STRIDES, t) for t in (alone, padded))
    assert torch.equal(one.fg_mask, other.fg_mask) and torch.equal(one.loss_mask, other.loss_mask)


def test_a_centred_claim_goes_to_the_middle_and_to_the_level_of_the_persons_height() -> None:
    points, strides = make_anchors((256, 256), (8, 16, 32))
    person = [40.0, 60.0, 100.0, 188.0]  # 128 px tall: eight cells of stride 16; its middle is (70, 124)
    assigner = TaskAlignedAssigner(topk=1, beta=2.0, center_weight=1.0)
    scores, boxes = torch.full((1, len(points)), 0.5), torch.tensor(person).expand(1, len(points), 4)
    chosen = assigner(scores, boxes, points, strides, truth(person)).fg_mask[0]
    assert strides[chosen].tolist() == [16.0] and points[chosen].tolist() == [[72.0, 120.0]]
