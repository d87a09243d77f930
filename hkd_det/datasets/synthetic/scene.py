"""Synthetic scenes: sampling of persons and objects, rendering from far to near, and annotations from the pixels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.synthetic import scenery
from hkd_det.datasets.synthetic.objects import (
    GROUP,
    IGNORE,
    OTHER,
    RIDER,
    SITTING,
    SceneObject,
    make_pedestrian,
    sample_height_m,
    sample_position,
    sample_scenery,
    sample_special_object,
)
from hkd_det.datasets.synthetic.person import (
    sample_person,
)
from hkd_det.datasets.synthetic.renderer import (
    BACKGROUND_ID,
    LIGHTINGS,
    Camera,
    Canvas,
    Lighting,
    add_sensor_noise,
    compute_haze,
)

PERSON_ASPECT_RATIO = 0.41  # width / height of every person box
MIN_VISIBLE_RATIO = 0.05  # boxes that are less visible become ignore regions


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
