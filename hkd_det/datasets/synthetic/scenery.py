"""Scenery of the synthetic scenes: sky, road, houses, cars, trees, posts, shadows."""

import itertools

import cv2
import numpy as np

from hkd_det.datasets.synthetic.renderer import (
    BACKGROUND_ID,
    Camera,
    Canvas,
    Color,
    Lighting,
    compute_haze,
    scale_color,
)

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


def paint_ground(canvas: Canvas, camera: Camera, lighting: Lighting, rng: np.random.Generator) -> None:
    """Draw sky, road, road markings and sidewalks.

    Args:
        canvas: Image to draw on.
        camera: Projection.
        lighting: Colors and brightness.
        rng: Random generator.
    """
    height = camera.size_hw[0]
    canvas.object_id, canvas.haze_ratio, canvas.brightness = BACKGROUND_ID, 0.0, 1.0
    horizon = int(camera.horizon_px)
    weight = np.linspace(0, 1, horizon)[:, None]
    sky = (1 - weight) * np.array(lighting.sky_top) + weight * np.array(lighting.sky_horizon)
    canvas.image[:horizon] = sky[:, None].astype(np.uint8)
    road_brightness = float(rng.uniform(0.85, 1.1))
    rows = np.arange(horizon, height)
    distance = 1.4 * camera.focal_px / np.maximum(1, rows - horizon)
    haze = (1 - np.exp(-distance / lighting.haze_distance_m))[:, None]
    road = (1 - haze) * np.array([96, 96, 98]) * lighting.brightness * road_brightness + haze * np.array(
        lighting.sky_horizon
    )
    canvas.image[horizon:] = road[:, None].clip(0, 255).astype(np.uint8)
    canvas.brightness = lighting.brightness * road_brightness
    strips = ((CURB_X_M, WALL_X_M, (148, 142, 134)), (CURB_X_M, CURB_X_M + 0.25, (184, 180, 172)))  # sidewalk, curb
    for side in (-1, 1):
        for inner_x, outer_x, color in strips:
            corners = ((inner_x, ROAD_LENGTH_M), (outer_x, ROAD_LENGTH_M), (outer_x, 1.2), (inner_x, 1.2))
            canvas.draw_polygon([camera.project(side * x, z) for x, z in corners], color)
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
    """Draw two rows of houses along the sidewalks, from far to near, and the houses at the end of the street.

    Args:
        canvas: Image to draw on.
        camera: Projection.
        lighting: Colors and brightness.
        rng: Random generator.
    """
    canvas.object_id, canvas.brightness = BACKGROUND_ID, lighting.brightness
    canvas.haze_ratio = compute_haze(lighting, ROAD_LENGTH_M)
    for left in np.arange(-12, 12, 4.0):
        height_m = float(rng.uniform(6, 17))
        block = [
            camera.project(x, ROAD_LENGTH_M, up)
            for x, up in ((left, 0), (left, height_m), (left + 4, height_m), (left + 4, 0))
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
    canvas.haze_ratio = compute_haze(lighting, (near + far) / 2)
    height_m = float(rng.uniform(8, 20))
    x = side * WALL_X_M
    if rng.random() < 0.12:  # a gap with a hedge
        height_m = float(rng.uniform(1.5, 3))
    wall = FACADE_COLORS[rng.integers(len(FACADE_COLORS))]
    wall = scale_color(wall, 0.82 if side < 0 else 1.0)
    canvas.draw_polygon(
        [
            camera.project(x, far),
            camera.project(x, far, height_m),
            camera.project(x, near, height_m),
            camera.project(x, near),
        ],
        wall,
    )
    canvas.draw_polygon(
        [camera.project(x, far), camera.project(x, far, 0.6), camera.project(x, near, 0.6), camera.project(x, near)],
        scale_color(wall, 0.6),
    )
    glass: Color = scale_color((70, 84, 100), 1.0 if lighting.brightness > 0.8 else 0.7)
    lamp: Color = (255, 214, 140)
    step = float(rng.uniform(2.4, 3.4))
    for up in np.arange(1.1, height_m - 1.8, 3.1):
        for z in np.arange(near + 0.8, far - 1.2, step):
            is_lit = rng.random() < lighting.lit_window_ratio
            canvas.brightness = 1.0 if is_lit else lighting.brightness
            pane = [
                camera.project(x, z, up),
                camera.project(x, z, up + 1.7),
                camera.project(x, z + 1.2, up + 1.7),
                camera.project(x, z + 1.2, up),
            ]
            canvas.draw_polygon(pane, lamp if is_lit else glass)
    canvas.brightness = lighting.brightness


def paint_car(canvas: Canvas, camera: Camera, lighting: Lighting, x: float, z: float, rng: np.random.Generator) -> None:
    """Draw a car from behind, or from the front on the left side, with the visible flank.

    Args:
        canvas: Image to draw on.
        camera: Projection.
        lighting: Colors and brightness.
        x: Horizontal offset from the optical axis, meters.
        z: Distance from the camera, meters.
        rng: Random generator.
    """
    canvas.haze_ratio, canvas.brightness = compute_haze(lighting, z), lighting.brightness
    paint = CAR_COLORS[rng.integers(len(CAR_COLORS))]
    half, length_m = 0.9, 4.2
    height_m = float(rng.choice([1.45, 1.6, 1.95]))
    belt = height_m * 0.58
    paint_shadow(canvas, camera, lighting, x, z + length_m / 2, 1.15, length_m / 2)
    flank = x + (half if x < 0 else -half)
    side_wall = [(z, 0.3), (z, belt), (z + length_m, belt), (z + length_m, 0.3)]
    canvas.draw_polygon([camera.project(flank, depth, up) for depth, up in side_wall], scale_color(paint, 0.7))
    roof = [(z + 0.5, belt), (z + 1.0, height_m), (z + 2.9, height_m), (z + 3.5, belt)]
    canvas.draw_polygon([camera.project(flank * 0.97 + x * 0.03, depth, up) for depth, up in roof], (38, 44, 54))
    for depth in (z + 0.8, z + 3.4):
        center, scale = camera.project(flank, depth, 0.32), camera.pixels_per_meter(depth)
        canvas.draw_ellipse(center, (0.14 * scale, 0.32 * scale), (22, 22, 24))
    body = [(-half, 0.28), (-half, belt), (-half * 0.8, height_m), (half * 0.8, height_m), (half, belt), (half, 0.28)]
    canvas.draw_polygon([camera.project(x + dx, z, up) for dx, up in body], paint)
    glass = [(-half * 0.85, belt), (-half * 0.7, height_m - 0.1), (half * 0.7, height_m - 0.1), (half * 0.85, belt)]
    canvas.draw_polygon([camera.project(x + dx, z, up) for dx, up in glass], (46, 54, 66))
    canvas.draw_polygon(
        [camera.project(x + dx, z, up) for dx, up in ((-half, 0.28), (-half, 0.5), (half, 0.5), (half, 0.28))],
        scale_color(paint, 0.6),
    )
    is_oncoming = x < 0
    for dx in (-0.68, 0.68):
        lamp: Color = (255, 246, 214) if is_oncoming else (196, 30, 30)
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
    """Draw a tree; its trunk resembles a distant person.

    Args:
        canvas: Image to draw on.
        camera: Projection.
        lighting: Colors and brightness.
        x: Horizontal offset from the optical axis, meters.
        z: Distance from the camera, meters.
        rng: Random generator.
    """
    canvas.haze_ratio, canvas.brightness = compute_haze(lighting, z), lighting.brightness
    scale = camera.pixels_per_meter(z)
    paint_shadow(canvas, camera, lighting, x, z, 0.8, 0.4)
    height_m = float(rng.uniform(4, 7))
    canvas.draw_capsule(
        camera.project(x, z), camera.project(x, z, height_m * 0.6), 0.17 * scale, 0.11 * scale, (82, 66, 52)
    )
    green = np.array([62, 92, 46]) + rng.normal(0, 14, 3)
    for _ in range(22):
        distance, angle = 1.5 * rng.random() ** 0.5, rng.uniform(0, 2 * np.pi)
        dx, up, radius = (
            distance * np.cos(angle),
            height_m * 0.75 + 0.75 * distance * np.sin(angle),
            rng.uniform(0.35, 0.8),
        )
        red, leaf, blue = np.clip(green * rng.uniform(0.7, 1.25), 0, 255)
        canvas.draw_ellipse(
            camera.project(x + dx, z, up),
            (radius * scale, radius * 0.8 * scale),
            (float(red), float(leaf), float(blue)),
        )


def paint_post(
    canvas: Canvas, camera: Camera, lighting: Lighting, x: float, z: float, rng: np.random.Generator
) -> None:
    """Draw a lamp post, sign, bollard or hydrant, which resemble distant persons.

    Args:
        canvas: Image to draw on.
        camera: Projection.
        lighting: Colors and brightness.
        x: Horizontal offset from the optical axis, meters.
        z: Distance from the camera, meters.
        rng: Random generator.
    """
    canvas.haze_ratio, canvas.brightness = compute_haze(lighting, z), lighting.brightness
    scale = camera.pixels_per_meter(z)
    gray: Color = (98, 102, 104)
    post_type = rng.choice(["lamp", "sign", "bollard", "hydrant"], p=[0.3, 0.3, 0.25, 0.15])
    if post_type == "lamp":
        canvas.draw_capsule(camera.project(x, z), camera.project(x, z, 5.2), 0.08 * scale, 0.05 * scale, gray)
        arm = x - np.sign(x) * 1.2
        canvas.draw_capsule(camera.project(x, z, 5.2), camera.project(arm, z, 5.3), 0.05 * scale, 0.05 * scale, gray)
        canvas.brightness = 1.0
        canvas.draw_ellipse(
            camera.project(arm, z, 5.2),
            (0.25 * scale, 0.1 * scale),
            (255, 236, 190) if lighting.lit_window_ratio > 0.2 else gray,
        )
        canvas.brightness = lighting.brightness
    elif post_type == "sign":
        canvas.draw_capsule(camera.project(x, z), camera.project(x, z, 2.3), 0.04 * scale, 0.04 * scale, gray)
        color: Color = [(190, 40, 40), (40, 80, 160), (230, 200, 60)][rng.integers(3)]
        canvas.draw_ellipse(camera.project(x, z, 2.4), (0.34 * scale, 0.34 * scale), color)
        canvas.draw_ellipse(camera.project(x, z, 2.4), (0.24 * scale, 0.24 * scale), (236, 236, 232))
    elif post_type == "bollard":
        canvas.draw_capsule(camera.project(x, z), camera.project(x, z, 1.0), 0.09 * scale, 0.09 * scale, (70, 72, 74))
        canvas.draw_ellipse(camera.project(x, z, 1.08), (0.11 * scale, 0.11 * scale), (176, 176, 170))
    else:
        canvas.draw_capsule(camera.project(x, z), camera.project(x, z, 0.7), 0.13 * scale, 0.12 * scale, (178, 44, 36))
        canvas.draw_ellipse(camera.project(x, z, 0.85), (0.14 * scale, 0.16 * scale), (196, 60, 50))


def paint_shadow(
    canvas: Canvas, camera: Camera, lighting: Lighting, x: float, z: float, half_x_m: float, half_z_m: float
) -> None:
    """Darken an elliptic area of the ground; the id map does not change.

    Args:
        canvas: Image to draw on.
        camera: Projection.
        lighting: Colors and brightness.
        x: Horizontal offset from the optical axis, meters.
        z: Distance from the camera, meters.
        half_x_m: Half the width of the shadow.
        half_z_m: Half the depth of the shadow.
    """
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
    center = (round((left + right) / 2 - x1), round((far + near) / 2 - y1))
    radii = (max(1, round((right - left) / 2)), max(1, round((near - far) / 2)))
    cv2.ellipse(mask, center, radii, 0, 0, 360, int(255 * lighting.shadow_brightness), -1, cv2.LINE_AA)
    window[:] = cv2.multiply(window, cv2.merge([mask] * 3), scale=1 / 255)
