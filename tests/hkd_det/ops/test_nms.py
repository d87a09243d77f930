"""Score decay against a loop and against torchvision's NMS, and the other suppression functions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou, nms

from hkd_det.ops.boxes import (
    IOU_LIMITS,
    LOGIT_MARGIN,
    NMS_TOPK,
    SUPPRESSED_LOGIT,
    batched_nms,
    decay_duplicate_scores,
    peak_nms,
    suppress_duplicates,
)

PERSON = [100.0, 50.0, 140.0, 150.0]


def random_crowd(seed: int, count: int = 40, spread_px: float = 200.0) -> tuple[Tensor, Tensor]:
    """Return boxes [1, N, 4] with sides of 40 to 80 px and descending logits [1, N]."""
    generator = torch.Generator().manual_seed(seed)
    middles, sides = (
        torch.rand(count, 2, generator=generator) * spread_px,
        torch.rand(count, 2, generator=generator) * 40 + 40,
    )
    logits = (torch.rand(count, generator=generator) * 8 - 4).sort(descending=True).values
    return torch.cat([middles - sides / 2, middles + sides / 2], 1)[None], logits[None]


def shift_down(down_px: float) -> list[float]:
    """Return PERSON, moved down; the IoU of both is (100 - d) / (100 + d)."""
    return [PERSON[0], PERSON[1] + down_px, PERSON[2], PERSON[3] + down_px]


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from([10.0, 60.0, 300.0]))
def test_score_decay_equals_a_loop(seed: int, spread_px: float) -> None:
    boxes, logits = random_crowd(seed, spread_px=spread_px)
    iou = box_iou(boxes[0], boxes[0])
    for index, score in enumerate(decay_duplicate_scores(boxes, logits)[0]):
        expected = 1.0
        for better in range(index):
            same = min(1.0, max(0.0, (float(iou[better, index]) - IOU_LIMITS[0]) / (IOU_LIMITS[1] - IOU_LIMITS[0])))
            lead = min(1.0, float(logits[0, better] - logits[0, index]) / LOGIT_MARGIN)
            expected = min(expected, 1 - same * lead)
        assert float(score) == pytest.approx(expected * float(logits[0, index].sigmoid()), abs=1e-4)


@pytest.mark.parametrize(("down_px", "ratio"), [(0, 0.0), (10, 0.0), (20, 2 / 3), (25, 1.0), (60, 1.0)])
def test_score_decay_is_linear_between_iou_limits(down_px: float, ratio: float) -> None:
    """(100 - 20) / (100 + 20) = 2/3, a third of the way from 0.6 to 0.8."""
    boxes, logits = torch.tensor([[PERSON, shift_down(down_px)]]), torch.tensor([[2.0, 1.0]])
    scores = decay_duplicate_scores(boxes, logits)
    torch.testing.assert_close(scores, logits.sigmoid() * torch.tensor([[1.0, ratio]]), atol=1e-5, rtol=0)


def test_score_decay_keeps_ties_and_is_continuous() -> None:
    """Rounding decides which of two equal boxes is the better one, and differs between runtimes."""
    boxes = torch.tensor([[PERSON, PERSON]])
    torch.testing.assert_close(
        decay_duplicate_scores(boxes, torch.tensor([[1.0, 1.0]])), torch.full((1, 2), 1.0).sigmoid()
    )
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        boxes, logits = random_crowd(seed, 300, 100.0)
        boxes[:, 1::2], logits[:, 1::2] = boxes[:, ::2], logits[:, ::2]  # pairs of equals
        other = boxes + 1e-3 * torch.randn(boxes.shape, generator=generator)
        nearly = logits + 1e-6 * torch.randn(logits.shape, generator=generator)
        assert (decay_duplicate_scores(boxes, logits) - decay_duplicate_scores(other, nearly)).abs().max() < 1e-3


def test_score_decay_of_float16_is_computed_in_float32() -> None:
    """The area of a box of 1000 x 300 px is outside the range of float16."""
    boxes = torch.tensor([[[0.0, 0, 300, 1000], [0, 0, 300, 998], [500, 0, 800, 1000]]])
    logits = torch.tensor([[2.0, 1.0, 0.5]])
    scores = decay_duplicate_scores(boxes.half(), logits.half())
    assert scores.dtype == torch.float32 and scores[0, 1] == 0
    torch.testing.assert_close(scores[0, [0, 2]], logits[0, [0, 2]].sigmoid())


def test_score_decay_ignores_empty_boxes() -> None:
    scores = decay_duplicate_scores(torch.zeros(1, 3, 4), torch.tensor([[2.0, 1.0, 0.0]]))
    torch.testing.assert_close(scores, torch.tensor([[2.0, 1.0, 0.0]]).sigmoid())


@given(st.integers(0, 10_000))
def test_suppress_duplicates_sorts_by_score(seed: int) -> None:
    boxes, logits = random_crowd(seed)
    kept_boxes, scores = suppress_duplicates(boxes, logits)
    assert (scores.diff() <= 0).all()
    torch.testing.assert_close(scores[0, 0], logits[0, 0].sigmoid())
    unsuppressed = decay_duplicate_scores(boxes, logits)[0]
    for box, score in zip(kept_boxes[0], scores[0], strict=True):
        assert (unsuppressed[(boxes[0] == box).all(1)] == score).any()


@pytest.mark.parametrize("seed", range(5))
def test_score_decay_agrees_with_nms_at_both_limits(seed: int) -> None:
    """NMS at 0.6 keeps all boxes with full scores; boxes that NMS at 0.8 removes have score 0."""
    boxes, _ = random_crowd(seed, NMS_TOPK // 2, 150.0)
    boxes[:, 1::2] = boxes[:, ::2] + 1  # boxes of adjacent rank are near duplicates
    logits = torch.linspace(4, -4, NMS_TOPK // 2)[None]
    score, unsuppressed = decay_duplicate_scores(boxes, logits)[0], logits[0].sigmoid()
    kept = {end: set(nms(boxes[0], unsuppressed, end).tolist()) for end in IOU_LIMITS}
    # NMS also keeps boxes whose better neighbors are removed themselves, so it keeps all full scores and more.
    assert set(torch.isclose(score, unsuppressed).nonzero()[:, 0].tolist()) <= kept[IOU_LIMITS[0]]
    away = set(range(NMS_TOPK // 2)) - kept[IOU_LIMITS[1]]
    assert len(away) >= NMS_TOPK // 4 and all(score[index] < 1e-6 for index in away)


def test_score_decay_fades_out_with_rank() -> None:
    """Rounding decides which box has the last compared rank, which must have no influence."""
    middle = torch.arange(150) * 100.0
    boxes = torch.stack([middle, 0 * middle, middle + 40, 0 * middle + 90], 1)
    duplicates = [NMS_TOPK // 2, 3 * NMS_TOPK // 4, NMS_TOPK - 1, NMS_TOPK, 149]
    boxes[duplicates] = boxes[0].clone()
    logits = torch.linspace(5, -5, len(boxes))[None]
    scores = decay_duplicate_scores(boxes[None], logits)
    expected = logits.sigmoid()
    expected[0, duplicates] *= torch.tensor([0.0, 0.5, 0.98, 1.0, 1.0])
    torch.testing.assert_close(scores, expected)


def test_peak_nms_keeps_local_maxima_of_each_level() -> None:
    """Against a loop over the neighbors."""
    logits = torch.randn(2, 8 * 12 + 4 * 6, generator=torch.Generator().manual_seed(0))
    kept = peak_nms(logits, (64, 96), (8, 16))
    for image in range(2):
        start = 0
        for height, width in ((8, 12), (4, 6)):
            level = logits[image, start : start + height * width].view(height, width)
            for y in range(height):
                for x in range(width):
                    around = level[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                    expected = level[y, x] if level[y, x] >= around.max() - 1e-3 else torch.tensor(SUPPRESSED_LOGIT)
                    assert kept[image, start + y * width + x] == expected
            start += height * width


def test_batched_nms_separates_images_and_pads_with_zero() -> None:
    same = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10.5], [20, 0, 30, 10]])
    boxes, scores = batched_nms(same.repeat(2, 1, 1), torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.2, 0.0]]), max_det=5)
    assert scores.tolist() == [pytest.approx([0.9, 0.7, 0]), pytest.approx([0.2, 0, 0])]
    assert boxes[0, :2].tolist() == same[[0, 2]].tolist() and boxes[1, 0].tolist() == same[1].tolist()
