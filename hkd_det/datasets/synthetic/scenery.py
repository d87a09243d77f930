"""What stands in a street beside people: sky, houses, road, cars, trees, posts, boards."""

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

from hkd_det.datasets.synthetic.canvas import NOBODY, Canvas, Colour, shaded
from hkd_det.datasets.synthetic.view import View

FACADES: list[Colour] = [
    (176, 158, 132), (150, 108, 88), (186, 180, 168), (128, 126, 124), (204, 188, 150), (140, 132, 112), (112, 92, 84),
]  # fmt: skip
CARS: list[Colour] = [
    (32, 34, 40),
    (178, 182, 188),
    (236, 236, 234),
    (138, 24, 28),
    (30, 58, 110),
    (92, 98, 92),
    (190, 160, 60),
]
KERB_M, WALL_M, ROAD_M = 4.6, 8.6, 60.0


@dataclass(frozen=True)
class Light:
    """The hour and the weather. ambient: factor on every colour. haze_m: distance at which two thirds are air."""

    name: str
    sky_top: Colour
    sky_low: Colour
    ambient: float
    haze_m: float
    windows: float
    shadow: float


LIGHTS = (
    Light("sun", (92, 142, 206), (196, 216, 232), 1.08, 160, 0.02, 0.62),
    Light("overcast", (160, 166, 174), (206, 208, 210), 0.9, 90, 0.06, 0.86),
    Light("dusk", (74, 78, 116), (226, 160, 116), 0.66, 100, 0.35, 0.86),
    Light("night", (14, 16, 30), (46, 44, 56), 0.44, 80, 0.5, 0.9),
)


def paint_ground(canvas: Canvas, view: View, light: Light, chance: np.random.Generator) -> None:
    """Sky, road with its lines, pavements."""
    height = view.size_hw[0]
    canvas.owner, canvas.haze, canvas.light = NOBODY, 0.0, 1.0
    horizon = int(view.horizon_px)
    share = np.linspace(0, 1, horizon)[:, None]
    sky = (1 - share) * np.array(light.sky_top) + share * np.array(light.sky_low)
    canvas.picture[:horizon] = sky[:, None].astype(np.uint8)
    tone = float(chance.uniform(0.85, 1.1))
    rows = np.arange(horizon, height)
    distance = 1.4 * view.focal_px / np.maximum(1, rows - horizon)
    far = (1 - np.exp(-distance / light.haze_m))[:, None]
    road = (1 - far) * np.array([96, 96, 98]) * light.ambient * tone + far * np.array(light.sky_low)
    canvas.picture[horizon:] = road[:, None].clip(0, 255).astype(np.uint8)
    canvas.light = light.ambient * tone
    for side in (-1, 1):
        pavement = [view.at(side * x, z) for x, z in ((KERB_M, ROAD_M), (WALL_M, ROAD_M), (WALL_M, 1.2), (KERB_M, 1.2))]
        canvas.polygon(pavement, (148, 142, 134))
        kerb = [
            view.at(side * x, z)
            for x, z in ((KERB_M, ROAD_M), (KERB_M + 0.25, ROAD_M), (KERB_M + 0.25, 1.2), (KERB_M, 1.2))
        ]
        canvas.polygon(kerb, (184, 180, 172))
    start = float(chance.uniform(0, 6))
    for z in np.arange(start + 1.5, 45, 6.0):
        line = [view.at(x, depth) for x, depth in ((-0.07, z), (0.07, z), (0.07, z + 3), (-0.07, z + 3))]
        canvas.polygon(line, (214, 214, 206))
    if chance.random() < 0.5:
        crossing = float(chance.uniform(7, 18))
        for x in np.arange(-4.0, 4.0, 1.0):
            bar = [view.at(x + dx, crossing + dz) for dx, dz in ((0, 0), (0.5, 0), (0.5, 3), (0, 3))]
            canvas.polygon(bar, (212, 212, 206))
    canvas.light = light.ambient


def paint_houses(canvas: Canvas, view: View, light: Light, chance: np.random.Generator) -> None:
    """Two rows of houses along the pavements, far ones first, and what closes the street."""
    canvas.owner, canvas.light = NOBODY, light.ambient
    canvas.haze = _haze(light, ROAD_M)
    for left in np.arange(-12, 12, 4.0):
        tall = float(chance.uniform(6, 17))
        block = [view.at(x, ROAD_M, up) for x, up in ((left, 0), (left, tall), (left + 4, tall), (left + 4, 0))]
        canvas.polygon(block, FACADES[chance.integers(len(FACADES))])
    for side in (-1, 1):
        edges = [ROAD_M]
        while edges[-1] > 2:
            edges.append(max(1.2, edges[-1] - float(chance.uniform(7, 16))))
        for far, near in itertools.pairwise(edges):
            _house(canvas, view, light, side, (near, far), chance)


def _house(
    canvas: Canvas, view: View, light: Light, side: int, span: tuple[float, float], chance: np.random.Generator
) -> None:
    near, far = span
    canvas.haze = _haze(light, (near + far) / 2)
    tall = float(chance.uniform(8, 20))
    x = side * WALL_M
    if chance.random() < 0.12:  # a gap with a hedge
        tall = float(chance.uniform(1.5, 3))
    wall = FACADES[chance.integers(len(FACADES))]
    wall = shaded(wall, 0.82 if side < 0 else 1.0)
    canvas.polygon([view.at(x, far), view.at(x, far, tall), view.at(x, near, tall), view.at(x, near)], wall)
    canvas.polygon([view.at(x, far), view.at(x, far, 0.6), view.at(x, near, 0.6), view.at(x, near)], shaded(wall, 0.6))
    glass: Colour = shaded((70, 84, 100), 1.0 if light.ambient > 0.8 else 0.7)
    lamp: Colour = (255, 214, 140)
    step = float(chance.uniform(2.4, 3.4))
    for up in np.arange(1.1, tall - 1.8, 3.1):
        for z in np.arange(near + 0.8, far - 1.2, step):
            lit = chance.random() < light.windows
            canvas.light = 1.0 if lit else light.ambient
            pane = [view.at(x, z, up), view.at(x, z, up + 1.7), view.at(x, z + 1.2, up + 1.7), view.at(x, z + 1.2, up)]
            canvas.polygon(pane, lamp if lit else glass)
    canvas.light = light.ambient


def paint_car(canvas: Canvas, view: View, light: Light, x: float, z: float, chance: np.random.Generator) -> None:
    """A car seen from behind, or from the front when it comes towards us, with the flank that faces us."""
    canvas.haze, canvas.light = _haze(light, z), light.ambient
    paint = CARS[chance.integers(len(CARS))]
    half, long = 0.9, 4.2
    tall = float(chance.choice([1.45, 1.6, 1.95]))
    belt = tall * 0.58
    shadow(canvas, view, light, x, z + long / 2, 1.15, long / 2)
    flank = x + (half if x < 0 else -half)
    side_wall = [(z, 0.3), (z, belt), (z + long, belt), (z + long, 0.3)]
    canvas.polygon([view.at(flank, depth, up) for depth, up in side_wall], shaded(paint, 0.7))
    roof = [(z + 0.5, belt), (z + 1.0, tall), (z + 2.9, tall), (z + 3.5, belt)]
    canvas.polygon([view.at(flank * 0.97 + x * 0.03, depth, up) for depth, up in roof], (38, 44, 54))
    for depth in (z + 0.8, z + 3.4):
        centre, metre = view.at(flank, depth, 0.32), view.scale(depth)
        canvas.ellipse(centre, (0.14 * metre, 0.32 * metre), (22, 22, 24))
    body = [(-half, 0.28), (-half, belt), (-half * 0.8, tall), (half * 0.8, tall), (half, belt), (half, 0.28)]
    canvas.polygon([view.at(x + dx, z, up) for dx, up in body], paint)
    glass = [(-half * 0.85, belt), (-half * 0.7, tall - 0.1), (half * 0.7, tall - 0.1), (half * 0.85, belt)]
    canvas.polygon([view.at(x + dx, z, up) for dx, up in glass], (46, 54, 66))
    canvas.polygon(
        [view.at(x + dx, z, up) for dx, up in ((-half, 0.28), (-half, 0.5), (half, 0.5), (half, 0.28))],
        shaded(paint, 0.6),
    )
    comes = x < 0
    for dx in (-0.68, 0.68):
        lamp: Colour = (255, 246, 214) if comes else (196, 30, 30)
        canvas.light = 1.0 if light.ambient < 0.8 else light.ambient
        canvas.ellipse(view.at(x + dx, z, belt - 0.16), (0.15 * view.scale(z), 0.09 * view.scale(z)), lamp)
        canvas.light = light.ambient
        canvas.polygon(
            [view.at(x + dx + wheel, z, up) for wheel, up in ((-0.1, 0), (-0.1, 0.3), (0.1, 0.3), (0.1, 0))],
            (20, 20, 22),
        )


def paint_tree(canvas: Canvas, view: View, light: Light, x: float, z: float, chance: np.random.Generator) -> None:
    """A trunk as wide as a person far away, and a crown."""
    canvas.haze, canvas.light = _haze(light, z), light.ambient
    metre = view.scale(z)
    shadow(canvas, view, light, x, z, 0.8, 0.4)
    tall = float(chance.uniform(4, 7))
    canvas.limb(view.at(x, z), view.at(x, z, tall * 0.6), 0.17 * metre, 0.11 * metre, (82, 66, 52))
    green = np.array([62, 92, 46]) + chance.normal(0, 14, 3)
    for _ in range(22):
        away, around = 1.5 * chance.random() ** 0.5, chance.uniform(0, 2 * np.pi)
        dx, up, radius = away * np.cos(around), tall * 0.75 + 0.75 * away * np.sin(around), chance.uniform(0.35, 0.8)
        red, leaf, blue = np.clip(green * chance.uniform(0.7, 1.25), 0, 255)
        canvas.ellipse(
            view.at(x + dx, z, up), (radius * metre, radius * 0.8 * metre), (float(red), float(leaf), float(blue))
        )


def paint_post(canvas: Canvas, view: View, light: Light, x: float, z: float, chance: np.random.Generator) -> None:
    """A lamp post, a sign, a bollard or a hydrant: upright and thin, like a person from afar."""
    canvas.haze, canvas.light = _haze(light, z), light.ambient
    metre = view.scale(z)
    grey: Colour = (98, 102, 104)
    kind = chance.choice(["lamp", "sign", "bollard", "hydrant"], p=[0.3, 0.3, 0.25, 0.15])
    if kind == "lamp":
        canvas.limb(view.at(x, z), view.at(x, z, 5.2), 0.08 * metre, 0.05 * metre, grey)
        arm = x - np.sign(x) * 1.2
        canvas.limb(view.at(x, z, 5.2), view.at(arm, z, 5.3), 0.05 * metre, 0.05 * metre, grey)
        canvas.light = 1.0
        canvas.ellipse(
            view.at(arm, z, 5.2), (0.25 * metre, 0.1 * metre), (255, 236, 190) if light.windows > 0.2 else grey
        )
        canvas.light = light.ambient
    elif kind == "sign":
        canvas.limb(view.at(x, z), view.at(x, z, 2.3), 0.04 * metre, 0.04 * metre, grey)
        colour: Colour = [(190, 40, 40), (40, 80, 160), (230, 200, 60)][chance.integers(3)]
        canvas.ellipse(view.at(x, z, 2.4), (0.34 * metre, 0.34 * metre), colour)
        canvas.ellipse(view.at(x, z, 2.4), (0.24 * metre, 0.24 * metre), (236, 236, 232))
    elif kind == "bollard":
        canvas.limb(view.at(x, z), view.at(x, z, 1.0), 0.09 * metre, 0.09 * metre, (70, 72, 74))
        canvas.ellipse(view.at(x, z, 1.08), (0.11 * metre, 0.11 * metre), (176, 176, 170))
    else:
        canvas.limb(view.at(x, z), view.at(x, z, 0.7), 0.13 * metre, 0.12 * metre, (178, 44, 36))
        canvas.ellipse(view.at(x, z, 0.85), (0.14 * metre, 0.16 * metre), (196, 60, 50))


def shadow(canvas: Canvas, view: View, light: Light, x: float, z: float, half_x_m: float, half_z_m: float) -> None:
    """Darken the ground around a place, under an ellipse; owners stay as they are."""
    (left, _), (right, _) = view.at(x - half_x_m, z), view.at(x + half_x_m, z)
    far, near = view.at(x, z + half_z_m)[1], view.at(x, max(1.0, z - half_z_m))[1]
    x1, x2, y1, y2 = (
        max(0, int(left)),
        min(view.size_hw[1], int(right) + 1),
        max(0, int(far)),
        min(view.size_hw[0], int(near) + 1),
    )
    if x2 <= x1 or y2 <= y1:
        return
    window = canvas.picture[y1:y2, x1:x2]
    mask = np.full(window.shape[:2], 255, np.uint8)
    centre = (round((left + right) / 2 - x1), round((far + near) / 2 - y1))
    radii = (max(1, round((right - left) / 2)), max(1, round((near - far) / 2)))
    cv2.ellipse(mask, centre, radii, 0, 0, 360, int(255 * light.shadow), -1, cv2.LINE_AA)
    window[:] = cv2.multiply(window, cv2.merge([mask] * 3), scale=1 / 255)


def _haze(light: Light, z: float) -> float:
    return float(1 - np.exp(-z / light.haze_m))


def finish(
    canvas: Canvas, light: Light, chance: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """What the camera adds: a little blur, exposure, grain that grows in the dark."""
    picture = canvas.picture
    if chance.random() < 0.6:
        sigma = float(chance.uniform(0.4, 0.9))
        picture = cv2.GaussianBlur(picture, (3, 3), sigma)
    strength = 3.0 + 9.0 * (1 - min(1.0, light.ambient))
    grain = chance.normal(0, strength, (128, 128, 3)).astype(np.int16)
    rows, columns = (-(-side // 128) for side in picture.shape[:2])
    tiled = np.tile(grain, (rows, columns, 1))[: picture.shape[0], : picture.shape[1]]
    gain = float(chance.uniform(0.85, 1.15))
    exposed = cv2.convertScaleAbs(picture, alpha=gain)
    return cv2.add(exposed, tiled, dtype=cv2.CV_8U).astype(np.uint8)
