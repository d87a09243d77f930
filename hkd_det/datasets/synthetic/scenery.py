"""What stands in a street beside people: sky, houses, road, cars, trees, posts, boards."""

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

from hkd_det.datasets.synthetic.renderer import BACKGROUND_ID, Camera, Canvas, Color, scale_color

FACADE_COLORS: list[Color] = [
    (176, 158, 132), (150, 108, 88), (186, 180, 168), (128, 126, 124), (204, 188, 150), (140, 132, 112), (112, 92, 84),
]  # fmt: skip
CAR_COLORS: list[Color] = [
    (32, 34, 40),
    (178, 182, 188),
    (236, 236, 234),
    (138, 24, 28),
    (30, 58, 110),
    (92, 98, 92),
    (190, 160, 60),
]
CURB_X_M, WALL_X_M, ROAD_LENGTH_M = 4.6, 8.6, 60.0


@dataclass(frozen=True)
class Lighting:
    """The hour and the weather. ambient: factor on every colour. haze_m: distance at which two thirds are air."""

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


def paint_ground(canvas: Canvas, camera: Camera, lighting: Lighting, rng: np.random.Generator) -> None:
    """Sky, road with its lines, pavements."""
    height = camera.size_hw[0]
    canvas.object_id, canvas.haze_ratio, canvas.brightness = BACKGROUND_ID, 0.0, 1.0
    horizon = int(camera.horizon_px)
    share = np.linspace(0, 1, horizon)[:, None]
    sky = (1 - share) * np.array(lighting.sky_top) + share * np.array(lighting.sky_horizon)
    canvas.image[:horizon] = sky[:, None].astype(np.uint8)
    tone = float(rng.uniform(0.85, 1.1))
    rows = np.arange(horizon, height)
    distance = 1.4 * camera.focal_px / np.maximum(1, rows - horizon)
    far = (1 - np.exp(-distance / lighting.haze_distance_m))[:, None]
    road = (1 - far) * np.array([96, 96, 98]) * lighting.brightness * tone + far * np.array(lighting.sky_horizon)
    canvas.image[horizon:] = road[:, None].clip(0, 255).astype(np.uint8)
    canvas.brightness = lighting.brightness * tone
    for side in (-1, 1):
        pavement = [
            camera.project(side * x, z)
            for x, z in ((CURB_X_M, ROAD_LENGTH_M), (WALL_X_M, ROAD_LENGTH_M), (WALL_X_M, 1.2), (CURB_X_M, 1.2))
        ]
        canvas.draw_polygon(pavement, (148, 142, 134))
        kerb = [
            camera.project(side * x, z)
            for x, z in (
                (CURB_X_M, ROAD_LENGTH_M),
                (CURB_X_M + 0.25, ROAD_LENGTH_M),
                (CURB_X_M + 0.25, 1.2),
                (CURB_X_M, 1.2),
            )
        ]
        canvas.draw_polygon(kerb, (184, 180, 172))
    start = float(rng.uniform(0, 6))
    for z in np.arange(start + 1.5, 45, 6.0):
        line = [camera.project(x, depth) for x, depth in ((-0.07, z), (0.07, z), (0.07, z + 3), (-0.07, z + 3))]
        canvas.draw_polygon(line, (214, 214, 206))
    if rng.random() < 0.5:
        crossing = float(rng.uniform(7, 18))
        for x in np.arange(-4.0, 4.0, 1.0):
            bar = [camera.project(x + dx, crossing + dz) for dx, dz in ((0, 0), (0.5, 0), (0.5, 3), (0, 3))]
            canvas.draw_polygon(bar, (212, 212, 206))
    canvas.brightness = lighting.brightness


def paint_houses(canvas: Canvas, camera: Camera, lighting: Lighting, rng: np.random.Generator) -> None:
    """Two rows of houses along the pavements, far ones first, and what closes the street."""
    canvas.object_id, canvas.brightness = BACKGROUND_ID, lighting.brightness
    canvas.haze_ratio = _compute_haze(lighting, ROAD_LENGTH_M)
    for left in np.arange(-12, 12, 4.0):
        tall = float(rng.uniform(6, 17))
        block = [
            camera.project(x, ROAD_LENGTH_M, up) for x, up in ((left, 0), (left, tall), (left + 4, tall), (left + 4, 0))
        ]
        canvas.draw_polygon(block, FACADE_COLORS[rng.integers(len(FACADE_COLORS))])
    for side in (-1, 1):
        edges = [ROAD_LENGTH_M]
        while edges[-1] > 2:
            edges.append(max(1.2, edges[-1] - float(rng.uniform(7, 16))))
        for far, near in itertools.pairwise(edges):
            _paint_house(canvas, camera, lighting, side, (near, far), rng)


def _paint_house(
    canvas: Canvas,
    camera: Camera,
    lighting: Lighting,
    side: int,
    z_range: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    near, far = z_range
    canvas.haze_ratio = _compute_haze(lighting, (near + far) / 2)
    tall = float(rng.uniform(8, 20))
    x = side * WALL_X_M
    if rng.random() < 0.12:  # a gap with a hedge
        tall = float(rng.uniform(1.5, 3))
    wall = FACADE_COLORS[rng.integers(len(FACADE_COLORS))]
    wall = scale_color(wall, 0.82 if side < 0 else 1.0)
    canvas.draw_polygon(
        [camera.project(x, far), camera.project(x, far, tall), camera.project(x, near, tall), camera.project(x, near)],
        wall,
    )
    canvas.draw_polygon(
        [camera.project(x, far), camera.project(x, far, 0.6), camera.project(x, near, 0.6), camera.project(x, near)],
        scale_color(wall, 0.6),
    )
    glass: Color = scale_color((70, 84, 100), 1.0 if lighting.brightness > 0.8 else 0.7)
    lamp: Color = (255, 214, 140)
    step = float(rng.uniform(2.4, 3.4))
    for up in np.arange(1.1, tall - 1.8, 3.1):
        for z in np.arange(near + 0.8, far - 1.2, step):
            lit = rng.random() < lighting.lit_window_ratio
            canvas.brightness = 1.0 if lit else lighting.brightness
            pane = [
                camera.project(x, z, up),
                camera.project(x, z, up + 1.7),
                camera.project(x, z + 1.2, up + 1.7),
                camera.project(x, z + 1.2, up),
            ]
            canvas.draw_polygon(pane, lamp if lit else glass)
    canvas.brightness = lighting.brightness


def paint_car(canvas: Canvas, camera: Camera, lighting: Lighting, x: float, z: float, rng: np.random.Generator) -> None:
    """A car seen from behind, or from the front when it comes towards us, with the flank that faces us."""
    canvas.haze_ratio, canvas.brightness = _compute_haze(lighting, z), lighting.brightness
    paint = CAR_COLORS[rng.integers(len(CAR_COLORS))]
    half, long = 0.9, 4.2
    tall = float(rng.choice([1.45, 1.6, 1.95]))
    belt = tall * 0.58
    paint_shadow(canvas, camera, lighting, x, z + long / 2, 1.15, long / 2)
    flank = x + (half if x < 0 else -half)
    side_wall = [(z, 0.3), (z, belt), (z + long, belt), (z + long, 0.3)]
    canvas.draw_polygon([camera.project(flank, depth, up) for depth, up in side_wall], scale_color(paint, 0.7))
    roof = [(z + 0.5, belt), (z + 1.0, tall), (z + 2.9, tall), (z + 3.5, belt)]
    canvas.draw_polygon([camera.project(flank * 0.97 + x * 0.03, depth, up) for depth, up in roof], (38, 44, 54))
    for depth in (z + 0.8, z + 3.4):
        centre, metre = camera.project(flank, depth, 0.32), camera.pixels_per_meter(depth)
        canvas.draw_ellipse(centre, (0.14 * metre, 0.32 * metre), (22, 22, 24))
    body = [(-half, 0.28), (-half, belt), (-half * 0.8, tall), (half * 0.8, tall), (half, belt), (half, 0.28)]
    canvas.draw_polygon([camera.project(x + dx, z, up) for dx, up in body], paint)
    glass = [(-half * 0.85, belt), (-half * 0.7, tall - 0.1), (half * 0.7, tall - 0.1), (half * 0.85, belt)]
    canvas.draw_polygon([camera.project(x + dx, z, up) for dx, up in glass], (46, 54, 66))
    canvas.draw_polygon(
        [camera.project(x + dx, z, up) for dx, up in ((-half, 0.28), (-half, 0.5), (half, 0.5), (half, 0.28))],
        scale_color(paint, 0.6),
    )
    comes = x < 0
    for dx in (-0.68, 0.68):
        lamp: Color = (255, 246, 214) if comes else (196, 30, 30)
        canvas.brightness = 1.0 if lighting.brightness < 0.8 else lighting.brightness
        canvas.draw_ellipse(
            camera.project(x + dx, z, belt - 0.16),
            (0.15 * camera.pixels_per_meter(z), 0.09 * camera.pixels_per_meter(z)),
            lamp,
        )
        canvas.brightness = lighting.brightness
        canvas.draw_polygon(
            [camera.project(x + dx + wheel, z, up) for wheel, up in ((-0.1, 0), (-0.1, 0.3), (0.1, 0.3), (0.1, 0))],
            (20, 20, 22),
        )


def paint_tree(
    canvas: Canvas, camera: Camera, lighting: Lighting, x: float, z: float, rng: np.random.Generator
) -> None:
    """A trunk as wide as a person far away, and a crown."""
    canvas.haze_ratio, canvas.brightness = _compute_haze(lighting, z), lighting.brightness
    metre = camera.pixels_per_meter(z)
    paint_shadow(canvas, camera, lighting, x, z, 0.8, 0.4)
    tall = float(rng.uniform(4, 7))
    canvas.draw_capsule(
        camera.project(x, z), camera.project(x, z, tall * 0.6), 0.17 * metre, 0.11 * metre, (82, 66, 52)
    )
    green = np.array([62, 92, 46]) + rng.normal(0, 14, 3)
    for _ in range(22):
        away, around = 1.5 * rng.random() ** 0.5, rng.uniform(0, 2 * np.pi)
        dx, up, radius = away * np.cos(around), tall * 0.75 + 0.75 * away * np.sin(around), rng.uniform(0.35, 0.8)
        red, leaf, blue = np.clip(green * rng.uniform(0.7, 1.25), 0, 255)
        canvas.draw_ellipse(
            camera.project(x + dx, z, up),
            (radius * metre, radius * 0.8 * metre),
            (float(red), float(leaf), float(blue)),
        )


def paint_post(
    canvas: Canvas, camera: Camera, lighting: Lighting, x: float, z: float, rng: np.random.Generator
) -> None:
    """A lamp post, a sign, a bollard or a hydrant: upright and thin, like a person from afar."""
    canvas.haze_ratio, canvas.brightness = _compute_haze(lighting, z), lighting.brightness
    metre = camera.pixels_per_meter(z)
    grey: Color = (98, 102, 104)
    kind = rng.choice(["lamp", "sign", "bollard", "hydrant"], p=[0.3, 0.3, 0.25, 0.15])
    if kind == "lamp":
        canvas.draw_capsule(camera.project(x, z), camera.project(x, z, 5.2), 0.08 * metre, 0.05 * metre, grey)
        arm = x - np.sign(x) * 1.2
        canvas.draw_capsule(camera.project(x, z, 5.2), camera.project(arm, z, 5.3), 0.05 * metre, 0.05 * metre, grey)
        canvas.brightness = 1.0
        canvas.draw_ellipse(
            camera.project(arm, z, 5.2),
            (0.25 * metre, 0.1 * metre),
            (255, 236, 190) if lighting.lit_window_ratio > 0.2 else grey,
        )
        canvas.brightness = lighting.brightness
    elif kind == "sign":
        canvas.draw_capsule(camera.project(x, z), camera.project(x, z, 2.3), 0.04 * metre, 0.04 * metre, grey)
        colour: Color = [(190, 40, 40), (40, 80, 160), (230, 200, 60)][rng.integers(3)]
        canvas.draw_ellipse(camera.project(x, z, 2.4), (0.34 * metre, 0.34 * metre), colour)
        canvas.draw_ellipse(camera.project(x, z, 2.4), (0.24 * metre, 0.24 * metre), (236, 236, 232))
    elif kind == "bollard":
        canvas.draw_capsule(camera.project(x, z), camera.project(x, z, 1.0), 0.09 * metre, 0.09 * metre, (70, 72, 74))
        canvas.draw_ellipse(camera.project(x, z, 1.08), (0.11 * metre, 0.11 * metre), (176, 176, 170))
    else:
        canvas.draw_capsule(camera.project(x, z), camera.project(x, z, 0.7), 0.13 * metre, 0.12 * metre, (178, 44, 36))
        canvas.draw_ellipse(camera.project(x, z, 0.85), (0.14 * metre, 0.16 * metre), (196, 60, 50))


def paint_shadow(
    canvas: Canvas, camera: Camera, lighting: Lighting, x: float, z: float, half_x_m: float, half_z_m: float
) -> None:
    """Darken the ground around a place, under an ellipse; owners stay as they are."""
    (left, _), (right, _) = camera.project(x - half_x_m, z), camera.project(x + half_x_m, z)
    far, near = camera.project(x, z + half_z_m)[1], camera.project(x, max(1.0, z - half_z_m))[1]
    x1, x2, y1, y2 = (
        max(0, int(left)),
        min(camera.size_hw[1], int(right) + 1),
        max(0, int(far)),
        min(camera.size_hw[0], int(near) + 1),
    )
    if x2 <= x1 or y2 <= y1:
        return
    window = canvas.image[y1:y2, x1:x2]
    mask = np.full(window.shape[:2], 255, np.uint8)
    centre = (round((left + right) / 2 - x1), round((far + near) / 2 - y1))
    radii = (max(1, round((right - left) / 2)), max(1, round((near - far) / 2)))
    cv2.ellipse(mask, centre, radii, 0, 0, 360, int(255 * lighting.shadow_brightness), -1, cv2.LINE_AA)
    window[:] = cv2.multiply(window, cv2.merge([mask] * 3), scale=1 / 255)


def _compute_haze(lighting: Lighting, z: float) -> float:
    return float(1 - np.exp(-z / lighting.haze_distance_m))


def add_sensor_noise(
    canvas: Canvas, lighting: Lighting, rng: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """What the camera adds: a little blur, exposure, grain that grows in the dark."""
    picture = canvas.image
    if rng.random() < 0.6:
        sigma = float(rng.uniform(0.4, 0.9))
        picture = cv2.GaussianBlur(picture, (3, 3), sigma)
    strength = 3.0 + 9.0 * (1 - min(1.0, lighting.brightness))
    grain = rng.normal(0, strength, (128, 128, 3)).astype(np.int16)
    rows, columns = (-(-side // 128) for side in picture.shape[:2])
    tiled = np.tile(grain, (rows, columns, 1))[: picture.shape[0], : picture.shape[1]]
    gain = float(rng.uniform(0.85, 1.15))
    exposed = cv2.convertScaleAbs(picture, alpha=gain)
    return cv2.add(exposed, tiled, dtype=cv2.CV_8U).astype(np.uint8)
