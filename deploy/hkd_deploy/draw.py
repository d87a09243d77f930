"""Drawing: boxes on a picture for the demo and the reports, and the demo's panel of figures."""

from collections.abc import Sequence
from enum import Enum

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.structures import Detections

RGBColor = tuple[int, int, int]  # RGB

FONT = cv2.FONT_HERSHEY_SIMPLEX
TEXT_DARK: RGBColor = (16, 16, 16)
TEXT_LIGHT: RGBColor = (245, 245, 245)
WARNING: RGBColor = (255, 196, 0)


class MatchStatus(Enum):
    """What became of a box when it was compared with the truth; the value is its colour.

    Told apart by the colour-blind too: blue-green, red, yellow and grey differ in lightness, and a miss is dashed.
    """

    TRUE_POSITIVE = (38, 208, 148)
    FALSE_NEGATIVE = (255, 72, 72)
    FALSE_POSITIVE = (255, 214, 10)
    IGNORED = (176, 176, 176)


def draw_detections(
    image_rgb: NDArray[np.uint8],
    detections: Detections,
    match_statuses: Sequence[MatchStatus] | None = None,
    show_scores: bool = True,
) -> NDArray[np.uint8]:
    """A copy of the picture, uint8 RGB (H, W, 3), with its detections; captions are their scores.

    verdicts: one a detection, for its colour; without them all are drawn as hits.
    """
    canvas = image_rgb.copy()
    match_statuses = match_statuses if match_statuses is not None else [MatchStatus.TRUE_POSITIVE] * len(detections)
    # The best is drawn last: where people overlap it must not be covered.
    for box, score, verdict in reversed(
        list(zip(detections.boxes_xyxy, detections.scores, match_statuses, strict=True))
    ):
        draw_box(canvas, box, verdict, f"{score:.2f}" if show_scores else "")
    return canvas


def draw_box(
    canvas_rgb: NDArray[np.uint8],
    box_xyxy: Sequence[float] | NDArray[np.floating],
    match_status: MatchStatus,
    label: str = "",
) -> None:
    """Draw one box in place, dashed for a miss, with a caption above if the box is wide enough to carry it."""
    x1, y1, x2, y2 = (round(float(value)) for value in box_xyxy)
    thickness = _compute_thickness_px(canvas_rgb)
    lines = (
        _make_dashed_edges(x1, y1, x2, y2, 5 * thickness)
        if match_status is MatchStatus.FALSE_NEGATIVE
        else _get_box_edges(x1, y1, x2, y2)
    )
    for colour, width in ((TEXT_DARK, thickness + 2), (match_status.value, thickness)):  # a dark rim shows on snow
        for start, end in lines:
            cv2.line(canvas_rgb, start, end, colour, width, cv2.LINE_8)  # upright lines are crisp without smoothing
    if label:
        _draw_label(canvas_rgb, (x1, y1, x2, y2), label, match_status.value)


def draw_overlay(canvas_rgb: NDArray[np.uint8], lines: Sequence[str], warning: str = "") -> None:
    """Draw lines of figures in place, top left on a dark, half transparent ground; `caution` last, in yellow."""
    scale, line_px, pad = (
        _compute_text_scale(canvas_rgb),
        _compute_line_height_px(canvas_rgb),
        _compute_line_height_px(canvas_rgb) // 2,
    )
    texts = [(line, TEXT_LIGHT) for line in lines] + ([(warning, WARNING)] if warning else [])
    width = max(cv2.getTextSize(text, FONT, scale, 1)[0][0] for text, _ in texts) + 2 * pad
    ground = canvas_rgb[: line_px * len(texts) + 3 * pad // 2, :width]
    ground[:] = (0.35 * ground + 0.65 * np.array(TEXT_DARK)).astype(np.uint8)
    for row, (text, colour) in enumerate(texts):
        baseline = pad + line_px * (row + 1) - line_px // 4
        cv2.putText(canvas_rgb, text, (pad, baseline), FONT, scale, colour, 1, cv2.LINE_AA)


def _get_short_side_px(canvas: NDArray[np.uint8]) -> int:
    height, width = canvas.shape[:2]
    return int(min(height, width))


def _compute_thickness_px(canvas: NDArray[np.uint8]) -> int:
    return max(1, round(_get_short_side_px(canvas) / 300))


def _compute_text_scale(canvas: NDArray[np.uint8]) -> float:
    """Hershey's capitals are 21 px high at scale 1; below 10 px nobody can read them."""
    return max(0.45, _get_short_side_px(canvas) / 1000)


def _compute_line_height_px(canvas: NDArray[np.uint8]) -> int:
    return round(38 * _compute_text_scale(canvas))


LineSegment = tuple[tuple[int, int], tuple[int, int]]


def _get_box_edges(x1: int, y1: int, x2: int, y2: int) -> list[LineSegment]:
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    return list(zip(corners, [*corners[1:], corners[0]], strict=True))


def _make_dashed_edges(x1: int, y1: int, x2: int, y2: int, dash_px: int) -> list[LineSegment]:
    """The four edges cut into dashes with gaps of the same length."""
    dashes = []
    for start, end in _get_box_edges(x1, y1, x2, y2):
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        for begin in range(0, length, 2 * dash_px):
            stop = min(begin + dash_px, length)
            dashes.append(
                (_interpolate_point(start, end, begin / length), _interpolate_point(start, end, stop / length))
            )
    return dashes


def _interpolate_point(start: tuple[int, int], end: tuple[int, int], fraction: float) -> tuple[int, int]:
    return round(start[0] + fraction * (end[0] - start[0])), round(start[1] + fraction * (end[1] - start[1]))


def _draw_label(canvas: NDArray[np.uint8], box: tuple[int, int, int, int], label: str, color: RGBColor) -> None:
    x1, y1, x2, _ = box
    scale = 0.8 * _compute_text_scale(canvas)
    (width, height), _ = cv2.getTextSize(label, FONT, scale, 1)
    if x2 - x1 < 0.6 * width:  # a crowd of distant people would vanish behind its own scores
        return
    left = min(max(0, x1 - 1), max(0, canvas.shape[1] - width - 6))
    bottom = y1 if y1 >= height + 6 else y1 + height + 6  # inside the box where there is no room above
    cv2.rectangle(canvas, (left, bottom - height - 6), (left + width + 5, bottom), color, cv2.FILLED)
    cv2.putText(canvas, label, (left + 3, bottom - 3), FONT, scale, TEXT_DARK, 1, cv2.LINE_AA)
