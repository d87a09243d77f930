"""Synthetic scenes: sampling of persons and objects with their labels, rendering from far to near, and annotations.

Persons are in a pose; riders, groups, posters and scenery are objects of a scene. The visible part of each person is
computed from the rendered pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.synthetic import scenery
from hkd_det.datasets.synthetic.person import (
    HEAD_TOP_OFFSET,
    Joints,
    Person,
    paint_person,
    riding_pose,
    sample_person,
    sitting_pose,
    walking_pose,
)
from hkd_det.datasets.synthetic.renderer import (
    BACKGROUND_ID,
    LIGHTINGS,
    Camera,
    Canvas,
    Lighting,
    Point,
    add_sensor_noise,
    compute_haze,
    scale_color,
)

IGNORE, PEDESTRIAN, RIDER, SITTING, OTHER, GROUP = range(6)  # labels of CityPersons
PERSON_ASPECT_RATIO = 0.41  # width / height of every person box
MIN_VISIBLE_RATIO = 0.05  # boxes that are less visible become ignore regions


@dataclass(frozen=True)
class SceneObject:
    """A person or an object of the scene.

    Attributes:
        z: Distance in meters.
        paint: Function that draws it.
        label: Label of CityPersons; None for scenery.
        foot: Point on the ground, x and y in pixels.
        height_px: Height of a person in pixels.
    """

    z: float
    paint: Callable[[Canvas], None]
    label: int | None = None
    foot: Point = (0.0, 0.0)
    height_px: float = 0.0


def sample_height_m(rng: np.random.Generator) -> float:
    """Sample a body height in meters; 8 % are children.

    Args:
        rng: Random generator.

    Returns:
        Height, meters.
    """
    return float(rng.uniform(1.0, 1.4) if rng.random() < 0.08 else rng.normal(1.71, 0.09))


def sample_position(rng: np.random.Generator) -> tuple[float, float]:
    """Sample a position (x, z) in meters on the road or the sidewalks; the logarithm of z is uniform.

    Args:
        rng: Random generator.

    Returns:
        Position (x, z), meters.
    """
    z = float(np.exp(rng.uniform(math.log(3.6), math.log(46))))
    if z < 9 or rng.random() < 0.2:
        return float(rng.uniform(-1, 1) * min(4.3, 0.75 * z)), z
    return float(rng.choice([-1, 1]) * rng.uniform(4.9, 8.2)), z


def make_pedestrian(
    camera: Camera, lighting: Lighting, person: Person, x: float, z: float, height_m: float
) -> SceneObject:
    """Make a walking person at the position (x, z) in meters.

    Args:
        camera: Projection.
        lighting: Colors and brightness.
        person: Body and phase of the movement.
        x: Horizontal offset from the optical axis, meters.
        z: Distance from the camera, meters.
        height_m: Height of the body.

    Returns:
        The object.
    """
    return _make_person(camera, lighting, person, walking_pose(person), (x, z), height_m, PEDESTRIAN)


def _make_person(
    camera: Camera,
    lighting: Lighting,
    person: Person,
    joints: Joints,
    position: Point,
    height_m: float,
    label: int,
) -> SceneObject:
    """Make a person in a pose; the annotated height ends at the top of the head."""
    x, z = position
    foot, height_px = camera.project(x, z), height_m * camera.pixels_per_meter(z)

    def paint(canvas: Canvas) -> None:
        scenery.paint_shadow(canvas, camera, lighting, x, z, 0.35, 0.25)
        paint_person(canvas, person, joints, foot, height_px)

    return SceneObject(z, paint, label, foot, (joints.head[1] + HEAD_TOP_OFFSET) * height_px)


def sample_special_object(label: int, camera: Camera, lighting: Lighting, rng: np.random.Generator) -> SceneObject:
    """Sample a rider, a sitting person, a person in another pose, a group or a poster.

    Args:
        label: Label of CityPersons.
        camera: Projection.
        lighting: Colors and brightness.
        rng: Random generator.

    Returns:
        The object.
    """
    person = sample_person(rng)
    x, z = sample_position(rng)
    z = max(z, 6.0)
    match label:
        case 2:
            return _make_rider(camera, lighting, person, (float(rng.uniform(-3, 3)), z), sample_height_m(rng))
        case 3:
            x = math.copysign(7.6, x)
            return _make_sitting_person(camera, lighting, person, (x, max(z, 9.5)), sample_height_m(rng))
        case 4:
            return _make_person(camera, lighting, person, sitting_pose(person), (x, z), sample_height_m(rng), OTHER)
        case 5:
            return _sample_group(camera, lighting, (math.copysign(6.5, x), max(z, 14.0)), rng)
        case _:
            return _make_poster(camera, person, (math.copysign(8.3, x), float(rng.uniform(10, 25))))


def _make_rider(camera: Camera, lighting: Lighting, person: Person, position: Point, height_m: float) -> SceneObject:
    base = _make_person(camera, lighting, person, riding_pose(person), position, height_m, RIDER)
    scale = camera.pixels_per_meter(position[1])
    foot = base.foot
    facing = math.copysign(1.0, person.facing)

    def at(dx: float, up: float) -> Point:
        return foot[0] + facing * dx * scale, foot[1] - up * scale

    def paint(canvas: Canvas) -> None:
        dark = (30, 30, 34)
        for dx in (-0.5, 0.5):
            canvas.draw_ring(at(dx, 0.34), (0.33 * scale, 0.33 * scale), 0.05 * scale, dark)
        frame = scale_color(person.upper, 0.8)
        for start, end in (((-0.5, 0.34), (-0.08, 0.8)), ((-0.08, 0.8), (0.4, 0.8)), ((0.5, 0.34), (0.38, 0.95)),
                           ((-0.05, 0.35), (0.4, 0.8)), ((-0.05, 0.35), (-0.08, 0.8))):  # fmt: skip
            canvas.draw_capsule(at(*start), at(*end), 0.03 * scale, 0.03 * scale, frame)
        base.paint(canvas)

    return SceneObject(base.z, paint, RIDER, base.foot, base.height_px)


def _make_sitting_person(
    camera: Camera, lighting: Lighting, person: Person, position: Point, height_m: float
) -> SceneObject:
    base = _make_person(camera, lighting, person, sitting_pose(person), position, height_m, SITTING)
    x, z = position

    def paint(canvas: Canvas) -> None:
        object_id, canvas.object_id = canvas.object_id, BACKGROUND_ID
        for low, high, brightness in ((0.42, 0.5, 1.0), (0.6, 0.95, 0.8)):
            plank = [camera.project(x + dx, z, up) for dx, up in ((-0.9, low), (-0.9, high), (0.9, high), (0.9, low))]
            canvas.draw_polygon(plank, scale_color((120, 84, 56), brightness))
        canvas.object_id = object_id
        base.paint(canvas)

    return SceneObject(base.z, paint, SITTING, base.foot, base.height_px)


def _sample_group(camera: Camera, lighting: Lighting, position: Point, rng: np.random.Generator) -> SceneObject:
    """Make a dense group of persons that is annotated as one region."""
    members = [
        make_pedestrian(
            camera,
            lighting,
            sample_person(rng),
            position[0] + rng.normal(0, 0.7),
            position[1] + rng.uniform(0, 1.5),
            sample_height_m(rng),
        )
        for _ in range(rng.integers(5, 9))
    ]

    def paint(canvas: Canvas) -> None:
        for member in sorted(members, key=lambda one: -one.z):
            member.paint(canvas)

    return SceneObject(position[1], paint, GROUP)


def _make_poster(camera: Camera, person: Person, position: Point) -> SceneObject:
    x, z = position

    def paint(canvas: Canvas) -> None:
        object_id, canvas.object_id = canvas.object_id, BACKGROUND_ID
        board = [camera.project(x + dx, z, up) for dx, up in ((-0.75, 0.5), (-0.75, 2.7), (0.75, 2.7), (0.75, 0.5))]
        canvas.draw_polygon(board, (70, 72, 76))
        inner = [camera.project(x + dx, z, up) for dx, up in ((-0.66, 0.6), (-0.66, 2.6), (0.66, 2.6), (0.66, 0.6))]
        canvas.draw_polygon(inner, (214, 206, 188))
        canvas.object_id = object_id
        paint_person(canvas, person, walking_pose(person), camera.project(x, z, 0.7), 1.75 * camera.pixels_per_meter(z))

    return SceneObject(z, paint, IGNORE)


def sample_scenery(camera: Camera, lighting: Lighting, rng: np.random.Generator) -> list[SceneObject]:
    """Sample parked and driving cars, trees and posts.

    Args:
        camera: Projection.
        lighting: Colors and brightness.
        rng: Random generator.

    Returns:
        Objects, in no order.
    """
    objects = []

    def add(painter: Callable[..., None], x: float, z: float) -> None:
        # A separate generator: the order of drawing must not change the result.
        object_rng = np.random.default_rng(rng.integers(2**62))
        objects.append(SceneObject(z, lambda canvas: painter(canvas, camera, lighting, x, z, object_rng)))

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
    return objects


@dataclass(frozen=True)
class AnnotationRecord:
    """One annotation in the form of CityPersons.

    Attributes:
        label: Class id of CityPersons: 0 ignore region, 1 pedestrian, 2 rider, 3 sitting, 4 other, 5 people group.
        instance_id: Id of the instance, unique in the image.
        box_xywh: Full-body box including hidden parts, xywh, integer pixels.
        visible_xywh: Box of the visible part, xywh, integer pixels.
    """

    label: int
    instance_id: int
    box_xywh: tuple[int, int, int, int]
    visible_xywh: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class RenderedScene:
    """A rendered image with its annotations.

    Attributes:
        image (uint8 array[H, W, 3]): RGB.
        records: Annotations, far persons first.
    """

    image: NDArray[np.uint8]
    records: list[AnnotationRecord]


def generate_scene(seed: int, split: int, index: int, size_hw: tuple[int, int] = (512, 1024)) -> RenderedScene:
    """Generate one image of a dataset. Equal arguments give equal results.

    Args:
        seed: Seed of the dataset.
        split: 0 for train, 1 for val.
        index: Number of the image in the split.
        size_hw: Height and width in pixels.

    Returns:
        Image and annotations.
    """
    rng = np.random.default_rng((seed, split, index))
    camera = Camera(size_hw)
    lighting = LIGHTINGS[rng.choice(len(LIGHTINGS), p=[0.4, 0.35, 0.15, 0.1])]
    objects = sample_objects(camera, lighting, rng)
    return render_scene(camera, lighting, objects, rng)


def render_scene(
    camera: Camera, lighting: Lighting, objects: list[SceneObject], rng: np.random.Generator
) -> RenderedScene:
    """Render a scene from far to near and compute the visible part of each person.

    Args:
        camera: Projection.
        lighting: Colors and brightness.
        objects: Persons and objects, in any order.
        rng: Random generator of scenery and noise.

    Returns:
        Image and annotations.
    """
    canvas = Canvas(camera.size_hw, lighting.sky_horizon)
    scenery.paint_ground(canvas, camera, lighting, rng)
    scenery.paint_houses(canvas, camera, lighting, rng)
    extents: dict[int, tuple[SceneObject, NDArray[np.float64]]] = {}
    for object_id, scene_object in enumerate(sorted(objects, key=lambda one: -one.z), 1):
        canvas.object_id = BACKGROUND_ID if scene_object.label is None else object_id
        canvas.brightness = lighting.brightness
        canvas.haze_ratio = compute_haze(lighting, scene_object.z)
        scene_object.paint(canvas)
        painted_xyxy = canvas.compute_extent_xyxy(object_id) if scene_object.label is not None else None
        if painted_xyxy is not None:
            extents[object_id] = (scene_object, painted_xyxy)
    records = [
        _make_annotation_record(canvas, object_id, scene_object, painted_xyxy)
        for object_id, (scene_object, painted_xyxy) in extents.items()
    ]
    image = add_sensor_noise(canvas, lighting, rng)
    return RenderedScene(image, [record for record in records if record is not None])


def _make_annotation_record(
    canvas: Canvas, object_id: int, scene_object: SceneObject, painted_xyxy: NDArray[np.float64]
) -> AnnotationRecord | None:
    """Build the annotation of an object; None if it is not visible."""
    assert scene_object.label is not None
    visible_xyxy = canvas.compute_extent_xyxy(object_id)
    if visible_xyxy is None:
        return None
    if scene_object.label in (IGNORE, GROUP):
        box = painted_xyxy
    else:
        half_width = PERSON_ASPECT_RATIO * scene_object.height_px / 2
        x, y = scene_object.foot
        box = np.round([x - half_width, y - scene_object.height_px, x + half_width, y])
    # A side that is not occluded is that of the whole box: an arm in front of the body is not an occlusion.
    clipped = np.clip(visible_xyxy, box[[0, 1, 0, 1]], box[[2, 3, 2, 3]])
    visible = np.where(visible_xyxy == painted_xyxy, box, clipped)
    area, visible_area = np.prod(box[2:] - box[:2]), np.prod(np.clip(visible[2:] - visible[:2], 0, None))
    label = scene_object.label if visible_area >= MIN_VISIBLE_RATIO * area else IGNORE
    return AnnotationRecord(
        label, 24000 + object_id, _to_xywh(box), _to_xywh(visible if label == scene_object.label else box)
    )


def _to_xywh(box_xyxy: NDArray[np.float64]) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (int(side) for side in box_xyxy)
    return x1, y1, x2 - x1, y2 - y1


def sample_objects(camera: Camera, lighting: Lighting, rng: np.random.Generator) -> list[SceneObject]:
    """Sample the persons and objects of a scene.

    Args:
        camera: Projection.
        lighting: Colors and brightness.
        rng: Random generator.

    Returns:
        Persons and objects, in no order.
    """
    objects = [*sample_scenery(camera, lighting, rng)]
    for _ in range(3 + rng.poisson(9)):
        x, z = sample_position(rng)
        objects.append(make_pedestrian(camera, lighting, sample_person(rng), x, z, sample_height_m(rng)))
    for label, probability in ((RIDER, 0.5), (SITTING, 0.3), (OTHER, 0.15), (IGNORE, 0.4), (GROUP, 0.35)):
        if rng.random() < probability:
            objects.append(sample_special_object(label, camera, lighting, rng))
    return objects
