"""The canvas: shapes are painted into the picture and, with their owner's number, into an id map.

Perspective: a camera in a car, 1.4 m above a flat road, looking straight ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]


Color = tuple[float, float, float]


SUBPIXEL_SHIFT = 4  # OpenCV's fixed point: sixteenths of a pixel


BACKGROUND_ID = 0


class Canvas:
    """A picture (H, W, 3) uint8 RGB and an id map (H, W) int32: whose pixel is on top.

    Set `owner` before painting; `haze` mixes every colour with `air` (0 none, 1 all), as distance does.
    """

    def __init__(self, size_hw: tuple[int, int], haze_color: Color) -> None:
        self.image = np.zeros((*size_hw, 3), np.uint8)
        self.id_map = np.zeros(size_hw, np.int32)
        self.haze_color = haze_color
        self.haze_ratio = 0.0
        self.brightness = 1.0
        self.object_id = BACKGROUND_ID

    def draw_polygon(self, points: Sequence[Point], color: Color) -> None:
        """Fill a polygon, its edges smoothed in the picture and sharp in the id map."""
        fixed = np.round(np.array(points) * (1 << SUBPIXEL_SHIFT)).astype(np.int32)
        cv2.fillPoly(self.image, [fixed], self._apply_haze(color), cv2.LINE_AA, SUBPIXEL_SHIFT)
        cv2.fillPoly(self.id_map, [fixed], self.object_id, cv2.LINE_8, SUBPIXEL_SHIFT)

    def draw_ellipse(self, center: Point, radii: Point, color: Color, angle_deg: float = 0.0) -> None:
        """Fill an ellipse; `tilt` in degrees, clockwise."""
        fixed = (round(center[0] * (1 << SUBPIXEL_SHIFT)), round(center[1] * (1 << SUBPIXEL_SHIFT)))
        axes = (max(1, round(radii[0] * (1 << SUBPIXEL_SHIFT))), max(1, round(radii[1] * (1 << SUBPIXEL_SHIFT))))
        cv2.ellipse(
            self.image, fixed, axes, angle_deg, 0, 360, self._apply_haze(color), -1, cv2.LINE_AA, SUBPIXEL_SHIFT
        )
        cv2.ellipse(self.id_map, fixed, axes, angle_deg, 0, 360, self.object_id, -1, cv2.LINE_8, SUBPIXEL_SHIFT)

    def draw_ring(self, center: Point, radii: Point, width_px: float, color: Color) -> None:
        """An ellipse's outline."""
        fixed = (round(center[0] * (1 << SUBPIXEL_SHIFT)), round(center[1] * (1 << SUBPIXEL_SHIFT)))
        axes = (max(1, round(radii[0] * (1 << SUBPIXEL_SHIFT))), max(1, round(radii[1] * (1 << SUBPIXEL_SHIFT))))
        thickness = max(1, round(width_px))
        cv2.ellipse(self.image, fixed, axes, 0, 0, 360, self._apply_haze(color), thickness, cv2.LINE_AA, SUBPIXEL_SHIFT)
        cv2.ellipse(self.id_map, fixed, axes, 0, 0, 360, self.object_id, thickness, cv2.LINE_8, SUBPIXEL_SHIFT)

    def draw_capsule(self, start: Point, end: Point, start_radius: float, end_radius: float, color: Color) -> None:
        """A tapered capsule: an upper arm, a shin, a trunk, a bicycle's tube."""
        along = np.array(end) - np.array(start)
        length = max(1e-6, float(np.hypot(*along)))
        across = np.array([-along[1], along[0]]) / length
        a, b = np.array(start), np.array(end)
        corners = [
            a + across * start_radius,
            b + across * end_radius,
            b - across * end_radius,
            a - across * start_radius,
        ]
        self.draw_polygon([(float(x), float(y)) for x, y in corners], color)
        self.draw_ellipse(start, (start_radius, start_radius), color)
        self.draw_ellipse(end, (end_radius, end_radius), color)

    def compute_extent_xyxy(self, object_id: int) -> NDArray[np.float64] | None:
        """The tight box of an owner's pixels, right and bottom exclusive; None without any."""
        mine = self.id_map == object_id
        columns, rows = np.flatnonzero(mine.any(0)), np.flatnonzero(mine.any(1))
        if not len(rows):
            return None
        return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)

    def _apply_haze(self, color: Color) -> tuple[int, int, int]:
        red, green, blue = (
            round(min(255.0, (1 - self.haze_ratio) * self.brightness * own + self.haze_ratio * far))
            for own, far in zip(color, self.haze_color, strict=True)
        )
        return red, green, blue


def scale_color(color: Color, factor: float) -> Color:
    """A colour made darker (below 1) or lighter (above 1)."""
    red, green, blue = (min(255.0, part * factor) for part in color)
    return red, green, blue


CAMERA_HEIGHT_M = 1.4


@dataclass(frozen=True)
class Camera:
    """Where things of a street appear in a picture of `size_hw`.

    x metres to the right of the camera, z metres ahead, up metres above the road.
    """

    size_hw: tuple[int, int]

    @property
    def focal_px(self) -> float:
        """Pixels a metre at one metre's distance: a field of view of 85 degrees across."""
        return 0.55 * self.size_hw[1]

    @property
    def horizon_px(self) -> float:
        """The row in which the road ends."""
        return 0.42 * self.size_hw[0]

    def pixels_per_meter(self, z: float) -> float:
        """Pixels a metre at distance z."""
        return self.focal_px / z

    def project(self, x: float, z: float, height_m: float = 0.0) -> Point:
        """The pixel (x, y) of a place."""
        return self.size_hw[1] / 2 + x * self.pixels_per_meter(z), self.horizon_px + (
            CAMERA_HEIGHT_M - height_m
        ) * self.pixels_per_meter(z)
