"""Placement: what is painted into a picture is found where it is said to lie, and its box comes back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.letterbox import AlignedLetterbox, normalize_input
from hkd_det.onnxrt.model_config import OnnxModelConfig

PAD = 114
side = st.integers(60, 300)


@pytest.mark.parametrize("how", ["top-left", "center", "stretch"])
@settings(deadline=None, max_examples=25)
@given(st.tuples(side, side), st.tuples(side, side), st.integers(0, 10_000))
def test_a_painted_box_comes_back(how: str, source_hw: tuple[int, int], input_hw: tuple[int, int], seed: int) -> None:
    chance = np.random.default_rng(seed)
    y1, x1 = (int(chance.integers(0, limit // 3)) for limit in source_hw)
    y2, x2 = (int(chance.integers(limit - limit // 3, limit + 1)) for limit in source_hw)
    picture = np.zeros((*source_hw, 3), np.uint8)
    picture[y1:y2, x1:x2] = 255
    place = AlignedLetterbox.from_resize_mode(source_hw, input_hw, how)
    placed = place.apply(picture, PAD)
    assert placed.shape == (*input_hw, 3)
    rows, columns = np.nonzero(placed[..., 0] > 127)
    found = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float32)
    pixel = max(2.0, *(1.5 * a / b for a, b in zip(source_hw, place.content_hw, strict=True)))
    assert np.abs(place.boxes_to_source(found) - [x1, y1, x2, y2]).max() <= pixel


@settings(deadline=None, max_examples=25)
@given(st.tuples(side, side), st.tuples(side, side))
def test_proportions_are_kept_the_rest_is_grey_and_lies_where_it_should(
    source_hw: tuple[int, int], input_hw: tuple[int, int]
) -> None:
    picture = np.zeros((*source_hw, 3), np.uint8)
    free = {}
    for how in ("top-left", "center"):
        black = AlignedLetterbox.from_resize_mode(source_hw, input_hw, how).apply(picture, PAD)[..., 0] == 0
        rows, columns = np.flatnonzero(black.any(1)), np.flatnonzero(black.any(0))
        scale = min(a / b for a, b in zip(input_hw, source_hw, strict=True))
        assert abs(len(rows) - scale * source_hw[0]) <= 0.5 + 1e-6 or len(rows) == 1
        assert abs(len(columns) - scale * source_hw[1]) <= 0.5 + 1e-6 or len(columns) == 1
        assert black.sum() == len(rows) * len(columns)
        free[how] = [(int(line[0]), limit - 1 - int(line[-1])) for line, limit in zip((rows, columns), input_hw)]  # noqa: B905
    assert all(before == 0 for before, _ in free["top-left"])
    assert all(after - before in (0, 1) for before, after in free["center"])


def test_boxes_are_cut_at_the_pictures_borders() -> None:
    place = AlignedLetterbox.from_resize_mode(
        (100, 200), (100, 100), "center"
    )  # half size, 25 px of grey above and below
    back = place.boxes_to_source(np.array([[-10.0, 0.0, 120.0, 60.0], [10.0, 35.0, 20.0, 45.0]]))
    assert back.tolist() == [[0, 0, 200, 70], [20, 20, 40, 40]]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("colours", ["rgb", "bgr"])
def test_numbers_are_pixel_by_pixel_what_the_description_asks_for(layout: str, colours: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3)).astype(np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    description = OnnxModelConfig("yolo-raw", layout=layout, color_order=colours, input_scale=1.0, mean=mean, std=std)  # type: ignore[arg-type]
    numbers = normalize_input(picture, description, np.float32)
    assert numbers.dtype == np.float32 and numbers.flags.c_contiguous
    for b, y, x, c in np.ndindex(picture.shape):
        channel = c if colours == "rgb" else 2 - c
        at = (b, channel, y, x) if layout == "NCHW" else (b, y, x, channel)
        assert numbers[at] == pytest.approx((picture[b, y, x, c] / 255 - mean[channel]) / std[channel], rel=1e-5)


def test_plain_pixels_stay_what_they_are() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 3)).astype(np.uint8)
    numbers = normalize_input(picture, OnnxModelConfig("boxes-scores", layout="NHWC"), np.uint8)
    assert numbers.dtype == np.uint8 and np.array_equal(numbers, picture)
