"""Tests of the drawing functions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.draw import MatchStatus, draw_box, draw_detections, draw_overlay
from hkd_det.structures import Detections

GRAY = 90


def make_image(height: int = 360, width: int = 640) -> np.ndarray:
    return np.full((height, width, 3), GRAY, np.uint8)


def make_detections(box: tuple[float, ...], score: float = 0.5) -> Detections:
    return Detections(np.array([box], np.float32), np.array([score], np.float32))


@pytest.mark.parametrize("status", list(MatchStatus))
def test_draw_detections_edge_has_status_color(status: MatchStatus) -> None:
    before = make_image()
    canvas = draw_detections(before, make_detections((100, 100, 200, 300)), [status])
    assert (before == GRAY).all()
    on_edge = (canvas == status.value).all(axis=2)
    assert on_edge[100:300, 100].any()
    assert not on_edge[110:290, 110:190].any()  # the inside is unchanged
    assert (canvas[120:280, 120:180] == GRAY).all()


def test_draw_detections_false_negative_is_dashed() -> None:
    ratios = {}
    for status in (MatchStatus.TRUE_POSITIVE, MatchStatus.FALSE_NEGATIVE):
        canvas = draw_detections(make_image(), make_detections((100, 100, 200, 300)), [status], show_scores=False)
        ratios[status] = (canvas[110:290, 100] == status.value).all(axis=1).mean()
    assert ratios[MatchStatus.TRUE_POSITIVE] == 1
    assert 0.3 < ratios[MatchStatus.FALSE_NEGATIVE] < 0.7


def test_draw_detections_highest_score_on_top() -> None:
    detections = Detections(np.array([[50, 50, 150, 250], [50, 50, 150, 250]], np.float32), np.array([0.9, 0.2]))
    canvas = draw_detections(
        make_image(), detections, [MatchStatus.FALSE_POSITIVE, MatchStatus.IGNORED], show_scores=False
    )
    assert canvas[150, 50].tolist() == list(MatchStatus.FALSE_POSITIVE.value)


def test_draw_detections_label_needs_wide_box() -> None:
    wide, narrow = make_detections((100, 100, 200, 300)), make_detections((100, 100, 108, 130))
    assert (draw_detections(make_image(), wide)[80:96, 100:140] != GRAY).any()
    assert (draw_detections(make_image(), wide, show_scores=False)[80:96, 100:140] == GRAY).all()
    assert (draw_detections(make_image(), narrow)[80:96, 90:140] == GRAY).all()


def test_draw_detections_empty_is_copy() -> None:
    assert np.array_equal(draw_detections(make_image(), Detections.empty()), make_image())


def test_draw_detections_wrong_number_of_statuses_raises() -> None:
    with pytest.raises(ValueError, match="zip"):
        draw_detections(make_image(), make_detections((1, 1, 5, 5)), [])


@settings(deadline=None)
@given(
    st.tuples(*[st.floats(-300, 1500, width=32)] * 4),
    st.sampled_from(list(MatchStatus)),
    st.tuples(st.integers(1, 700), st.integers(1, 700)),
)
def test_draw_any_box_on_any_image(box: tuple[float, ...], status: MatchStatus, size_hw: tuple[int, int]) -> None:
    canvas = make_image(*size_hw)
    draw_box(canvas, box, status, "0.50")
    draw_overlay(canvas, ["one", "two"], "three")
    assert canvas.shape == (*size_hw, 3)


@pytest.mark.parametrize("size_hw", [(512, 1024), (360, 640)])
def test_draw_overlay_is_readable_and_small(size_hw: tuple[int, int]) -> None:
    canvas = np.full((*size_hw, 3), 255, np.uint8)  # worst case: white text on a white image
    draw_overlay(canvas, ["mini-student  640x512  cpu", "31.4 fps   persons 7"])
    changed = (canvas != 255).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert (rows[0], columns[0]) == (0, 0)
    overlay = canvas[: rows[-1] + 1, : columns[-1] + 1].astype(int)
    assert np.median(overlay) < 110  # dark background
    assert overlay.max() > 230
    assert changed.mean() < 0.15
