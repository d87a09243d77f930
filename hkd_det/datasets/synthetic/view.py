"""Perspective: a camera in a car, 1.4 m above a flat road, looking straight ahead."""

from dataclasses import dataclass

from hkd_det.datasets.synthetic.canvas import Point

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
