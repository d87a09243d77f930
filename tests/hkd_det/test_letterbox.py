"""Letterbox geometry, pixels and boxes for each alignment, and `--imgsz` parsing."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hkd_det.errors import UsageError
from hkd_det.letterbox import PAD_VALUE, Align, Letterbox, format_imgsz, parse_imgsz, resize

SIDES = st.integers(2, 400)
SIZES = st.tuples(st.integers(60, 300), st.integers(60, 300))


def boxes_to_input(letterbox: Letterbox, boxes_xyxy: NDArray[np.floating]) -> NDArray[np.float64]:
    """Map boxes from source to input pixels: the inverse of `Letterbox.boxes_to_source`."""
    (height, width), (source_height, source_width) = letterbox.content_hw, letterbox.source_hw
    top, left = letterbox.content_offset
    return boxes_xyxy * np.tile([width / source_width, height / source_height], 2) + [left, top, left, top]


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(1, 8), st.integers(1, 8), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_boxes_map_to_input_and_back(height: int, width: int, rows: int, columns: int, ratios: list[float]) -> None:
    letterbox = Letterbox((height, width), (32 * rows, 32 * columns))
    x1, x2 = sorted((ratios[0] * width, ratios[1] * width))
    y1, y2 = sorted((ratios[2] * height, ratios[3] * height))
    box = np.array([[x1, y1, x2, y2]])
    input_box = boxes_to_input(letterbox, box)
    np.testing.assert_allclose(letterbox.boxes_to_source(input_box), box, atol=1e-3)
    content_height, content_width = letterbox.content_hw
    assert 1 <= content_height <= 32 * rows and 1 <= content_width <= 32 * columns
    assert content_height == 32 * rows or content_width == 32 * columns
    assert (input_box <= np.array([content_width, content_height] * 2) + 1e-3).all()


@pytest.mark.parametrize(
    ("source_hw", "size_hw"), [((1080, 1920), (180, 320)), ((97, 480), (20, 96)), ((40, 9), (3, 9))]
)
def test_resize_loses_less_than_bilinear_interpolation(source_hw: tuple[int, int], size_hw: tuple[int, int]) -> None:
    """Against the average of pixel areas, on blurred noise as an image and on noise as details below a pixel."""
    noise = np.random.default_rng(0).integers(0, 256, (*source_hw, 3), dtype=np.uint8)
    scale = source_hw[0] / size_hw[0]
    for image, tolerance in ((cv2.GaussianBlur(noise, (0, 0), 2 * scale), 1.0), (noise, 40.0)):
        expected = cv2.resize(image, size_hw[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)
        bilinear = cv2.resize(image, size_hw[::-1], interpolation=cv2.INTER_LINEAR)
        error = np.abs(resize(image, size_hw) - expected).mean()
        assert error < tolerance and error < 0.7 * np.abs(bilinear - expected).mean() + 0.5


def test_resize_averages_blocks_of_powers_of_two() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    blocks = image.reshape(8, 8, 12, 8, 3).mean((1, 3))
    assert np.abs(resize(image, (8, 12)) - blocks).max() <= 1.5  # three roundings
    assert np.array_equal(resize(image, (64, 96)), image)


@pytest.mark.parametrize("source_hw", [(32, 64), (20, 64), (90, 50), (7, 300), (96, 64)])
def test_out_receives_one_row_of_a_batch(source_hw: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*source_hw, 3), dtype=np.uint8)
    batch = np.full((3, 32, 64, 3), 7, np.uint8)
    letterbox = Letterbox(source_hw, (32, 64))
    assert np.shares_memory(letterbox.apply(image[..., ::-1], batch[1]), batch)
    assert np.array_equal(batch[1], letterbox.apply(image[..., ::-1].copy()))
    assert (batch[[0, 2]] == 7).all()


def test_top_left_pads_right_and_bottom() -> None:
    image = np.zeros((20, 80, 3), np.uint8)
    image[5:15, 20:40] = (255, 0, 0)
    resized = Letterbox((20, 80), (64, 160)).apply(image)
    assert resized.shape == (64, 160, 3) and (resized[40:] == PAD_VALUE).all()
    x1, y1, x2, y2 = boxes_to_input(Letterbox((20, 80), (64, 160)), np.array([[20, 5, 40, 15]]))[0].astype(int)
    assert (resized[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] == (255, 0, 0)).all()
    same = Letterbox((64, 160), (64, 160)).apply(np.full((64, 160, 3), 9, np.uint8))
    assert (same == 9).all()


@pytest.mark.parametrize("align", ["top-left", "center", "stretch"])
@settings(deadline=None, max_examples=25)
@given(SIZES, SIZES, st.integers(0, 10_000))
def test_drawn_box_has_the_mapped_coordinates(
    align: Align, source_hw: tuple[int, int], input_hw: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    y1, x1 = (int(rng.integers(0, side // 3)) for side in source_hw)
    y2, x2 = (int(rng.integers(side - side // 3, side + 1)) for side in source_hw)
    image = np.zeros((*source_hw, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    letterbox = Letterbox(source_hw, input_hw, align, interpolation="linear")
    resized = letterbox.apply(image)
    assert resized.shape == (*input_hw, 3)
    rows, columns = np.nonzero(resized[..., 0] > 127)
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float32)
    tolerance = max(2.0, *(1.5 * a / b for a, b in zip(source_hw, letterbox.content_hw, strict=True)))
    assert np.abs(letterbox.boxes_to_source(box) - [x1, y1, x2, y2]).max() <= tolerance
    expected = np.array([[x1, y1, x2, y2]], np.float32)
    np.testing.assert_allclose(letterbox.boxes_to_source(boxes_to_input(letterbox, expected)), expected, atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(SIZES, SIZES)
def test_aspect_ratio_is_kept_and_the_rest_padded(source_hw: tuple[int, int], input_hw: tuple[int, int]) -> None:
    image = np.zeros((*source_hw, 3), np.uint8)
    margins = {}
    for align in ("top-left", "center"):
        is_content = Letterbox(source_hw, input_hw, align, interpolation="linear").apply(image)[..., 0] == 0
        rows, columns = np.flatnonzero(is_content.any(1)), np.flatnonzero(is_content.any(0))
        scale = min(a / b for a, b in zip(input_hw, source_hw, strict=True))
        assert abs(len(rows) - scale * source_hw[0]) <= 0.5 + 1e-6 or len(rows) == 1
        assert abs(len(columns) - scale * source_hw[1]) <= 0.5 + 1e-6 or len(columns) == 1
        assert is_content.sum() == len(rows) * len(columns)
        margins[align] = [
            (int(line[0]), side - 1 - int(line[-1])) for line, side in zip((rows, columns), input_hw, strict=True)
        ]
    assert all(before == 0 for before, _ in margins["top-left"])
    assert all(after - before in (0, 1) for before, after in margins["center"])


def test_boxes_are_clipped_to_the_source_image() -> None:
    letterbox = Letterbox((100, 200), (100, 100), "center")  # half size, 25 px of padding above and below
    boxes = letterbox.boxes_to_source(np.array([[-10.0, 0.0, 120.0, 60.0], [10.0, 35.0, 20.0, 45.0]]))
    assert boxes.tolist() == [[0, 0, 200, 70], [20, 20, 40, 40]]


@pytest.mark.parametrize(("text", "size_hw"), [("640", (640, 640)), ("640x512", (512, 640)), ("1024X512", (512, 1024))])
def test_imgsz_is_width_by_height(text: str, size_hw: tuple[int, int]) -> None:
    assert parse_imgsz(text) == size_hw
    assert parse_imgsz(format_imgsz(size_hw)) == size_hw


@pytest.mark.parametrize("text", ["", "x", "640x", "640x512x3", "-64", "0", "6.4", "100", "640x500", "٦٤"])
def test_invalid_imgsz_is_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="--imgsz"):
        parse_imgsz(text)
