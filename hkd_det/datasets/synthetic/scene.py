"""A street's population: who and what stands where, painted from far to near, with the truth read off the pixels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.synthetic import person as figure
from hkd_det.datasets.synthetic import scenery
from hkd_det.datasets.synthetic.person import Joints, Person
from hkd_det.datasets.synthetic.renderer import Camera, Canvas, Point, scale_color
from hkd_det.datasets.synthetic.scenery import Lighting

IGNORE, PEDESTRIAN, RIDER, SITTING, OTHER, GROUP = range(6)  # CityPersons' labels
PERSON_ASPECT_RATIO = 0.41  # width over height of every person's box
MIN_VISIBLE_RATIO = 0.05  # of a box: less is an ignore region


@dataclass(frozen=True)
class SceneObject:
    """Something at a distance z. label: None for scenery. height_px: of the person from crown to sole."""

    z: float
    paint: Callable[[Canvas], None]
    label: int | None = None
    foot: Point = (0.0, 0.0)
    height_px: float = 0.0


@dataclass(frozen=True)
class AnnotationRecord:
    """One annotation as CityPersons has it: label, instance number, whole and visible box xywh, whole pixels."""

    label: int
    instance_id: int
    box_xywh: tuple[int, int, int, int]
    visible_xywh: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class RenderedScene:
    """A drawn picture (H, W, 3) uint8 RGB and its records, far people first."""

    image: NDArray[np.uint8]
    records: list[AnnotationRecord]


def generate_scene(seed: int, split: int, index: int, size_hw: tuple[int, int] = (512, 1024)) -> RenderedScene:
    """Picture `index` of a split (0 train, 1 val): always the same for the same arguments."""
    chance = np.random.default_rng((seed, split, index))
    view = Camera(size_hw)
    light = scenery.LIGHTINGS[chance.choice(len(scenery.LIGHTINGS), p=[0.4, 0.35, 0.15, 0.1])]
    things = sample_objects(view, light, chance)
    return render_scene(view, light, things, chance)


def render_scene(
    camera: Camera, lighting: Lighting, objects: list[SceneObject], rng: np.random.Generator
) -> RenderedScene:
    """Paint a street and its things, far ones first, and read off what can be seen of each person."""
    canvas = Canvas(camera.size_hw, lighting.sky_horizon)
    scenery.paint_ground(canvas, camera, lighting, rng)
    scenery.paint_houses(canvas, camera, lighting, rng)
    extents: dict[int, tuple[SceneObject, NDArray[np.float64]]] = {}
    for number, thing in enumerate(sorted(objects, key=lambda thing: -thing.z), 1):
        canvas.object_id = 0 if thing.label is None else number
        canvas.brightness, canvas.haze_ratio = (
            lighting.brightness,
            float(1 - np.exp(-thing.z / lighting.haze_distance_m)),
        )
        thing.paint(canvas)
        whole = canvas.compute_extent_xyxy(number) if thing.label is not None else None
        if whole is not None:
            extents[number] = (thing, whole)
    records = [_make_annotation_record(canvas, number, thing, whole) for number, (thing, whole) in extents.items()]
    return RenderedScene(
        scenery.add_sensor_noise(canvas, lighting, rng), [record for record in records if record is not None]
    )


def _make_annotation_record(
    canvas: Canvas, object_id: int, scene_object: SceneObject, painted_xyxy: NDArray[np.float64]
) -> AnnotationRecord | None:
    """The annotation of one person; None if nothing of it can be seen."""
    assert scene_object.label is not None
    seen = canvas.compute_extent_xyxy(object_id)
    if seen is None:
        return None
    if scene_object.label in (IGNORE, GROUP):
        whole = painted_xyxy
    else:
        half = PERSON_ASPECT_RATIO * scene_object.height_px / 2
        x, y = scene_object.foot
        whole = np.round([x - half, y - scene_object.height_px, x + half, y])
    # Where nothing hides a side, the visible box has the whole box's side: an arm swung in is not an occlusion.
    visible = np.where(seen == painted_xyxy, whole, np.clip(seen, whole[[0, 1, 0, 1]], whole[[2, 3, 2, 3]]))
    area, part = np.prod(whole[2:] - whole[:2]), np.prod(np.clip(visible[2:] - visible[:2], 0, None))
    label = scene_object.label if part >= MIN_VISIBLE_RATIO * area else IGNORE
    return AnnotationRecord(
        label, 24000 + object_id, _to_xywh(whole), _to_xywh(visible if label == scene_object.label else whole)
    )


def _to_xywh(box_xyxy: NDArray[np.float64]) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (int(side) for side in box_xyxy)
    return x1, y1, x2 - x1, y2 - y1


def sample_objects(camera: Camera, lighting: Lighting, rng: np.random.Generator) -> list[SceneObject]:
    """Random people and things for one street."""
    things = [*_sample_scenery(camera, lighting, rng)]
    for _ in range(3 + rng.poisson(9)):
        x, z = sample_position(rng)
        things.append(make_pedestrian(camera, lighting, figure.sample_person(rng), x, z, sample_height_m(rng)))
    for label, share in ((RIDER, 0.5), (SITTING, 0.3), (OTHER, 0.15), (IGNORE, 0.4), (GROUP, 0.35)):
        if rng.random() < share:
            things.append(_sample_special_object(label, camera, lighting, rng))
    return things


def sample_height_m(rng: np.random.Generator) -> float:
    """A height from crown to sole: mostly grown-ups."""
    return float(rng.uniform(1.0, 1.4) if rng.random() < 0.08 else rng.normal(1.71, 0.09))


def sample_position(rng: np.random.Generator) -> tuple[float, float]:
    """Somewhere to walk: x and z in metres, near and far alike in the logarithm."""
    z = float(np.exp(rng.uniform(math.log(3.6), math.log(46))))
    if z < 9 or rng.random() < 0.2:
        return float(rng.uniform(-1, 1) * min(4.3, 0.75 * z)), z
    return float(rng.choice([-1, 1]) * rng.uniform(4.9, 8.2)), z


def make_pedestrian(
    camera: Camera, lighting: Lighting, person: Person, x: float, z: float, height_m: float
) -> SceneObject:
    """Somebody walking."""
    return _make_person(camera, lighting, person, figure.walking_pose(person), (x, z), height_m, PEDESTRIAN)


def _make_person(
    camera: Camera,
    lighting: Lighting,
    person: Person,
    joints: Joints,
    position: Point,
    height_m: float,
    label: int,
) -> SceneObject:
    """A person in a pose, as tall as its crown is high."""
    x, z = position
    foot, height_px = camera.project(x, z), height_m * camera.pixels_per_meter(z)

    def paint(canvas: Canvas) -> None:
        scenery.paint_shadow(canvas, camera, lighting, x, z, 0.35, 0.25)
        figure.paint_person(canvas, person, joints, foot, height_px)

    return SceneObject(z, paint, label, foot, (joints.head[1] + figure.HEAD_TOP_OFFSET) * height_px)


def _sample_special_object(label: int, camera: Camera, lighting: Lighting, rng: np.random.Generator) -> SceneObject:
    person = figure.sample_person(rng)
    x, z = sample_position(rng)
    z = max(z, 6.0)
    match label:
        case 2:
            return _make_rider(camera, lighting, person, (float(rng.uniform(-3, 3)), z), sample_height_m(rng))
        case 3:
            x = math.copysign(7.6, x)
            return _make_sitting_person(camera, lighting, person, (x, max(z, 9.5)), sample_height_m(rng))
        case 4:
            return _make_person(
                camera, lighting, person, figure.sitting_pose(person), (x, z), sample_height_m(rng), OTHER
            )
        case 5:
            return _sample_group(camera, lighting, (math.copysign(6.5, x), max(z, 14.0)), rng)
        case _:
            return _make_poster(camera, person, (math.copysign(8.3, x), float(rng.uniform(10, 25))))


def _make_rider(camera: Camera, lighting: Lighting, person: Person, position: Point, height_m: float) -> SceneObject:
    base = _make_person(camera, lighting, person, figure.riding_pose(person), position, height_m, RIDER)
    metre = camera.pixels_per_meter(position[1])
    foot = base.foot
    facing = math.copysign(1.0, person.facing)

    def at(dx: float, up: float) -> Point:
        return foot[0] + facing * dx * metre, foot[1] - up * metre

    def paint(canvas: Canvas) -> None:
        dark = (30, 30, 34)
        for dx in (-0.5, 0.5):
            canvas.draw_ring(at(dx, 0.34), (0.33 * metre, 0.33 * metre), 0.05 * metre, dark)
        frame = scale_color(person.upper, 0.8)
        for start, end in (((-0.5, 0.34), (-0.08, 0.8)), ((-0.08, 0.8), (0.4, 0.8)), ((0.5, 0.34), (0.38, 0.95)),
                           ((-0.05, 0.35), (0.4, 0.8)), ((-0.05, 0.35), (-0.08, 0.8))):  # fmt: skip
            canvas.draw_capsule(at(*start), at(*end), 0.03 * metre, 0.03 * metre, frame)
        base.paint(canvas)

    return SceneObject(base.z, paint, RIDER, base.foot, base.height_px)


def _make_sitting_person(
    camera: Camera, lighting: Lighting, person: Person, position: Point, height_m: float
) -> SceneObject:
    base = _make_person(camera, lighting, person, figure.sitting_pose(person), position, height_m, SITTING)
    x, z = position

    def paint(canvas: Canvas) -> None:
        owner, canvas.object_id = canvas.object_id, 0
        for low, high, tone in ((0.42, 0.5, 1.0), (0.6, 0.95, 0.8)):
            plank = [camera.project(x + dx, z, up) for dx, up in ((-0.9, low), (-0.9, high), (0.9, high), (0.9, low))]
            canvas.draw_polygon(plank, scale_color((120, 84, 56), tone))
        canvas.object_id = owner
        base.paint(canvas)

    return SceneObject(base.z, paint, SITTING, base.foot, base.height_px)


def _sample_group(camera: Camera, lighting: Lighting, position: Point, rng: np.random.Generator) -> SceneObject:
    """People too close to tell apart, annotated as one region."""
    members = [
        make_pedestrian(
            camera,
            lighting,
            figure.sample_person(rng),
            position[0] + rng.normal(0, 0.7),
            position[1] + rng.uniform(0, 1.5),
            sample_height_m(rng),
        )
        for _ in range(rng.integers(5, 9))
    ]

    def paint(canvas: Canvas) -> None:
        for member in sorted(members, key=lambda member: -member.z):
            member.paint(canvas)

    return SceneObject(position[1], paint, GROUP)


def _make_poster(camera: Camera, person: Person, position: Point) -> SceneObject:
    x, z = position

    def paint(canvas: Canvas) -> None:
        owner, canvas.object_id = canvas.object_id, 0
        board = [camera.project(x + dx, z, up) for dx, up in ((-0.75, 0.5), (-0.75, 2.7), (0.75, 2.7), (0.75, 0.5))]
        canvas.draw_polygon(board, (70, 72, 76))
        inner = [camera.project(x + dx, z, up) for dx, up in ((-0.66, 0.6), (-0.66, 2.6), (0.66, 2.6), (0.66, 0.6))]
        canvas.draw_polygon(inner, (214, 206, 188))
        canvas.object_id = owner
        figure.paint_person(
            canvas, person, figure.walking_pose(person), camera.project(x, z, 0.7), 1.75 * camera.pixels_per_meter(z)
        )

    return SceneObject(z, paint, IGNORE)


def _sample_scenery(camera: Camera, lighting: Lighting, rng: np.random.Generator) -> list[SceneObject]:
    things = []

    def add(painter: Callable[..., None], x: float, z: float) -> None:
        # A generator of its own: painting order must not change what is drawn.
        own = np.random.default_rng(rng.integers(2**62))
        things.append(SceneObject(z, lambda canvas: painter(canvas, camera, lighting, x, z, own)))

    for side in (-1, 1):
        z = float(rng.uniform(7, 12))
        while z < 45:
            if rng.random() < 0.55:
                add(scenery.paint_car, side * 3.6, z)
            z += float(rng.uniform(5.5, 9))
        for _ in range(rng.poisson(2.2)):
            add(scenery.paint_tree, side * 5.2, float(rng.uniform(7, 45)))
        for _ in range(rng.poisson(2.5)):
            add(scenery.paint_post, side * 4.9, float(rng.uniform(6, 45)))
    if rng.random() < 0.4:
        add(scenery.paint_car, float(rng.choice([-1.6, 1.6])), float(rng.uniform(12, 40)))
    return things
