"""Persons of the synthetic scenes: proportions, clothes and poses, drawn limb by limb."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hkd_det.datasets.synthetic.renderer import Canvas, Color, Point, scale_color

SKIN_COLORS: list[Color] = [(238, 200, 172), (222, 178, 142), (198, 146, 106), (150, 104, 72), (104, 70, 50)]
HAIR_COLORS: list[Color] = [(36, 28, 24), (70, 48, 32), (120, 84, 48), (190, 160, 104), (150, 146, 142)]
CLOTHING_COLORS: list[Color] = [
    (34, 36, 44), (58, 62, 74), (40, 52, 88), (96, 100, 108), (150, 40, 44), (188, 182, 168), (60, 92, 70),
    (200, 150, 60), (112, 78, 60), (70, 120, 160), (214, 214, 218), (128, 64, 110), (220, 110, 60),
]  # fmt: skip
LOWER_CLOTHING_COLORS: list[Color] = [
    (38, 44, 62),
    (30, 30, 34),
    (70, 78, 98),
    (104, 94, 78),
    (60, 56, 54),
    (128, 124, 116),
]
HEAD_TOP_OFFSET = 0.068  # from the center of the head, in standing heights

PointTransform = Callable[[Point], Point]  # from standing heights to pixels


@dataclass(frozen=True)
class Person:
    """Appearance and movement of a person.

    Attributes:
        build: Factor on all widths.
        skin, hair, upper, lower, shoes: RGB colors, 0 to 255.
        garment: "trousers", "skirt" or "coat".
        has_bag: True for a bag in the hand.
        has_hat: True for a hat.
        facing: -1 left, 0 toward the camera or away from it, 1 right.
        is_facing_away: True if the back is visible.
        phase: Phase of the walk in radians.
        stride: Swing of the legs in radians; 0 for standing.
    """

    build: float
    skin: Color
    hair: Color
    upper: Color
    lower: Color
    shoes: Color
    garment: str  # "trousers", "skirt" or "coat"
    has_bag: bool
    has_hat: bool
    facing: float
    is_facing_away: bool
    phase: float
    stride: float


def sample_person(rng: np.random.Generator) -> Person:
    """Sample a random person.

    Args:
        rng: Random generator.

    Returns:
        Body, clothes and phase of the movement.
    """

    def pick(colors: list[Color]) -> Color:
        red, green, blue = np.clip(np.array(colors[rng.integers(len(colors))]) + rng.normal(0, 9, 3), 0, 255)
        return float(red), float(green), float(blue)

    is_walking = rng.random() < 0.8
    return Person(
        build=float(np.clip(rng.normal(1.0, 0.1), 0.8, 1.3)),
        skin=pick(SKIN_COLORS),
        hair=pick(HAIR_COLORS),
        upper=pick(CLOTHING_COLORS),
        lower=pick(LOWER_CLOTHING_COLORS),
        shoes=pick(HAIR_COLORS),
        garment=str(rng.choice(["trousers", "skirt", "coat"], p=[0.65, 0.13, 0.22])),
        has_bag=bool(rng.random() < 0.3),
        has_hat=bool(rng.random() < 0.15),
        facing=float(rng.choice([-1, 1]) * rng.random() ** 0.5),
        is_facing_away=bool(rng.random() < 0.5),
        phase=float(rng.uniform(0, 2 * math.pi)),
        stride=float(rng.uniform(0.25, 0.5)) if is_walking else 0.06,
    )


@dataclass(frozen=True)
class Joints:
    """Joints of a pose: x to the right, y up, in standing heights. Pairs contain the near and the far limb.

    Attributes:
        hip, neck, head: Joints of the torso.
        knees, feet, elbows, hands: Joints of both limbs.
    """

    hip: Point
    neck: Point
    head: Point
    knees: tuple[Point, Point]
    feet: tuple[Point, Point]
    elbows: tuple[Point, Point]
    hands: tuple[Point, Point]


def walking_pose(person: Person) -> Joints:
    """Return the joints of a walking person: legs and arms swing in opposite directions, the rear knee bends.

    Args:
        person: Body and phase of the movement.
    """
    swing = person.stride * math.sin(person.phase)
    facing, side = math.copysign(1.0, person.facing), abs(person.facing)
    hip, neck = (0.0, 0.52), (0.012 * facing * side, 0.83)
    knees, feet, elbows, hands = [], [], [], []
    for sign in (1.0, -1.0):  # near, far
        angle = sign * swing
        bend = 0.12 + max(0.0, -sign * math.cos(person.phase)) * person.stride * 1.7
        apart = sign * 0.045 * person.build * (1 - side)
        knee = (apart + facing * side * 0.25 * math.sin(angle), hip[1] - 0.25 * math.cos(angle))
        shin = angle - bend
        foot = (knee[0] + facing * side * 0.25 * math.sin(shin), max(0.018, knee[1] - 0.245 * math.cos(shin)))
        knees.append(knee)
        feet.append(foot)
        shoulder = (neck[0] + sign * 0.115 * person.build * (1 - 0.6 * side), neck[1] - 0.025)
        arm = -sign * swing * 0.9
        elbow = (shoulder[0] + facing * side * 0.17 * math.sin(arm) + sign * 0.02, shoulder[1] - 0.17 * math.cos(arm))
        fore = arm + 0.35
        hands.append((elbow[0] + facing * side * 0.16 * math.sin(fore), elbow[1] - 0.16 * math.cos(fore)))
        elbows.append(elbow)
    # The lower foot touches the ground for every swing.
    drop = min(foot[1] for foot in feet) - 0.018
    lowered = [(x, y - drop) for x, y in feet]
    return Joints(
        (hip[0], hip[1] - drop), (neck[0], neck[1] - drop),
        (neck[0] + 0.012 * facing * side, 1 - HEAD_TOP_OFFSET - drop),
        _to_pair([(x, y - drop) for x, y in knees]), _to_pair(lowered),
        _to_pair([(x, y - drop) for x, y in elbows]), _to_pair([(x, y - drop) for x, y in hands]),
    )  # fmt: skip


def riding_pose(person: Person) -> Joints:
    """Return the joints of a cyclist, with the saddle at 0.5 standing heights.

    Args:
        person: Body and phase of the movement.
    """
    facing = math.copysign(1.0, person.facing)
    phase = person.phase
    feet = [(facing * (0.06 + s * 0.07 * math.cos(phase)), 0.16 + s * 0.07 * math.sin(phase)) for s in (1.0, -1.0)]
    knees = [(x + facing * 0.11, (y + 0.52) / 2 + 0.05) for x, y in feet]
    return Joints(
        (-facing * 0.05, 0.52), (facing * 0.1, 0.8), (facing * 0.15, 0.9), _to_pair(knees), _to_pair(feet),
        _to_pair([(facing * 0.2, 0.66), (facing * 0.2, 0.67)]), _to_pair([(facing * 0.3, 0.58), (facing * 0.3, 0.59)]),
    )  # fmt: skip


def sitting_pose(person: Person) -> Joints:
    """Return the joints of a person on a bench, with the seat at 0.27 standing heights.

    Args:
        person: Body and phase of the movement.
    """
    facing = math.copysign(1.0, person.facing)
    return Joints(
        (0.0, 0.29), (-facing * 0.02, 0.59), (0.0, 0.69),
        _to_pair([(facing * 0.23, 0.29), (facing * 0.22, 0.28)]),
        _to_pair([(facing * 0.24, 0.02), (facing * 0.2, 0.02)]),
        _to_pair([(facing * 0.07, 0.42), (facing * 0.06, 0.42)]),
        _to_pair([(facing * 0.2, 0.33), (facing * 0.18, 0.33)]),
    )  # fmt: skip


def paint_person(canvas: Canvas, person: Person, joints: Joints, foot: Point, height_px: float) -> None:
    """Draw a person, far limbs first.

    Args:
        canvas: Canvas to draw on.
        person: Appearance.
        joints: Pose.
        foot: Point on the ground, x and y in pixels.
        height_px: Standing height in pixels.
    """

    def at(point: Point) -> Point:
        return foot[0] + point[0] * height_px, foot[1] - point[1] * height_px

    width_px = person.build * height_px
    for limb in (1, 0):
        brightness = 0.72 if limb else 1.0
        _paint_leg(canvas, person, at(joints.hip), at(joints.knees[limb]), at(joints.feet[limb]), width_px, brightness)
        if limb:
            _paint_arm(canvas, person, joints, limb, at, width_px, brightness)
    _paint_torso(canvas, person, joints, at, width_px)
    _paint_head(canvas, person, at(joints.neck), at(joints.head), height_px)
    _paint_arm(canvas, person, joints, 0, at, width_px, 1.0)
    if person.has_bag:
        hand = at(joints.hands[0])
        canvas.draw_polygon(
            [
                (hand[0] + dx * width_px, hand[1] + dy * width_px)
                for dx, dy in ((-0.05, 0.02), (0.05, 0.02), (0.06, 0.14), (-0.06, 0.14))
            ],
            scale_color(person.shoes, 1.3),
        )


def _to_pair(points: list[Point]) -> tuple[Point, Point]:
    return points[0], points[1]


def _paint_leg(
    canvas: Canvas, person: Person, hip: Point, knee: Point, foot: Point, width_px: float, brightness: float
) -> None:
    has_bare_legs = person.garment == "skirt"
    thigh = scale_color(person.lower, brightness)
    shin = scale_color(person.skin if has_bare_legs else person.lower, brightness)
    canvas.draw_capsule(hip, knee, 0.058 * width_px, 0.042 * width_px, thigh)
    canvas.draw_capsule(knee, foot, 0.042 * width_px, 0.026 * width_px, shin)
    offset = math.copysign(0.035 * width_px, person.facing) * min(1.0, abs(person.facing) + 0.2)
    canvas.draw_ellipse(
        (foot[0] + offset, foot[1]), (0.05 * width_px, 0.02 * width_px), scale_color(person.shoes, brightness)
    )


def _paint_arm(
    canvas: Canvas,
    person: Person,
    joints: Joints,
    limb_index: int,
    to_pixels: PointTransform,
    width_px: float,
    brightness: float,
) -> None:
    sign = 1.0 if limb_index == 0 else -1.0
    reach = sign * 0.105 * person.build * (1 - 0.6 * abs(person.facing))
    shoulder = to_pixels((joints.neck[0] + reach, joints.neck[1] - 0.03))
    elbow, hand = to_pixels(joints.elbows[limb_index]), to_pixels(joints.hands[limb_index])
    sleeve = scale_color(person.upper, 0.86 * brightness)
    canvas.draw_capsule(shoulder, elbow, 0.034 * width_px, 0.027 * width_px, sleeve)
    canvas.draw_capsule(elbow, hand, 0.027 * width_px, 0.02 * width_px, sleeve)
    canvas.draw_ellipse(hand, (0.022 * width_px, 0.024 * width_px), scale_color(person.skin, brightness))


def _paint_torso(canvas: Canvas, person: Person, joints: Joints, to_pixels: PointTransform, width_px: float) -> None:
    narrow = 1 - 0.4 * abs(person.facing)
    (hip_x, hip_y), (neck_x, neck_y) = to_pixels(joints.hip), to_pixels(joints.neck)
    chest, waist = 0.13 * width_px * narrow, 0.1 * width_px * narrow
    hem = {"trousers": 0.03, "skirt": 0.17, "coat": 0.2}[person.garment] * width_px
    flare = {"trousers": 1.0, "skirt": 1.5, "coat": 1.15}[person.garment]
    if person.garment == "skirt":
        canvas.draw_polygon(
            [(hip_x - waist, hip_y - 0.04 * width_px), (hip_x + waist, hip_y - 0.04 * width_px),
             (hip_x + flare * waist, hip_y + hem), (hip_x - flare * waist, hip_y + hem)],
            scale_color(person.lower, 1.1),
        )  # fmt: skip
        hem, flare = 0.03 * width_px, 1.0
    shoulder_y = neck_y + 0.03 * width_px
    outline = [
        (neck_x - 0.4 * chest, neck_y), (neck_x + 0.4 * chest, neck_y), (neck_x + chest, shoulder_y),
        (hip_x + flare * waist, hip_y + hem), (hip_x - flare * waist, hip_y + hem), (neck_x - chest, shoulder_y),
    ]  # fmt: skip
    canvas.draw_polygon(outline, person.upper)
    shade = [(neck_x + 0.2 * chest, neck_y), outline[2], outline[3], (hip_x + 0.2 * waist, hip_y + hem)]
    canvas.draw_polygon(shade, scale_color(person.upper, 0.82))


def _paint_head(canvas: Canvas, person: Person, neck: Point, head: Point, height_px: float) -> None:
    canvas.draw_capsule(neck, head, 0.026 * height_px, 0.026 * height_px, scale_color(person.skin, 0.85))
    canvas.draw_ellipse(head, (0.05 * height_px, HEAD_TOP_OFFSET * height_px), person.hair)
    if not (person.is_facing_away and abs(person.facing) < 0.5):
        offset = math.copysign(0.016 * height_px, person.facing) * abs(person.facing)
        canvas.draw_ellipse(
            (head[0] + offset, head[1] + 0.016 * height_px), (0.038 * height_px, 0.05 * height_px), person.skin
        )
    if person.has_hat:
        canvas.draw_ellipse(
            (head[0], head[1] - 0.03 * height_px),
            (0.056 * height_px, 0.034 * height_px),
            scale_color(person.upper, 0.7),
        )
