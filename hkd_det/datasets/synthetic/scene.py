"""A street's population: who and what stands where, painted from far to near, with the truth read off the pixels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.synthetic import figure, scenery
from hkd_det.datasets.synthetic.canvas import Canvas, Point, shaded
from hkd_det.datasets.synthetic.figure import Joints, Person
from hkd_det.datasets.synthetic.scenery import Light
from hkd_det.datasets.synthetic.view import View

IGNORE, PEDESTRIAN, RIDER, SITTING, OTHER, GROUP = range(6)  # CityPersons' labels
ASPECT = 0.41  # width over height of every person's box
LEAST_VISIBLE = 0.05  # of a box: less is an ignore region


@dataclass(frozen=True)
class Thing:
    """Something at a distance z. label: None for scenery. height_px: of the person from crown to sole."""

    z: float
    paint: Callable[[Canvas], None]
    label: int | None = None
    foot: Point = (0.0, 0.0)
    height_px: float = 0.0


@dataclass(frozen=True)
class Record:
    """One annotation as CityPersons has it: label, instance number, whole and visible box xywh, whole pixels."""

    label: int
    instance: int
    box_xywh: tuple[int, int, int, int]
    visible_xywh: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Street:
    """A drawn picture (H, W, 3) uint8 RGB and its records, far people first."""

    picture: NDArray[np.uint8]
    records: list[Record]


def draw_street(seed: int, split: int, index: int, size_hw: tuple[int, int] = (512, 1024)) -> Street:
    """Picture `index` of a split (0 train, 1 val): always the same for the same arguments."""
    chance = np.random.default_rng((seed, split, index))
    view = View(size_hw)
    light = scenery.LIGHTS[chance.choice(len(scenery.LIGHTS), p=[0.4, 0.35, 0.15, 0.1])]
    things = populated(view, light, chance)
    return painted(view, light, things, chance)


def painted(view: View, light: Light, things: list[Thing], chance: np.random.Generator) -> Street:
    """Paint a street and its things, far ones first, and read off what can be seen of each person."""
    canvas = Canvas(view.size_hw, light.sky_low)
    scenery.paint_ground(canvas, view, light, chance)
    scenery.paint_houses(canvas, view, light, chance)
    extents: dict[int, tuple[Thing, NDArray[np.float64]]] = {}
    for number, thing in enumerate(sorted(things, key=lambda thing: -thing.z), 1):
        canvas.owner = 0 if thing.label is None else number
        canvas.light, canvas.haze = light.ambient, float(1 - np.exp(-thing.z / light.haze_m))
        thing.paint(canvas)
        whole = canvas.extent_xyxy(number) if thing.label is not None else None
        if whole is not None:
            extents[number] = (thing, whole)
    records = [_record(canvas, number, thing, whole) for number, (thing, whole) in extents.items()]
    return Street(scenery.finish(canvas, light, chance), [record for record in records if record is not None])


def _record(canvas: Canvas, number: int, thing: Thing, painted_xyxy: NDArray[np.float64]) -> Record | None:
    """The annotation of one person; None if nothing of it can be seen."""
    assert thing.label is not None
    seen = canvas.extent_xyxy(number)
    if seen is None:
        return None
    if thing.label in (IGNORE, GROUP):
        whole = painted_xyxy
    else:
        half = ASPECT * thing.height_px / 2
        x, y = thing.foot
        whole = np.round([x - half, y - thing.height_px, x + half, y])
    # Where nothing hides a side, the visible box has the whole box's side: an arm swung in is not an occlusion.
    visible = np.where(seen == painted_xyxy, whole, np.clip(seen, whole[[0, 1, 0, 1]], whole[[2, 3, 2, 3]]))
    area, part = np.prod(whole[2:] - whole[:2]), np.prod(np.clip(visible[2:] - visible[:2], 0, None))
    label = thing.label if part >= LEAST_VISIBLE * area else IGNORE
    return Record(label, 24000 + number, _xywh(whole), _xywh(visible if label == thing.label else whole))


def _xywh(box_xyxy: NDArray[np.float64]) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (int(side) for side in box_xyxy)
    return x1, y1, x2 - x1, y2 - y1


def populated(view: View, light: Light, chance: np.random.Generator) -> list[Thing]:
    """Random people and things for one street."""
    things = [*_scenery(view, light, chance)]
    for _ in range(3 + chance.poisson(9)):
        x, z = place(chance)
        things.append(pedestrian(view, light, figure.random_person(chance), x, z, stature_m(chance)))
    for label, share in ((RIDER, 0.5), (SITTING, 0.3), (OTHER, 0.15), (IGNORE, 0.4), (GROUP, 0.35)):
        if chance.random() < share:
            things.append(_special(label, view, light, chance))
    return things


def stature_m(chance: np.random.Generator) -> float:
    """A height from crown to sole: mostly grown-ups."""
    return float(chance.uniform(1.0, 1.4) if chance.random() < 0.08 else chance.normal(1.71, 0.09))


def place(chance: np.random.Generator) -> tuple[float, float]:
    """Somewhere to walk: x and z in metres, near and far alike in the logarithm."""
    z = float(np.exp(chance.uniform(math.log(3.6), math.log(46))))
    if z < 9 or chance.random() < 0.2:
        return float(chance.uniform(-1, 1) * min(4.3, 0.75 * z)), z
    return float(chance.choice([-1, 1]) * chance.uniform(4.9, 8.2)), z


def pedestrian(view: View, light: Light, person: Person, x: float, z: float, height_m: float) -> Thing:
    """Somebody walking."""
    return _person(view, light, person, figure.walking(person), (x, z), height_m, PEDESTRIAN)


def _person(
    view: View,
    light: Light,
    person: Person,
    joints: Joints,
    where: Point,
    height_m: float,
    label: int,
) -> Thing:
    """A person in a pose, as tall as its crown is high."""
    x, z = where
    foot, height_px = view.at(x, z), height_m * view.scale(z)

    def paint(canvas: Canvas) -> None:
        scenery.shadow(canvas, view, light, x, z, 0.35, 0.25)
        figure.paint(canvas, person, joints, foot, height_px)

    return Thing(z, paint, label, foot, (joints.head[1] + figure.CROWN) * height_px)


def _special(label: int, view: View, light: Light, chance: np.random.Generator) -> Thing:
    person = figure.random_person(chance)
    x, z = place(chance)
    z = max(z, 6.0)
    match label:
        case 2:
            return _rider(view, light, person, (float(chance.uniform(-3, 3)), z), stature_m(chance))
        case 3:
            x = math.copysign(7.6, x)
            return _sitter(view, light, person, (x, max(z, 9.5)), stature_m(chance))
        case 4:
            return _person(view, light, person, figure.sitting(person), (x, z), stature_m(chance), OTHER)
        case 5:
            return _group(view, light, (math.copysign(6.5, x), max(z, 14.0)), chance)
        case _:
            return _poster(view, person, (math.copysign(8.3, x), float(chance.uniform(10, 25))))


def _rider(view: View, light: Light, person: Person, where: Point, height_m: float) -> Thing:
    base = _person(view, light, person, figure.riding(person), where, height_m, RIDER)
    metre = view.scale(where[1])
    foot = base.foot
    facing = math.copysign(1.0, person.turn)

    def at(dx: float, up: float) -> Point:
        return foot[0] + facing * dx * metre, foot[1] - up * metre

    def paint(canvas: Canvas) -> None:
        dark = (30, 30, 34)
        for dx in (-0.5, 0.5):
            canvas.ring(at(dx, 0.34), (0.33 * metre, 0.33 * metre), 0.05 * metre, dark)
        frame = shaded(person.upper, 0.8)
        for start, end in (((-0.5, 0.34), (-0.08, 0.8)), ((-0.08, 0.8), (0.4, 0.8)), ((0.5, 0.34), (0.38, 0.95)),
                           ((-0.05, 0.35), (0.4, 0.8)), ((-0.05, 0.35), (-0.08, 0.8))):  # fmt: skip
            canvas.limb(at(*start), at(*end), 0.03 * metre, 0.03 * metre, frame)
        base.paint(canvas)

    return Thing(base.z, paint, RIDER, base.foot, base.height_px)


def _sitter(view: View, light: Light, person: Person, where: Point, height_m: float) -> Thing:
    base = _person(view, light, person, figure.sitting(person), where, height_m, SITTING)
    x, z = where

    def paint(canvas: Canvas) -> None:
        owner, canvas.owner = canvas.owner, 0
        for low, high, tone in ((0.42, 0.5, 1.0), (0.6, 0.95, 0.8)):
            plank = [view.at(x + dx, z, up) for dx, up in ((-0.9, low), (-0.9, high), (0.9, high), (0.9, low))]
            canvas.polygon(plank, shaded((120, 84, 56), tone))
        canvas.owner = owner
        base.paint(canvas)

    return Thing(base.z, paint, SITTING, base.foot, base.height_px)


def _group(view: View, light: Light, where: Point, chance: np.random.Generator) -> Thing:
    """People too close to tell apart, annotated as one region."""
    members = [
        pedestrian(
            view,
            light,
            figure.random_person(chance),
            where[0] + chance.normal(0, 0.7),
            where[1] + chance.uniform(0, 1.5),
            stature_m(chance),
        )
        for _ in range(chance.integers(5, 9))
    ]

    def paint(canvas: Canvas) -> None:
        for member in sorted(members, key=lambda member: -member.z):
            member.paint(canvas)

    return Thing(where[1], paint, GROUP)


def _poster(view: View, person: Person, where: Point) -> Thing:
    x, z = where

    def paint(canvas: Canvas) -> None:
        owner, canvas.owner = canvas.owner, 0
        board = [view.at(x + dx, z, up) for dx, up in ((-0.75, 0.5), (-0.75, 2.7), (0.75, 2.7), (0.75, 0.5))]
        canvas.polygon(board, (70, 72, 76))
        inner = [view.at(x + dx, z, up) for dx, up in ((-0.66, 0.6), (-0.66, 2.6), (0.66, 2.6), (0.66, 0.6))]
        canvas.polygon(inner, (214, 206, 188))
        canvas.owner = owner
        figure.paint(canvas, person, figure.walking(person), view.at(x, z, 0.7), 1.75 * view.scale(z))

    return Thing(z, paint, IGNORE)


def _scenery(view: View, light: Light, chance: np.random.Generator) -> list[Thing]:
    things = []

    def add(painter: Callable[..., None], x: float, z: float) -> None:
        # A generator of its own: painting order must not change what is drawn.
        own = np.random.default_rng(chance.integers(2**62))
        things.append(Thing(z, lambda canvas: painter(canvas, view, light, x, z, own)))

    for side in (-1, 1):
        z = float(chance.uniform(7, 12))
        while z < 45:
            if chance.random() < 0.55:
                add(scenery.paint_car, side * 3.6, z)
            z += float(chance.uniform(5.5, 9))
        for _ in range(chance.poisson(2.2)):
            add(scenery.paint_tree, side * 5.2, float(chance.uniform(7, 45)))
        for _ in range(chance.poisson(2.5)):
            add(scenery.paint_post, side * 4.9, float(chance.uniform(6, 45)))
    if chance.random() < 0.4:
        add(scenery.paint_car, float(chance.choice([-1.6, 1.6])), float(chance.uniform(12, 40)))
    return things
