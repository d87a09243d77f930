"""Augmentation: people are painted in plain colours and looked for in the picture that comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as torchvision_light

from hkd_det.train import augment as augment_module
from hkd_det.train.augment import (
    MAX_FRAME_SCALE,
    AugmentedImage,
    ImageLoader,
    augment,
    color_jitter,
    filter_boxes,
    horizontal_flip,
)

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]], np.uint8)
GROUND = 128
CELL = 60  # each person is painted somewhere in a cell of its own
BLUR_PX = 2.5  # how far resizing smears an edge, at 2.4 times the size


@dataclass(frozen=True)
class Person:
    """A colour's number, a whole box inside its cell, the visible part as shares of it, and whether to ignore it."""

    colour: int
    corner: tuple[int, int]
    sides: tuple[int, int]
    seen: tuple[float, float]
    ignore: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        x, y = self.corner[0] + CELL * (self.colour % 3), self.corner[1] + CELL * (self.colour // 3)
        return x, y, x + self.sides[0], y + self.sides[1]

    @property
    def visible(self) -> tuple[int, int, int, int]:
        x1, y1, _, y2 = self.box
        return x1, y1, x1 + max(1, round(self.sides[0] * self.seen[0])), y1 + max(1, round((y2 - y1) * self.seen[1]))


@st.composite
def people(draw: st.DrawFn, colours: Sequence[int]) -> list[Person]:
    corners, sides = st.tuples(*[st.integers(0, 15)] * 2), st.tuples(st.integers(12, 40), st.integers(20, 40))
    shares = st.tuples(*[st.floats(0.1, 1)] * 2)
    return [Person(colour, draw(corners), draw(sides), draw(shares), draw(st.booleans())) for colour in colours]


def scene(persons: Sequence[Person], size_hw: tuple[int, int], painted: str = "box") -> AugmentedImage:
    """Grey ground with every person's whole box, or only the visible part, in its colour."""
    picture = np.full((*size_hw, 3), GROUND, np.uint8)
    for person in persons:
        x1, y1, x2, y2 = getattr(person, painted)
        picture[y1:y2, x1:x2] = COLOURS[person.colour]
    boxes, visible = (
        np.array([getattr(person, part) for person in persons], np.float32).reshape(-1, 4)
        for part in ("box", "visible")
    )
    return AugmentedImage(picture, boxes, visible, np.array([person.ignore for person in persons], bool))


def source(view: AugmentedImage) -> ImageLoader:
    return lambda _frame_hw: view


def found(view: AugmentedImage, colour: int) -> NDArray[np.float64] | None:
    """The rectangle around all pixels of a colour, whatever the light; None for less than a few pixels."""
    values = view.image.astype(int)
    spread = values.max(2) - values.min(2)
    bright = values > (values.max(2) + values.min(2))[..., None] / 2
    mask = (bright == (COLOURS[colour] > 0)).all(2) & (spread > 60)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) < 2 or len(columns) < 2:
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


def colour_of(view: AugmentedImage, box: NDArray[np.float32]) -> int | None:
    """Whose box it is: the colour found where it lies."""
    middle = (box[:2] + box[2:]) / 2
    for colour in range(len(COLOURS)):
        rectangle = found(view, colour)
        if rectangle is not None and (rectangle[:2] <= middle).all() and (middle <= rectangle[2:]).all():
            return colour
    return None


seeds = st.integers(0, 2**62)
sizes = st.tuples(st.integers(2, 6), st.integers(2, 6)).map(lambda hw: (hw[0] * 32, hw[1] * 32))
single = people(range(6)).map(lambda all_six: [all_six])
mosaic = people(range(4)).map(lambda four: [[person] for person in four])
large = (CELL * 2, CELL * 3)


@pytest.fixture
def always_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_module, "GRAYSCALE_PROB", 0.0)


@pytest.mark.usefixtures("always_coloured")
@settings(deadline=None, max_examples=120)
@given(seeds, sizes, single | mosaic)
def test_boxes_and_visible_parts_lie_where_they_are_painted(
    seed: int, size_hw: tuple[int, int], groups: list[list[Person]]
) -> None:
    """The same chance over a picture of whole people and one of their visible parts: every box on its own colour."""
    whole, seen = (
        augment([source(scene(group, large, painted)) for group in groups], size_hw, np.random.default_rng(seed))
        for painted in ("box", "visible")
    )
    assert whole.image.shape == (*size_hw, 3) and whole.image.dtype == np.uint8
    persons = {person.colour: person for group in groups for person in group}
    met = []
    for box, visible, ignored in zip(whole.boxes_xyxy, whole.visible_xyxy, whole.ignore, strict=True):
        if min(box[2:] - box[:2]) < 6:
            continue
        colour = colour_of(whole, box)
        assert colour is not None and colour in persons
        met.append(colour)
        rectangle = found(whole, colour)
        assert rectangle is not None
        np.testing.assert_allclose(box, rectangle, atol=BLUR_PX)
        rectangle = found(seen, colour)
        if rectangle is not None:
            np.testing.assert_allclose(visible, rectangle, atol=BLUR_PX)
        elif not ignored:
            assert min(visible[2:] - visible[:2]) < 6
        assert ignored or not persons[colour].ignore
    assert len(met) == len(set(met))
    for colour in persons.keys() - set(met):  # nobody of size who can be seen is forgotten
        rectangle = found(whole, colour)
        assert rectangle is None or min(rectangle[2:] - rectangle[:2]) < 6 + 2 * BLUR_PX


@settings(deadline=None, max_examples=60)
@given(seeds, sizes, single | mosaic)
def test_nothing_lies_outside(seed: int, size_hw: tuple[int, int], groups: list[list[Person]]) -> None:
    view = augment([source(scene(group, large)) for group in groups], size_hw, np.random.default_rng(seed))
    height, width = size_hw
    box, visible = view.boxes_xyxy, view.visible_xyxy
    assert box.dtype == visible.dtype == np.float32 and view.ignore.dtype == bool
    assert len(box) == len(visible) == len(view.ignore) <= sum(len(group) for group in groups)
    assert (box >= 0).all() and (box <= [width, height, width, height]).all()
    assert (box[:, :2] < box[:, 2:]).all() and (visible[:, :2] <= visible[:, 2:]).all()
    assert (visible[:, :2] >= box[:, :2]).all() and (visible[:, 2:] <= box[:, 2:]).all()


@settings(deadline=None, max_examples=100)
@given(st.tuples(*[st.integers(-40, 60)] * 2), st.tuples(*[st.integers(1, 60)] * 2), st.data(), st.booleans())
def test_who_is_left_is_judged_by_counted_pixels(
    corner: tuple[int, int], sides: tuple[int, int], data: st.DataObject, ignore: bool
) -> None:
    """Against masks on a ground large enough for what sticks out."""
    x1, y1, x2, y2 = *corner, corner[0] + sides[0], corner[1] + sides[1]
    u1, v1 = data.draw(st.integers(x1, x2)), data.draw(st.integers(y1, y2))
    u2, v2 = data.draw(st.integers(u1, x2)), data.draw(st.integers(v1, y2))
    person, part, inside = np.zeros((3, 200, 200), bool)
    person[50 + y1 : 50 + y2, 50 + x1 : 50 + x2] = True
    part[50 + v1 : 50 + v2, 50 + u1 : 50 + u2] = True
    inside[50:98, 50:114] = True  # a view of 48 x 64
    boxes, visible = (np.array([box], np.float32) for box in ((x1, y1, x2, y2), (u1, v1, u2, v2)))
    view = filter_boxes(AugmentedImage(np.zeros((48, 64, 3), np.uint8), boxes, visible, np.array([ignore])))
    assert len(view.ignore) == (person & inside).any()
    for box, seen, ignored in zip(view.boxes_xyxy, view.visible_xyxy, view.ignore, strict=True):
        left, shown = (person & inside).sum(), (part & inside).sum()
        assert (box[2] - box[0]) * (box[3] - box[1]) == left
        assert (seen[2] - seen[0]) * (seen[3] - seen[1]) == shown
        rows = (person & inside).any(1).sum()
        assert ignored == (ignore or left < 0.35 * person.sum() or shown < 0.2 * person.sum() or rows < 8)


def test_a_person_whose_visible_part_is_cut_away_is_ignored() -> None:
    """Half of the person stays in the view, but of the head that was seen nothing."""
    box = np.array([[10, -40, 50, 40]], np.float32)
    head, legs = np.array([[10, -40, 50, -10]], np.float32), np.array([[10, 10, 50, 40]], np.float32)
    picture, nobody = np.zeros((64, 64, 3), np.uint8), np.array([False])
    assert filter_boxes(AugmentedImage(picture, box, head, nobody)).ignore.tolist() == [True]
    assert filter_boxes(AugmentedImage(picture, box, legs, nobody)).ignore.tolist() == [False]


def test_a_person_cut_to_a_sliver_is_ignored() -> None:
    outcomes = set()
    picture = np.zeros((128, 128, 3), np.uint8)
    person = np.array([[0, 30, 20, 110]], np.float32)
    for seed in range(60):
        given_view = AugmentedImage(picture, person, person, np.array([False]))
        view = augment([source(given_view)], (128, 128), np.random.default_rng(seed))
        for (x1, y1, x2, y2), ignored in zip(view.boxes_xyxy.tolist(), view.ignore.tolist(), strict=True):
            narrow = (x2 - x1) / (y2 - y1) < 0.08  # whole: 0.25
            outcomes.add((narrow, ignored))
            assert not narrow or ignored
    assert (True, True) in outcomes and (False, False) in outcomes


@settings(deadline=None, max_examples=30)
@given(people(range(6)))
def test_mirrored_twice_is_the_same(persons: list[Person]) -> None:
    view = scene(persons, large)
    once, twice = horizontal_flip(view), horizontal_flip(horizontal_flip(view))
    np.testing.assert_array_equal(once.image, view.image[:, ::-1])
    np.testing.assert_array_equal(twice.image, view.image)
    np.testing.assert_array_equal(twice.boxes_xyxy, view.boxes_xyxy)
    np.testing.assert_array_equal(twice.visible_xyxy, view.visible_xyxy)
    for person, box, visible in zip(persons, once.boxes_xyxy, once.visible_xyxy, strict=True):
        np.testing.assert_array_equal(box, found(once, person.colour))
        assert (visible[2] == box[2]) and (visible[1] == box[1])  # the visible part was at the left, is at the right
    np.testing.assert_array_equal(once.ignore, view.ignore)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), *[st.floats(0.7, 1.3)] * 2, st.just(0.0) | st.floats(0.7, 1.3))
def test_light_is_torchvisions(seed: int, brightness: float, contrast: float, saturation: float) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    expected = torch.from_numpy(picture).permute(2, 0, 1)
    expected = torchvision_light.adjust_brightness(expected, brightness)
    expected = torchvision_light.adjust_contrast(expected, contrast)
    expected = torchvision_light.adjust_saturation(expected, saturation).permute(1, 2, 0)
    np.testing.assert_allclose(
        color_jitter(picture, brightness, contrast, saturation).astype(int), expected.numpy().astype(int), atol=5
    )


def test_sources_are_asked_for_no_more_than_the_largest_frame() -> None:
    asked = []

    def ask(frame_hw: tuple[float, float]) -> AugmentedImage:
        asked.append(frame_hw)
        return scene([], (50, 70))

    for seed in range(200):
        augment([ask] * (1 if seed % 2 else 4), (96, 128), np.random.default_rng(seed))
    largest = np.max(asked, axis=0) / (96, 128)
    assert (largest <= MAX_FRAME_SCALE).all() and (largest > 0.9 * MAX_FRAME_SCALE).all()


@pytest.mark.parametrize("picture_hw", [(1, 1), (1, 500), (500, 1), (3, 2000), (50, 70)])
@pytest.mark.parametrize("count", [1, 4])
def test_empty_and_odd_pictures_pass(picture_hw: tuple[int, int], count: int) -> None:
    for seed in range(10):
        view = augment([source(scene([], picture_hw))] * count, (64, 96), np.random.default_rng(seed))
        assert view.image.shape == (64, 96, 3) and view.boxes_xyxy.shape == view.visible_xyxy.shape == (0, 4)


def test_the_same_chance_gives_the_same_view_and_another_another() -> None:
    persons = [Person(colour, (5, 5), (20, 40), (1, 1), False) for colour in range(6)]
    first, second, other = (
        augment([source(scene(persons, large))] * 4, (64, 96), np.random.default_rng(seed)) for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.boxes_xyxy, second.boxes_xyxy)
    assert not np.array_equal(first.image, other.image)


def test_a_source_is_left_as_it_was() -> None:
    """Views of what is kept in memory must not write into it."""
    view = scene([Person(0, (5, 5), (20, 40), (0.5, 0.5), False)], large)
    before = replace(view, picture=view.image.copy(), boxes_xyxy=view.boxes_xyxy.copy())
    for seed in range(20):
        augment([source(view)], (96, 128), np.random.default_rng(seed))
    np.testing.assert_array_equal(view.image, before.image)
    np.testing.assert_array_equal(view.boxes_xyxy, before.boxes_xyxy)
