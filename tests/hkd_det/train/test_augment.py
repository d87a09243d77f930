"""Augmentations: persons are drawn in plain colors, and their boxes are compared with the colored pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as torchvision_functional

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

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]], np.uint8)
BACKGROUND = 128
CELL = 60  # each person is drawn inside its own cell, px
BLUR_PX = 2.5  # width of an edge after resizing to 2.4 times the size


@dataclass(frozen=True)
class Person:
    """A drawn person: color index, box inside its cell, visible ratios of the sides, and the ignore flag."""

    color: int
    corner: tuple[int, int]
    sides: tuple[int, int]
    visible_ratios: tuple[float, float]
    ignore: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        x, y = self.corner[0] + CELL * (self.color % 3), self.corner[1] + CELL * (self.color // 3)
        return x, y, x + self.sides[0], y + self.sides[1]

    @property
    def visible(self) -> tuple[int, int, int, int]:
        x1, y1, _, y2 = self.box
        return (
            x1,
            y1,
            x1 + max(1, round(self.sides[0] * self.visible_ratios[0])),
            y1 + max(1, round((y2 - y1) * self.visible_ratios[1])),
        )


@st.composite
def draw_persons(draw: st.DrawFn, colors: Sequence[int]) -> list[Person]:
    corners, sides = st.tuples(*[st.integers(0, 15)] * 2), st.tuples(st.integers(12, 40), st.integers(20, 40))
    ratios = st.tuples(*[st.floats(0.1, 1)] * 2)
    return [Person(color, draw(corners), draw(sides), draw(ratios), draw(st.booleans())) for color in colors]


def render_scene(persons: Sequence[Person], size_hw: tuple[int, int], part: str = "box") -> AugmentedImage:
    """Draw every person's full box, or only the visible part, in its color on a gray background."""
    image = np.full((*size_hw, 3), BACKGROUND, np.uint8)
    for person in persons:
        x1, y1, x2, y2 = getattr(person, part)
        image[y1:y2, x1:x2] = COLORS[person.color]
    boxes, visible = (
        np.array([getattr(person, name) for person in persons], np.float32).reshape(-1, 4)
        for name in ("box", "visible")
    )
    return AugmentedImage(image, boxes, visible, np.array([person.ignore for person in persons], bool))


def make_loader(augmented: AugmentedImage) -> ImageLoader:
    return lambda _frame_hw: augmented


def find_color_extent(augmented: AugmentedImage, color: int) -> NDArray[np.float64] | None:
    """Return the xyxy extent of all pixels of a color after any color jitter; None for too few pixels."""
    values = augmented.image.astype(int)
    spread = values.max(2) - values.min(2)
    bright = values > (values.max(2) + values.min(2))[..., None] / 2
    mask = (bright == (COLORS[color] > 0)).all(2) & (spread > 60)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) < 2 or len(columns) < 2:
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


def find_box_color(augmented: AugmentedImage, box: NDArray[np.float32]) -> int | None:
    """Return the color whose pixels surround the center of a box."""
    center = (box[:2] + box[2:]) / 2
    for color in range(len(COLORS)):
        extent = find_color_extent(augmented, color)
        if extent is not None and (extent[:2] <= center).all() and (center <= extent[2:]).all():
            return color
    return None


seeds = st.integers(0, 2**62)
sizes = st.tuples(st.integers(2, 6), st.integers(2, 6)).map(lambda hw: (hw[0] * 32, hw[1] * 32))
single_images = draw_persons(range(6)).map(lambda persons: [persons])
mosaics = draw_persons(range(4)).map(lambda persons: [[person] for person in persons])
SCENE_HW = (CELL * 2, CELL * 3)


@pytest.fixture
def no_grayscale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_module, "GRAYSCALE_PROB", 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("no_grayscale")
@settings(deadline=None, max_examples=120)
@given(seeds, sizes, single_images | mosaics)
def test_boxes_and_visible_boxes_match_their_pixels(
    seed: int, size_hw: tuple[int, int], groups: list[list[Person]]
) -> None:
    """The same seed augments an image of full persons and one of their visible parts."""
    full_image, visible_image = (
        augment(
            [make_loader(render_scene(group, SCENE_HW, part)) for group in groups], size_hw, np.random.default_rng(seed)
        )
        for part in ("box", "visible")
    )
    assert full_image.image.shape == (*size_hw, 3) and full_image.image.dtype == np.uint8
    persons = {person.color: person for group in groups for person in group}
    matched_colors = []
    for box, visible, ignored in zip(full_image.boxes_xyxy, full_image.visible_xyxy, full_image.ignore, strict=True):
        if min(box[2:] - box[:2]) < 6:
            continue
        color = find_box_color(full_image, box)
        assert color is not None and color in persons
        matched_colors.append(color)
        extent = find_color_extent(full_image, color)
        assert extent is not None
        np.testing.assert_allclose(box, extent, atol=BLUR_PX)
        extent = find_color_extent(visible_image, color)
        if extent is not None:
            np.testing.assert_allclose(visible, extent, atol=BLUR_PX)
        elif not ignored:
            assert min(visible[2:] - visible[:2]) < 6
        assert ignored or not persons[color].ignore
    assert len(matched_colors) == len(set(matched_colors))
    for color in persons.keys() - set(matched_colors):  # only small or hidden persons have no box
        extent = find_color_extent(full_image, color)
        assert extent is None or min(extent[2:] - extent[:2]) < 6 + 2 * BLUR_PX


@settings(deadline=None, max_examples=60)
@given(seeds, sizes, single_images | mosaics)
def test_boxes_are_inside_the_image(seed: int, size_hw: tuple[int, int], groups: list[list[Person]]) -> None:
    augmented = augment(
        [make_loader(render_scene(group, SCENE_HW)) for group in groups], size_hw, np.random.default_rng(seed)
    )
    height, width = size_hw
    box, visible = augmented.boxes_xyxy, augmented.visible_xyxy
    assert box.dtype == visible.dtype == np.float32 and augmented.ignore.dtype == bool
    assert len(box) == len(visible) == len(augmented.ignore) <= sum(len(group) for group in groups)
    assert (box >= 0).all() and (box <= [width, height, width, height]).all()
    assert (box[:, :2] < box[:, 2:]).all() and (visible[:, :2] <= visible[:, 2:]).all()
    assert (visible[:, :2] >= box[:, :2]).all() and (visible[:, 2:] <= box[:, 2:]).all()


@settings(deadline=None, max_examples=100)
@given(st.tuples(*[st.integers(-40, 60)] * 2), st.tuples(*[st.integers(1, 60)] * 2), st.data(), st.booleans())
def test_filter_boxes_agrees_with_counted_pixels(
    corner: tuple[int, int], sides: tuple[int, int], data: st.DataObject, ignore: bool
) -> None:
    """Count pixels in masks that are larger than the image, because boxes extend beyond it."""
    x1, y1, x2, y2 = *corner, corner[0] + sides[0], corner[1] + sides[1]
    u1, v1 = data.draw(st.integers(x1, x2)), data.draw(st.integers(y1, y2))
    u2, v2 = data.draw(st.integers(u1, x2)), data.draw(st.integers(v1, y2))
    person, part, inside = np.zeros((3, 200, 200), bool)
    person[50 + y1 : 50 + y2, 50 + x1 : 50 + x2] = True
    part[50 + v1 : 50 + v2, 50 + u1 : 50 + u2] = True
    inside[50:98, 50:114] = True  # an image of 48 x 64
    boxes, visible = (np.array([box], np.float32) for box in ((x1, y1, x2, y2), (u1, v1, u2, v2)))
    augmented = filter_boxes(AugmentedImage(np.zeros((48, 64, 3), np.uint8), boxes, visible, np.array([ignore])))
    assert len(augmented.ignore) == (person & inside).any()
    for box, visible_box, ignored in zip(augmented.boxes_xyxy, augmented.visible_xyxy, augmented.ignore, strict=True):
        area_inside, visible_inside = (person & inside).sum(), (part & inside).sum()
        assert (box[2] - box[0]) * (box[3] - box[1]) == area_inside
        assert (visible_box[2] - visible_box[0]) * (visible_box[3] - visible_box[1]) == visible_inside
        rows = (person & inside).any(1).sum()
        assert ignored == (
            ignore or area_inside < 0.35 * person.sum() or visible_inside < 0.2 * person.sum() or rows < 8
        )


def test_person_with_cropped_visible_part_is_ignored() -> None:
    """Half of the full box is inside the image, but the visible box is completely outside."""
    box = np.array([[10, -40, 50, 40]], np.float32)
    head, legs = np.array([[10, -40, 50, -10]], np.float32), np.array([[10, 10, 50, 40]], np.float32)
    image, ignore = np.zeros((64, 64, 3), np.uint8), np.array([False])
    assert filter_boxes(AugmentedImage(image, box, head, ignore)).ignore.tolist() == [True]
    assert filter_boxes(AugmentedImage(image, box, legs, ignore)).ignore.tolist() == [False]


def test_person_cropped_to_a_narrow_strip_is_ignored() -> None:
    combinations = set()
    image = np.zeros((128, 128, 3), np.uint8)
    person = np.array([[0, 30, 20, 110]], np.float32)
    for seed in range(60):
        source = AugmentedImage(image, person, person, np.array([False]))
        augmented = augment([make_loader(source)], (128, 128), np.random.default_rng(seed))
        for (x1, y1, x2, y2), ignored in zip(augmented.boxes_xyxy.tolist(), augmented.ignore.tolist(), strict=True):
            narrow = (x2 - x1) / (y2 - y1) < 0.08  # full box: 0.25
            combinations.add((narrow, ignored))
            assert not narrow or ignored
    assert (True, True) in combinations and (False, False) in combinations


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(draw_persons(range(6)))
def test_two_flips_are_the_identity(persons: list[Person]) -> None:
    original = render_scene(persons, SCENE_HW)
    once, twice = horizontal_flip(original), horizontal_flip(horizontal_flip(original))
    np.testing.assert_array_equal(once.image, original.image[:, ::-1])
    np.testing.assert_array_equal(twice.image, original.image)
    np.testing.assert_array_equal(twice.boxes_xyxy, original.boxes_xyxy)
    np.testing.assert_array_equal(twice.visible_xyxy, original.visible_xyxy)
    for person, box, visible in zip(persons, once.boxes_xyxy, once.visible_xyxy, strict=True):
        np.testing.assert_array_equal(box, find_color_extent(once, person.color))
        assert (visible[2] == box[2]) and (visible[1] == box[1])  # flipped from the left to the right
    np.testing.assert_array_equal(once.ignore, original.ignore)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), *[st.floats(0.7, 1.3)] * 2, st.just(0.0) | st.floats(0.7, 1.3))
def test_color_jitter_matches_torchvision(seed: int, brightness: float, contrast: float, saturation: float) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    expected = torch.from_numpy(image).permute(2, 0, 1)
    expected = torchvision_functional.adjust_brightness(expected, brightness)
    expected = torchvision_functional.adjust_contrast(expected, contrast)
    expected = torchvision_functional.adjust_saturation(expected, saturation).permute(1, 2, 0)
    np.testing.assert_allclose(
        color_jitter(image, brightness, contrast, saturation).astype(int), expected.numpy().astype(int), atol=5
    )


def test_loaders_get_at_most_the_largest_frame_size() -> None:
    requested = []

    def load(frame_hw: tuple[float, float]) -> AugmentedImage:
        requested.append(frame_hw)
        return render_scene([], (50, 70))

    for seed in range(200):
        augment([load] * (1 if seed % 2 else 4), (96, 128), np.random.default_rng(seed))
    largest = np.max(requested, axis=0) / (96, 128)
    assert (largest <= MAX_FRAME_SCALE).all() and (largest > 0.9 * MAX_FRAME_SCALE).all()


@pytest.mark.parametrize("image_hw", [(1, 1), (1, 500), (500, 1), (3, 2000), (50, 70)])
@pytest.mark.parametrize("count", [1, 4])
def test_images_of_extreme_size_are_augmented(image_hw: tuple[int, int], count: int) -> None:
    for seed in range(10):
        augmented = augment([make_loader(render_scene([], image_hw))] * count, (64, 96), np.random.default_rng(seed))
        assert augmented.image.shape == (64, 96, 3) and augmented.boxes_xyxy.shape == augmented.visible_xyxy.shape == (
            0,
            4,
        )


def test_augmentation_depends_on_the_seed_only() -> None:
    persons = [Person(color, (5, 5), (20, 40), (1, 1), False) for color in range(6)]
    first, second, other = (
        augment([make_loader(render_scene(persons, SCENE_HW))] * 4, (64, 96), np.random.default_rng(seed))
        for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.boxes_xyxy, second.boxes_xyxy)
    assert not np.array_equal(first.image, other.image)


def test_augment_does_not_modify_its_source() -> None:
    """The source can be an entry of the image cache."""
    source = render_scene([Person(0, (5, 5), (20, 40), (0.5, 0.5), False)], SCENE_HW)
    before = replace(source, image=source.image.copy(), boxes_xyxy=source.boxes_xyxy.copy())
    for seed in range(20):
        augment([make_loader(source)], (96, 128), np.random.default_rng(seed))
    np.testing.assert_array_equal(source.image, before.image)
    np.testing.assert_array_equal(source.boxes_xyxy, before.boxes_xyxy)
