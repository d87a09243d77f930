"""Augmentation: boxes follow the picture, whatever happens to it."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.train.augment import View, training_view, view_from_arrays

BACKGROUND, PERSON = 0, 255


def scene(height: int, width: int, box: tuple[int, int, int, int]) -> View:
    """A black picture with one white rectangle exactly in the box."""
    picture = np.full((height, width, 3), BACKGROUND, np.uint8)
    x1, y1, x2, y2 = box
    picture[y1:y2, x1:x2] = PERSON
    return view_from_arrays(picture, np.array([box], np.float32), np.array([False]))


sizes = st.tuples(st.integers(2, 6), st.integers(2, 6)).map(lambda hw: (hw[0] * 32, hw[1] * 32))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), sizes, st.sampled_from([1, 4]), st.integers(100, 300), st.integers(100, 300))
def test_boxes_stay_on_what_they_enclose(
    seed: int, size_hw: tuple[int, int], count: int, height: int, width: int
) -> None:
    """What is bright lies in a box, and the middle of every box is bright: for single views and for mosaics."""
    torch.manual_seed(seed)
    sources = [scene(height, width, (30, 20, 70, 90)) for _ in range(count)]
    view = training_view(sources, size_hw)
    assert view.picture.shape == (3, *size_hw) and view.picture.dtype == torch.uint8
    assert len(view.boxes_xyxy) == len(view.ignore) <= count
    bright = view.picture.float().mean(0) > 160  # padding is 114, light changes by 30 %
    covered = torch.zeros(size_hw, dtype=torch.bool)
    for x1, y1, x2, y2 in view.boxes_xyxy.tolist():
        assert 0 <= x1 < x2 <= size_hw[1] and 0 <= y1 < y2 <= size_hw[0]
        covered[max(0, int(y1) - 2) : int(y2) + 3, max(0, int(x1) - 2) : int(x2) + 3] = True
        if x2 - x1 > 4 and y2 - y1 > 4:
            assert view.picture[:, int((y1 + y2) / 2), int((x1 + x2) / 2)].float().mean() > 130
    # A person cut to less than a pixel's width is dropped and may leave a bright line: blocks are what counts.
    astray = (bright & ~covered).float()[None]
    assert not (-torch.nn.functional.max_pool2d(-astray, 2, 1)).any()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_ignore_regions_stay_ignore_regions(seed: int) -> None:
    torch.manual_seed(seed)
    plain = scene(120, 160, (30, 20, 70, 90))
    view = training_view([View(plain.picture, plain.boxes_xyxy, torch.tensor([True]))], (96, 128))
    assert bool(view.ignore.all())


def test_a_person_cut_to_a_sliver_is_ignored() -> None:
    outcomes = set()
    for seed in range(60):
        torch.manual_seed(seed)
        view = training_view([scene(128, 128, (0, 30, 20, 110))], (128, 128))
        for (x1, y1, x2, y2), ignored in zip(view.boxes_xyxy.tolist(), view.ignore.tolist(), strict=True):
            narrow = (x2 - x1) / (y2 - y1) < 0.08  # whole: 0.25
            outcomes.add((narrow, ignored))
            assert not narrow or ignored
    assert (True, True) in outcomes and (False, False) in outcomes


def test_an_empty_picture_passes() -> None:
    empty = view_from_arrays(np.zeros((50, 70, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, bool))
    torch.manual_seed(0)
    assert training_view([empty] * 4, (64, 64)).boxes_xyxy.shape == (0, 4)


def test_the_same_seed_gives_the_same_view() -> None:
    views = []
    for _ in range(2):
        torch.manual_seed(7)
        views.append(training_view([scene(100, 100, (30, 20, 70, 90))] * 4, (64, 96)))
    assert torch.equal(views[0].picture, views[1].picture) and torch.equal(views[0].boxes_xyxy, views[1].boxes_xyxy)
