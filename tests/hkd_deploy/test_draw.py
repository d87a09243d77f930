"""Drawing: the right pixels change, the picture given does not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_deploy.draw import MatchStatus, draw_box, draw_detections, draw_overlay
from hkd_det.structures import Detections

GREY = 90


def picture(height: int = 360, width: int = 640) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def one(box: tuple[float, ...], score: float = 0.5) -> Detections:
    return Detections(np.array([box], np.float32), np.array([score], np.float32))


@pytest.mark.parametrize("verdict", list(MatchStatus))
def test_an_edge_has_the_colour_of_its_verdict(verdict: MatchStatus) -> None:
    before = picture()
    canvas = draw_detections(before, one((100, 100, 200, 300)), [verdict])
    assert (before == GREY).all()
    on_edge = (canvas == verdict.value).all(axis=2)
    assert on_edge[100:300, 100].any()
    assert not on_edge[110:290, 110:190].any()  # the inside stays free
    assert (canvas[120:280, 120:180] == GREY).all()


def test_a_miss_is_dashed_and_a_hit_is_not() -> None:
    parts = {}
    for verdict in (MatchStatus.TRUE_POSITIVE, MatchStatus.FALSE_NEGATIVE):
        canvas = draw_detections(picture(), one((100, 100, 200, 300)), [verdict], show_scores=False)
        parts[verdict] = (canvas[110:290, 100] == verdict.value).all(axis=1).mean()
    assert parts[MatchStatus.TRUE_POSITIVE] == 1
    assert 0.3 < parts[MatchStatus.FALSE_NEGATIVE] < 0.7


def test_the_best_is_on_top() -> None:
    detections = Detections(np.array([[50, 50, 150, 250], [50, 50, 150, 250]], np.float32), np.array([0.9, 0.2]))
    canvas = draw_detections(
        picture(), detections, [MatchStatus.FALSE_POSITIVE, MatchStatus.IGNORED], show_scores=False
    )
    assert canvas[150, 50].tolist() == list(MatchStatus.FALSE_POSITIVE.value)


def test_captions_are_left_out_on_request_and_on_narrow_boxes() -> None:
    wide, narrow = one((100, 100, 200, 300)), one((100, 100, 108, 130))
    assert (draw_detections(picture(), wide)[80:96, 100:140] != GREY).any()
    assert (draw_detections(picture(), wide, show_scores=False)[80:96, 100:140] == GREY).all()
    assert (draw_detections(picture(), narrow)[80:96, 90:140] == GREY).all()


def test_nothing_to_draw() -> None:
    assert np.array_equal(draw_detections(picture(), Detections.empty()), picture())


def test_verdicts_must_be_as_many_as_detections() -> None:
    with pytest.raises(ValueError, match="zip"):
        draw_detections(picture(), one((1, 1, 5, 5)), [])


@settings(deadline=None)
@given(
    st.tuples(*[st.floats(-300, 1500, width=32)] * 4),
    st.sampled_from(list(MatchStatus)),
    st.tuples(st.integers(1, 700), st.integers(1, 700)),
)
def test_any_box_on_any_picture(box: tuple[float, ...], verdict: MatchStatus, size_hw: tuple[int, int]) -> None:
    canvas = picture(*size_hw)
    draw_box(canvas, box, verdict, "0.50")
    draw_overlay(canvas, ["one", "two"], "three")
    assert canvas.shape == (*size_hw, 3)


@pytest.mark.parametrize("size_hw", [(512, 1024), (360, 640)])
def test_the_panel_is_readable_and_small(size_hw: tuple[int, int]) -> None:
    canvas = np.full((*size_hw, 3), 255, np.uint8)  # the worst ground: white, under white text
    draw_overlay(canvas, ["mini-student  640x512  cpu", "31.4 fps   7 people"])
    changed = (canvas != 255).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert (rows[0], columns[0]) == (0, 0)
    panel = canvas[: rows[-1] + 1, : columns[-1] + 1].astype(int)
    assert np.median(panel) < 110  # text is far lighter than its ground
    assert panel.max() > 230
    assert changed.mean() < 0.15
