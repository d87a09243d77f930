"""Drawing of lines and zones with their counts."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.demo.cameras import Line, Point, Zone
from hkd_det.draw import FONT, TEXT_DARK, RGBColor

LINE_COLOR: RGBColor = (255, 196, 0)
ZONE_COLOR: RGBColor = (90, 180, 255)
ARROW_RATIO = 0.05  # of the image height; the arrow points to the right side of a line


def draw_scene(
    canvas_rgb: NDArray[np.uint8], lines: Sequence[Line], zones: Sequence[Zone], counts: Mapping[str, Any]
) -> None:
    """Draw lines and zones in place. An arrow at each line points to its right side.

    Args:
        canvas_rgb (uint8[H, W, 3]): RGB image to draw on.
        lines: Lines, normalized.
        zones: Zones, normalized.
        counts: Counts of `SceneCounter`. A line or zone without counts has its name only.
    """
    thickness = max(2, round(min(canvas_rgb.shape[:2]) / 250))
    for zone in zones:
        corners = _to_pixels(zone.points, canvas_rgb)
        _draw_outline(canvas_rgb, corners, True, ZONE_COLOR, thickness)
        values = counts.get("zones", {}).get(zone.name)
        text = f"{zone.name}: {values['persons']} now, {values['entries']} in, {values['exits']} out" if values else ""
        _draw_label(canvas_rgb, text or zone.name, corners[corners[:, 1].argmin()], ZONE_COLOR)
    for line in lines:
        ends = _to_pixels(line.points, canvas_rgb)
        _draw_outline(canvas_rgb, ends, False, LINE_COLOR, thickness)
        along = (ends[1] - ends[0]) / max(float(np.hypot(*(ends[1] - ends[0]))), 1.0)
        middle = ends.mean(0)
        tip = middle + ARROW_RATIO * canvas_rgb.shape[0] * np.array([-along[1], along[0]])
        start, end = (tuple(int(value) for value in point) for point in (middle, tip))
        cv2.arrowedLine(canvas_rgb, start, end, LINE_COLOR, thickness, cv2.LINE_AA, tipLength=0.4)
        values = counts.get("lines", {}).get(line.name)
        text = f"{line.name}: {values['left']} left, {values['right']} right" if values else line.name
        _draw_label(canvas_rgb, text, ends[ends[:, 1].argmin()], LINE_COLOR)


def _to_pixels(points: Sequence[Point], canvas_rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    height, width = canvas_rgb.shape[:2]
    return np.round(np.array(points) * (width, height)).astype(np.int32)


def _draw_outline(
    canvas_rgb: NDArray[np.uint8], points: NDArray[np.int32], is_closed: bool, color: RGBColor, thickness: int
) -> None:
    """Draw a line with a dark outline, which keeps it visible on a bright background."""
    for line_color, width in ((TEXT_DARK, thickness + 2), (color, thickness)):
        cv2.polylines(canvas_rgb, [points], is_closed, line_color, width, cv2.LINE_AA)


def _draw_label(canvas_rgb: NDArray[np.uint8], text: str, point: NDArray[np.int32], color: RGBColor) -> None:
    """Draw text above a point, inside the image."""
    scale = max(0.4, min(canvas_rgb.shape[:2]) / 1100)
    ascii_text = text.encode("ascii", "replace").decode()  # the font has no other characters
    (width, height), _ = cv2.getTextSize(ascii_text, FONT, scale, 1)
    x = min(max(0, int(point[0]) - width // 2), max(0, canvas_rgb.shape[1] - width - 6))
    bottom = min(max(int(point[1]) - 4, height + 6), canvas_rgb.shape[0])
    cv2.rectangle(canvas_rgb, (x, bottom - height - 6), (x + width + 5, bottom), color, cv2.FILLED)
    cv2.putText(canvas_rgb, ascii_text, (x + 3, bottom - 3), FONT, scale, TEXT_DARK, 1, cv2.LINE_AA)
