"""Drawing of boxes and text on images, for the demo and the reports."""

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hkd_det.structures import Detections  # which imports this module

RGBColor = tuple[int, int, int]
Redaction = Literal["blur", "pixelate", "fill"]
LineSegment = tuple[tuple[int, int], tuple[int, int]]

REDACTIONS: tuple[Redaction, ...] = get_args(Redaction)
REDACTION_MARGIN = 0.1  # of the sides of a box, added on each side
REDACTION_CELLS = 8  # across the longer side of a box; a face is less than one cell
FONT = cv2.FONT_HERSHEY_SIMPLEX
TEXT_DARK: RGBColor = (16, 16, 16)
TEXT_LIGHT: RGBColor = (245, 245, 245)
WARNING: RGBColor = (255, 196, 0)


class MatchStatus(Enum):
    """Match status of a box; the value is its RGB color.

    The colors differ in lightness, and false negatives are dashed. Color-blind readers can distinguish them.
    """

    TRUE_POSITIVE = (38, 208, 148)
    FALSE_NEGATIVE = (255, 72, 72)
    FALSE_POSITIVE = (255, 214, 10)
    IGNORED = (176, 176, 176)


def redact_boxes(
    image_rgb: NDArray[np.uint8], boxes_xyxy: NDArray[np.float32], redaction: Redaction
) -> NDArray[np.uint8]:
    """Make the content of boxes unrecognizable on a copy of an image.

    Args:
        image_rgb (uint8[H, W, 3]): RGB.
        boxes_xyxy (float32[N, 4]): Boxes in pixels. They are enlarged by a tenth on each side.
        redaction: "blur", "pixelate", or "fill" with gray. Only "fill" removes all information.

    Returns:
        The image, uint8[H, W, 3].
    """
    canvas = image_rgb.copy()
    height, width = image_rgb.shape[:2]
    for x1, y1, x2, y2 in boxes_xyxy.tolist():
        margin_x, margin_y = REDACTION_MARGIN * (x2 - x1), REDACTION_MARGIN * (y2 - y1)
        left, right = (round(min(max(x, 0), width)) for x in (x1 - margin_x, x2 + margin_x))
        top, bottom = (round(min(max(y, 0), height)) for y in (y1 - margin_y, y2 + margin_y))
        if left >= right or top >= bottom:
            continue
        region = canvas[top:bottom, left:right]
        if redaction == "fill":
            region[:] = 128
            continue
        cell = max(1, round(max(region.shape[:2]) / REDACTION_CELLS))
        size_wh = (-(-region.shape[1] // cell), -(-region.shape[0] // cell))
        small = cv2.resize(image_rgb[top:bottom, left:right], size_wh, interpolation=cv2.INTER_AREA)
        enlarge = cv2.INTER_NEAREST if redaction == "pixelate" else cv2.INTER_CUBIC
        region[:] = cv2.resize(small, region.shape[1::-1], interpolation=enlarge)
    return canvas


def draw_detections(
    image_rgb: NDArray[np.uint8],
    detections: "Detections",
    match_statuses: Sequence[MatchStatus] | None = None,
    show_scores: bool = True,
    track_ids: NDArray[np.int64] | None = None,
) -> NDArray[np.uint8]:
    """Draw detections on a copy of an image.

    Args:
        image_rgb (uint8[H, W, 3]): RGB.
        detections: Boxes in image pixels, sorted by descending score.
        match_statuses: One per detection, for the color. None draws all in the color of a true positive.
        show_scores: True to label each box with its score.
        track_ids (int64[N]): Ids that replace the scores of tracked persons. -1 for a box without one.

    Returns:
        The image with boxes, uint8[H, W, 3].
    """
    canvas = image_rgb.copy()
    if match_statuses is None:
        match_statuses = [MatchStatus.TRUE_POSITIVE] * len(detections)
    # Draw the highest score last: overlapping boxes must not hide it.
    labels = [f"{score:.2f}" if show_scores else "" for score in detections.scores]
    if track_ids is not None:
        labels = [f"#{track_id}" if track_id >= 0 else label for track_id, label in zip(track_ids, labels, strict=True)]
    rows = list(zip(detections.boxes_xyxy, match_statuses, labels, strict=True))
    for box, match_status, label in reversed(rows):
        draw_box(canvas, box, match_status, label)
    return canvas


def draw_box(
    canvas_rgb: NDArray[np.uint8],
    box_xyxy: Sequence[float] | NDArray[np.floating],
    match_status: MatchStatus,
    label: str = "",
) -> None:
    """Draw one box in place. A false negative is dashed.

    Args:
        canvas_rgb (uint8[H, W, 3]): RGB image to draw on.
        box_xyxy (float[4]): xyxy, image pixels.
        match_status: Determines color and line style.
        label: Text above the box. Omitted if the box is too narrow for it.
    """
    x1, y1, x2, y2 = (round(float(value)) for value in box_xyxy)
    thickness = _compute_thickness_px(canvas_rgb)
    lines = (
        _make_dashed_edges(x1, y1, x2, y2, 5 * thickness)
        if match_status is MatchStatus.FALSE_NEGATIVE
        else _get_box_edges(x1, y1, x2, y2)
    )
    # A dark outline keeps the line visible on a bright background.
    for color, width in ((TEXT_DARK, thickness + 2), (match_status.value, thickness)):
        for start, end in lines:
            cv2.line(canvas_rgb, start, end, color, width, cv2.LINE_8)  # axis-aligned lines need no antialiasing
    if label:
        _draw_label(canvas_rgb, (x1, y1, x2, y2), label, match_status.value)


def draw_overlay(canvas_rgb: NDArray[np.uint8], lines: Sequence[str], warning: str = "") -> None:
    """Draw lines of text in place, in the top left corner on a dark background.

    Args:
        canvas_rgb (uint8[H, W, 3]): RGB image to draw on.
        lines: Lines of text.
        warning: Last line, in yellow.
    """
    scale, line_px = _compute_text_scale(canvas_rgb), _compute_line_height_px(canvas_rgb)
    pad = line_px // 2
    texts = [(line, TEXT_LIGHT) for line in lines] + ([(warning, WARNING)] if warning else [])
    width = max(cv2.getTextSize(text, FONT, scale, 1)[0][0] for text, _ in texts) + 2 * pad
    background = canvas_rgb[: line_px * len(texts) + 3 * pad // 2, :width]
    background[:] = (0.35 * background + 0.65 * np.array(TEXT_DARK)).astype(np.uint8)
    for row, (text, color) in enumerate(texts):
        baseline = pad + line_px * (row + 1) - line_px // 4
        cv2.putText(canvas_rgb, text, (pad, baseline), FONT, scale, color, 1, cv2.LINE_AA)


def _get_short_side_px(canvas: NDArray[np.uint8]) -> int:
    height, width = canvas.shape[:2]
    return int(min(height, width))


def _compute_thickness_px(canvas: NDArray[np.uint8]) -> int:
    return max(1, round(_get_short_side_px(canvas) / 300))


def _compute_text_scale(canvas: NDArray[np.uint8]) -> float:
    """Capitals of the Hershey font are 21 px high at scale 1 and illegible below 10 px."""
    return max(0.45, _get_short_side_px(canvas) / 1000)


def _compute_line_height_px(canvas: NDArray[np.uint8]) -> int:
    return round(38 * _compute_text_scale(canvas))


def _get_box_edges(x1: int, y1: int, x2: int, y2: int) -> list[LineSegment]:
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    return list(zip(corners, [*corners[1:], corners[0]], strict=True))


def _make_dashed_edges(x1: int, y1: int, x2: int, y2: int, dash_px: int) -> list[LineSegment]:
    """Split the four edges into dashes, with gaps of the same length."""
    dashes = []
    for start, end in _get_box_edges(x1, y1, x2, y2):
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        for dash_start in range(0, length, 2 * dash_px):
            dash_end = min(dash_start + dash_px, length)
            dashes.append(
                (_interpolate_point(start, end, dash_start / length), _interpolate_point(start, end, dash_end / length))
            )
    return dashes


def _interpolate_point(start: tuple[int, int], end: tuple[int, int], fraction: float) -> tuple[int, int]:
    return round(start[0] + fraction * (end[0] - start[0])), round(start[1] + fraction * (end[1] - start[1]))


def _draw_label(canvas: NDArray[np.uint8], box: tuple[int, int, int, int], label: str, color: RGBColor) -> None:
    x1, y1, x2, _ = box
    scale = 0.8 * _compute_text_scale(canvas)
    (width, height), _ = cv2.getTextSize(label, FONT, scale, 1)
    if x2 - x1 < 0.6 * width:  # labels would hide small persons in a crowd
        return
    left = min(max(0, x1 - 1), max(0, canvas.shape[1] - width - 6))
    bottom = y1 if y1 >= height + 6 else y1 + height + 6  # inside the box if there is no space above
    cv2.rectangle(canvas, (left, bottom - height - 6), (left + width + 5, bottom), color, cv2.FILLED)
    cv2.putText(canvas, label, (left + 3, bottom - 3), FONT, scale, TEXT_DARK, 1, cv2.LINE_AA)
