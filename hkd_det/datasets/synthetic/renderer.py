"""Canvas, camera and lighting of the synthetic scenes.

Shapes are drawn into an image and into a map of object ids, which gives the visible part of each object. The camera is
1.4 m above a flat road and faces straight ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]
Color = tuple[float, float, float]  # RGB, 0 to 255

SUBPIXEL_SHIFT = 4  # fixed-point coordinates of OpenCV: 1/16 pixel
BACKGROUND_ID = 0
CAMERA_HEIGHT_M = 1.4


class Canvas:
    """Image and map of object ids. Set `object_id`, `brightness` and `haze_ratio` before drawing.

    Args:
        size_hw: Height and width in pixels.
        haze_color: Color of distant objects.

    Attributes:
        image (uint8 array[H, W, 3]): RGB.
        id_map (int32 array[H, W]): Id of the object that is visible in each pixel.
        haze_color: Color of distant objects.
        haze_ratio: Part of the haze color in every drawn color, 0 to 1.
        brightness: Factor on every drawn color.
        object_id: Id of the drawn object.
    """

    def __init__(self, size_hw: tuple[int, int], haze_color: Color) -> None:
        self.image = np.zeros((*size_hw, 3), np.uint8)
        self.id_map = np.zeros(size_hw, np.int32)
        self.haze_color = haze_color
        self.haze_ratio = 0.0
        self.brightness = 1.0
        self.object_id = BACKGROUND_ID

    def draw_polygon(self, points: Sequence[Point], color: Color) -> None:
        """Fill a polygon; edges are antialiased in the image and sharp in the id map.

        Args:
            points: Corners (x, y), pixels.
            color: Fill color.
        """
        fixed = np.round(np.array(points) * (1 << SUBPIXEL_SHIFT)).astype(np.int32)
        cv2.fillPoly(self.image, [fixed], self._apply_haze(color), cv2.LINE_AA, SUBPIXEL_SHIFT)
        cv2.fillPoly(self.id_map, [fixed], self.object_id, cv2.LINE_8, SUBPIXEL_SHIFT)

    def draw_ellipse(self, center: Point, radii: Point, color: Color, angle_deg: float = 0.0) -> None:
        """Fill an ellipse; `angle_deg` is the clockwise rotation in degrees.

        Args:
            center: Center (x, y), pixels.
            radii: Radii along x and y, pixels.
            color: Fill color.
            angle_deg: Clockwise rotation, degrees.
        """
        fixed = (round(center[0] * (1 << SUBPIXEL_SHIFT)), round(center[1] * (1 << SUBPIXEL_SHIFT)))
        axes = (max(1, round(radii[0] * (1 << SUBPIXEL_SHIFT))), max(1, round(radii[1] * (1 << SUBPIXEL_SHIFT))))
        cv2.ellipse(
            self.image, fixed, axes, angle_deg, 0, 360, self._apply_haze(color), -1, cv2.LINE_AA, SUBPIXEL_SHIFT
        )
        cv2.ellipse(self.id_map, fixed, axes, angle_deg, 0, 360, self.object_id, -1, cv2.LINE_8, SUBPIXEL_SHIFT)

    def draw_ring(self, center: Point, radii: Point, width_px: float, color: Color) -> None:
        """Draw the outline of an ellipse.

        Args:
            center: Center (x, y), pixels.
            radii: Radii along x and y, pixels.
            width_px: Width of the outline.
            color: Color of the outline.
        """
        fixed = (round(center[0] * (1 << SUBPIXEL_SHIFT)), round(center[1] * (1 << SUBPIXEL_SHIFT)))
        axes = (max(1, round(radii[0] * (1 << SUBPIXEL_SHIFT))), max(1, round(radii[1] * (1 << SUBPIXEL_SHIFT))))
        thickness = max(1, round(width_px))
        cv2.ellipse(self.image, fixed, axes, 0, 0, 360, self._apply_haze(color), thickness, cv2.LINE_AA, SUBPIXEL_SHIFT)
        cv2.ellipse(self.id_map, fixed, axes, 0, 0, 360, self.object_id, thickness, cv2.LINE_8, SUBPIXEL_SHIFT)

    def draw_capsule(self, start: Point, end: Point, start_radius: float, end_radius: float, color: Color) -> None:
        """Fill a tapered capsule, for example a limb, a trunk or a tube.

        Args:
            start: Center of the first end (x, y), pixels.
            end: Center of the second end (x, y), pixels.
            start_radius: Radius at the first end, pixels.
            end_radius: Radius at the second end, pixels.
            color: Fill color.
        """
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
        """Compute the box of the visible pixels of an object.

        Args:
            object_id: Id of the object.

        Returns:
            box_xyxy (float64 array[4]): Pixels, right and bottom exclusive; None if the object is not visible.
        """
        mask = self.id_map == object_id
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        if not len(rows):
            return None
        return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)

    def _apply_haze(self, color: Color) -> tuple[int, int, int]:
        red, green, blue = (
            round(min(255.0, (1 - self.haze_ratio) * self.brightness * value + self.haze_ratio * haze))
            for value, haze in zip(color, self.haze_color, strict=True)
        )
        return red, green, blue


def scale_color(color: Color, factor: float) -> Color:
    """Return a darker (factor below 1) or lighter color.

    Args:
        color: Color to change.
        factor: Factor for each channel.
    """
    red, green, blue = (min(255.0, value * factor) for value in color)
    return red, green, blue


@dataclass(frozen=True)
class Camera:
    """Projection of the scene: x meters to the right of the camera, z meters ahead.

    Attributes:
        size_hw: Height and width of the image in pixels.
    """

    size_hw: tuple[int, int]

    @property
    def focal_px(self) -> float:
        """Pixels per meter at a distance of one meter; the horizontal field of view is 85 degrees."""
        return 0.55 * self.size_hw[1]

    @property
    def horizon_px(self) -> float:
        """Row of the horizon."""
        return 0.42 * self.size_hw[0]

    def pixels_per_meter(self, z: float) -> float:
        """Return the scale at the distance z, in pixels per meter.

        Args:
            z: Distance from the camera, meters.
        """
        return self.focal_px / z

    def project(self, x: float, z: float, height_m: float = 0.0) -> Point:
        """Return the pixel (x, y) of a point `height_m` above the road.

        Args:
            x: Horizontal offset from the optical axis, meters.
            z: Distance from the camera, meters.
            height_m: Height above the road.
        """
        return self.size_hw[1] / 2 + x * self.pixels_per_meter(z), self.horizon_px + (
            CAMERA_HEIGHT_M - height_m
        ) * self.pixels_per_meter(z)


@dataclass(frozen=True)
class Lighting:
    """Time of day and weather.

    Attributes:
        name: Name.
        sky_top, sky_horizon: RGB colors of the sky.
        brightness: Factor on every color.
        haze_distance_m: Distance in meters at which 63 % of a color is haze.
        lit_window_ratio: Fraction of lit windows.
        shadow_brightness: Factor on the ground in a shadow.
    """

    name: str
    sky_top: Color
    sky_horizon: Color
    brightness: float
    haze_distance_m: float
    lit_window_ratio: float
    shadow_brightness: float


LIGHTINGS = (
    Lighting("sun", (92, 142, 206), (196, 216, 232), 1.08, 160, 0.02, 0.62),
    Lighting("overcast", (160, 166, 174), (206, 208, 210), 0.9, 90, 0.06, 0.86),
    Lighting("dusk", (74, 78, 116), (226, 160, 116), 0.66, 100, 0.35, 0.86),
    Lighting("night", (14, 16, 30), (46, 44, 56), 0.44, 80, 0.5, 0.9),
)


def compute_haze(lighting: Lighting, z: float) -> float:
    """Return the ratio of haze in the colors of a distant object.

    Args:
        lighting: Colors and brightness.
        z: Distance in meters.

    Returns:
        Ratio, 0 to 1.
    """
    return float(1 - np.exp(-z / lighting.haze_distance_m))


def add_sensor_noise(
    canvas: Canvas, lighting: Lighting, rng: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return the image with blur, random exposure and noise that increases in the dark.

    Args:
        canvas: Finished image.
        lighting: Brightness.
        rng: Random generator.
    """
    image = canvas.image
    if rng.random() < 0.6:
        sigma = float(rng.uniform(0.4, 0.9))
        image = cv2.GaussianBlur(image, (3, 3), sigma)
    sigma_noise = 3.0 + 9.0 * (1 - min(1.0, lighting.brightness))
    grain = rng.normal(0, sigma_noise, (128, 128, 3)).astype(np.int16)
    rows, columns = (-(-side // 128) for side in image.shape[:2])
    tiled = np.tile(grain, (rows, columns, 1))[: image.shape[0], : image.shape[1]]
    gain = float(rng.uniform(0.85, 1.15))
    exposed = cv2.convertScaleAbs(image, alpha=gain)
    return cv2.add(exposed, tiled, dtype=cv2.CV_8U).astype(np.uint8)
