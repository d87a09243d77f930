"""Of boxes that show the same person the best keeps its score, and nothing jumps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou, nms

from hkd_det.ops.nms import IOU_LIMITS, LOGIT_MARGIN, NMS_TOPK, decay_duplicate_scores, suppress_duplicates

PERSON = [100.0, 50.0, 140.0, 150.0]


def crowd(seed: int, count: int = 40, spread_px: float = 200.0) -> tuple[Tensor, Tensor]:
    """Boxes [1, N, 4] of 40 to 80 px and logits [1, N], falling."""
    chance = torch.Generator().manual_seed(seed)
    middles, sides = (
        torch.rand(count, 2, generator=chance) * spread_px,
        torch.rand(count, 2, generator=chance) * 40 + 40,
    )
    logits = (torch.rand(count, generator=chance) * 8 - 4).sort(descending=True).values
    return torch.cat([middles - sides / 2, middles + sides / 2], 1)[None], logits[None]


def moved(down_px: float) -> list[float]:
    """The person's box, lower by so much: it shares (100 - d) / (100 + d) with the person's."""
    return [PERSON[0], PERSON[1] + down_px, PERSON[2], PERSON[3] + down_px]


@given(st.integers(0, 10_000), st.sampled_from([10.0, 60.0, 300.0]))
def test_against_a_plain_loop(seed: int, spread_px: float) -> None:
    boxes, logits = crowd(seed, spread_px=spread_px)
    shared = box_iou(boxes[0], boxes[0])
    for index, score in enumerate(decay_duplicate_scores(boxes, logits)[0]):
        wanted = 1.0
        for rival in range(index):
            same = min(1.0, max(0.0, (float(shared[rival, index]) - IOU_LIMITS[0]) / (IOU_LIMITS[1] - IOU_LIMITS[0])))
            lead = min(1.0, float(logits[0, rival] - logits[0, index]) / LOGIT_MARGIN)
            wanted = min(wanted, 1 - same * lead)
        assert float(score) == pytest.approx(wanted * float(logits[0, index].sigmoid()), abs=1e-4)


@pytest.mark.parametrize(("down_px", "left"), [(0, 0.0), (10, 0.0), (20, 2 / 3), (25, 1.0), (60, 1.0)])
def test_who_overlaps_a_better_one_loses_by_how_much_it_does(down_px: float, left: float) -> None:
    """(100 - 20) / (100 + 20) = 2/3, a third of the way from 0.6 to 0.8."""
    boxes, logits = torch.tensor([[PERSON, moved(down_px)]]), torch.tensor([[2.0, 1.0]])
    scores = decay_duplicate_scores(boxes, logits)
    torch.testing.assert_close(scores, logits.sigmoid() * torch.tensor([[1.0, left]]), atol=1e-5, rtol=0)


def test_equals_all_stay_and_a_hair_s_breadth_changes_little() -> None:
    """Which of two equals is the better is rounding's choice, and each runtime's own."""
    boxes = torch.tensor([[PERSON, PERSON]])
    torch.testing.assert_close(
        decay_duplicate_scores(boxes, torch.tensor([[1.0, 1.0]])), torch.full((1, 2), 1.0).sigmoid()
    )
    chance = torch.Generator().manual_seed(0)
    for seed in range(20):
        boxes, logits = crowd(seed, 300, 100.0)
        boxes[:, 1::2], logits[:, 1::2] = boxes[:, ::2], logits[:, ::2]  # pairs of equals
        other = boxes + 1e-3 * torch.randn(boxes.shape, generator=chance)
        nearly = logits + 1e-6 * torch.randn(logits.shape, generator=chance)
        assert (decay_duplicate_scores(boxes, logits) - decay_duplicate_scores(other, nearly)).abs().max() < 1e-3


def test_half_numbers_are_reckoned_in_float32() -> None:
    """A person of 1,000 by 300 px has an area beyond float16's."""
    boxes = torch.tensor([[[0.0, 0, 300, 1000], [0, 0, 300, 998], [500, 0, 800, 1000]]])
    logits = torch.tensor([[2.0, 1.0, 0.5]])
    scores = decay_duplicate_scores(boxes.half(), logits.half())
    assert scores.dtype == torch.float32 and scores[0, 1] == 0
    torch.testing.assert_close(scores[0, [0, 2]], logits[0, [0, 2]].sigmoid())


def test_nothing_where_a_box_is_empty() -> None:
    scores = decay_duplicate_scores(torch.zeros(1, 3, 4), torch.tensor([[2.0, 1.0, 0.0]]))
    torch.testing.assert_close(scores, torch.tensor([[2.0, 1.0, 0.0]]).sigmoid())


@given(st.integers(0, 10_000))
def test_ranked_by_what_is_left(seed: int) -> None:
    boxes, logits = crowd(seed)
    found, scores = suppress_duplicates(boxes, logits)
    assert (scores.diff() <= 0).all()
    torch.testing.assert_close(scores[0, 0], logits[0, 0].sigmoid())
    plain = decay_duplicate_scores(boxes, logits)[0]
    for box, score in zip(found[0], scores[0], strict=True):
        assert (plain[(boxes[0] == box).all(1)] == score).any()


@pytest.mark.parametrize("seed", range(5))
def test_what_hard_suppression_keeps_at_both_ends(seed: int) -> None:
    """Whole scores are those that torchvision's NMS keeps at 0.6; what it removes at 0.8 has none."""
    boxes, _ = crowd(seed, NMS_TOPK // 2, 150.0)
    boxes[:, 1::2] = boxes[:, ::2] + 1  # neighbours in rank: nearly the same
    logits = torch.linspace(4, -4, NMS_TOPK // 2)[None]
    score, plain = decay_duplicate_scores(boxes, logits)[0], logits[0].sigmoid()
    kept = {end: set(nms(boxes[0], plain, end).tolist()) for end in IOU_LIMITS}
    # NMS lets a box stay whose only better neighbours are gone themselves: so all whole ones stay, and more may.
    assert set(torch.isclose(score, plain).nonzero()[:, 0].tolist()) <= kept[IOU_LIMITS[0]]
    away = set(range(NMS_TOPK // 2)) - kept[IOU_LIMITS[1]]
    assert len(away) >= NMS_TOPK // 4 and all(score[index] < 1e-6 for index in away)


def test_further_down_it_fades_out() -> None:
    """Who is the hundredth is rounding's choice, and must not matter."""
    middle = torch.arange(150) * 100.0
    boxes = torch.stack([middle, 0 * middle, middle + 40, 0 * middle + 90], 1)
    doubles = [NMS_TOPK // 2, 3 * NMS_TOPK // 4, NMS_TOPK - 1, NMS_TOPK, 149]
    boxes[doubles] = boxes[0].clone()
    logits = torch.linspace(5, -5, len(boxes))[None]
    scores = decay_duplicate_scores(boxes[None], logits)
    wanted = logits.sigmoid()
    wanted[0, doubles] *= torch.tensor([0.0, 0.5, 0.98, 1.0, 1.0])
    torch.testing.assert_close(scores, wanted)
