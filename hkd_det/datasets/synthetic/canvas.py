"""The canvas: shapes are painted into the picture and, with their owner's number, into an id map."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]
Colour = tuple[float, float, float]

SHIFT = 4  # OpenCV's fixed point: sixteenths of a pixel
NOBODY = 0


class Canvas:
    """A picture (H, W, 3) uint8 RGB and an id map (H, W) int32: whose pixel is on top.

    Set `owner` before painting; `haze` mixes every colour with `air` (0 none, 1 all), as distance does.
    """

    def __init__(self, size_hw: tuple[int, int], air: Colour) -> None:
        self.picture = np.zeros((*size_hw, 3), np.uint8)
        self.ids = np.zeros(size_hw, np.int32)
        self.air = air
        self.haze = 0.0
        self.light = 1.0
        self.owner = NOBODY

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill a polygon, its edges smoothed in the picture and sharp in the id map."""
        fixed = np.round(np.array(points) * (1 << SHIFT)).astype(np.int32)
        cv2.fillPoly(self.picture, [fixed], self._seen(colour), cv2.LINE_AA, SHIFT)
        cv2.fillPoly(self.ids, [fixed], self.owner, cv2.LINE_8, SHIFT)

    def ellipse(self, centre: Point, radii: Point, colour: Colour, tilt: float = 0.0) -> None:
        """Fill an ellipse; `tilt` in degrees, clockwise."""
        fixed = (round(centre[0] * (1 << SHIFT)), round(centre[1] * (1 << SHIFT)))
        axes = (max(1, round(radii[0] * (1 << SHIFT))), max(1, round(radii[1] * (1 << SHIFT))))
        cv2.ellipse(self.picture, fixed, axes, tilt, 0, 360, self._seen(colour), -1, cv2.LINE_AA, SHIFT)
        cv2.ellipse(self.ids, fixed, axes, tilt, 0, 360, self.owner, -1, cv2.LINE_8, SHIFT)

    def ring(self, centre: Point, radii: Point, width_px: float, colour: Colour) -> None:
        """An ellipse's outline."""
        fixed = (round(centre[0] * (1 << SHIFT)), round(centre[1] * (1 << SHIFT)))
        axes = (max(1, round(radii[0] * (1 << SHIFT))), max(1, round(radii[1] * (1 << SHIFT))))
        thickness = max(1, round(width_px))
        cv2.ellipse(self.picture, fixed, axes, 0, 0, 360, self._seen(colour), thickness, cv2.LINE_AA, SHIFT)
        cv2.ellipse(self.ids, fixed, axes, 0, 0, 360, self.owner, thickness, cv2.LINE_8, SHIFT)

    def limb(self, start: Point, end: Point, start_radius: float, end_radius: float, colour: Colour) -> None:
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
        self.polygon([(float(x), float(y)) for x, y in corners], colour)
        self.ellipse(start, (start_radius, start_radius), colour)
        self.ellipse(end, (end_radius, end_radius), colour)

    def extent_xyxy(self, number: int) -> NDArray[np.float64] | None:
        """The tight box of an owner's pixels, right and bottom exclusive; None without any."""
        mine = self.ids == number
        columns, rows = np.flatnonzero(mine.any(0)), np.flatnonzero(mine.any(1))
        if not len(rows):
            return None
        return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)

    def _seen(self, colour: Colour) -> tuple[int, int, int]:
        red, green, blue = (
            round(min(255.0, (1 - self.haze) * self.light * own + self.haze * far))
            for own, far in zip(colour, self.air, strict=True)
        )
        return red, green, blue


def shaded(colour: Colour, factor: float) -> Colour:
    """A colour made darker (below 1) or lighter (above 1)."""
    red, green, blue = (min(255.0, part * factor) for part in colour)
    return red, green, blue
