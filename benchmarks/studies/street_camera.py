"""Sequences of one fixed camera on a drawn street, with exact ground truth.

Houses, cars and trees never change. The light changes from sun to overcast and dusk, minutes without people and crowded
minutes alternate, and people walk along the sidewalks or cross the road. Frames are encoded as H.264, as by a camera.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.synthetic.person import sample_person
from hkd_det.datasets.synthetic.renderer import LIGHTINGS, Camera, Lighting, Point
from hkd_det.datasets.synthetic.scene import (
    PEDESTRIAN,
    AnnotationRecord,
    SceneObject,
    render_scene,
    sample_height_m,
    sample_scenery,
)
from hkd_det.datasets.synthetic.writer import Walker
from hkd_det.files import write_text

SIZE_HW = (360, 640)
SCENERY_SEED = 3
LIGHT_PATH = (0, 1, 0, 1, 2)  # indices of LIGHTINGS over the sequence
ARRIVALS_PER_MINUTE, ARRIVAL_PROBABILITIES = (0, 4, 24), (0.3, 0.4, 0.3)  # sampled for each minute
NOISE_LEVELS = 2.0  # standard deviation of the noise that changes from frame to frame, gray levels
NEAR_M, FAR_M, SIDE_M = 4.5, 20.0, 8.4
MIN_INSIDE_RATIO = 0.5
MIN_SPEED, MAX_SPEED = 0.9, 1.6  # meters per second


class StreetCamera(Camera):
    """A camera on a lamp post, 3.2 m above the road."""

    @property
    def horizon_px(self) -> float:
        """Row of the horizon."""
        return 0.2 * self.size_hw[0]

    def project(self, x: float, z: float, height_m: float = 0.0) -> Point:
        """Return the pixel of a point, see `Camera.project`.

        Args:
            x: Horizontal offset from the optical axis, meters.
            z: Distance from the camera, meters.
            height_m: Height above the road.
        """
        scale = self.pixels_per_meter(z)
        return self.size_hw[1] / 2 + x * scale, self.horizon_px + (3.2 - height_m) * scale


@dataclass(frozen=True)
class Visit:
    """A person who walks through the scene.

    Attributes:
        walker: Appearance, start position and velocity.
        start_s, end_s: Time at which the person enters and leaves.
    """

    walker: Walker
    start_s: float
    end_s: float

    def to_scene_object(self, camera: Camera, lighting: Lighting, time_s: float) -> SceneObject:
        """Return the person at a time, see `Walker.to_scene_object`.

        Args:
            camera: Projection.
            lighting: Colors and brightness.
            time_s: Time of the sequence, seconds.
        """
        return self.walker.to_scene_object(camera, lighting, time_s - self.start_s)


def sample_visits(duration_s: float, rng: np.random.Generator) -> list[Visit]:
    """Sample the people of a sequence.

    Args:
        duration_s: Length of the sequence, seconds.
        rng: Random generator.

    Returns:
        Visits by start time.
    """
    visits = []
    for minute in range(-1, math.ceil(duration_s / 60)):  # the scene is not empty at the start
        count = rng.poisson(rng.choice(ARRIVALS_PER_MINUTE, p=ARRIVAL_PROBABILITIES))
        visits += [_sample_visit(60.0 * (minute + time), rng) for time in np.sort(rng.random(count))]
    return visits


def _sample_visit(start_s: float, rng: np.random.Generator) -> Visit:
    speed, direction = float(rng.uniform(MIN_SPEED, MAX_SPEED)), int(rng.choice([-1, 1]))
    if rng.random() < 0.6:  # along the street
        x = float(rng.choice([-1, 1]) * rng.uniform(4.9, 7.8))
        z, length_m, velocity = (FAR_M if direction < 0 else NEAR_M), FAR_M - NEAR_M, (0.0, direction * speed)
    else:
        z = float(np.exp(rng.uniform(math.log(NEAR_M), math.log(FAR_M))))
        x, length_m, velocity = -direction * SIDE_M, 2 * SIDE_M, (direction * speed, 0.0)
    person = replace(
        sample_person(rng),
        facing=0.95 * direction if velocity[0] else 0.15,
        is_facing_away=velocity[1] > 0,
        stride=0.42,
    )
    walker = Walker(person, x, z, *velocity, sample_height_m(rng))
    return Visit(walker, start_s, start_s + length_m / speed)


def compute_lighting(progress: float) -> Lighting:
    """Return the light at a point of the sequence.

    Args:
        progress: Elapsed part of the sequence, 0 to 1.
    """
    position = progress * (len(LIGHT_PATH) - 1)
    index = min(int(position), len(LIGHT_PATH) - 2)
    ratio = position - index
    start, end = (LIGHTINGS[number] for number in LIGHT_PATH[index : index + 2])

    def mix(a: float, b: float) -> float:
        return (1 - ratio) * a + ratio * b

    def mix_colors(a: tuple[float, ...], b: tuple[float, ...]) -> Any:
        return tuple(mix(*pair) for pair in zip(a, b, strict=True))

    return Lighting(
        "mixed",
        mix_colors(start.sky_top, end.sky_top),
        mix_colors(start.sky_horizon, end.sky_horizon),
        mix(start.brightness, end.brightness),
        mix(start.haze_distance_m, end.haze_distance_m),
        start.lit_window_ratio,  # windows must not flicker
        mix(start.shadow_brightness, end.shadow_brightness),
    )


def iterate_frames(
    num_frames: int, interval_s: float, seed: int
) -> Iterator[tuple[NDArray[np.uint8], list[AnnotationRecord]]]:
    """Render a sequence.

    Args:
        num_frames: Number of frames.
        interval_s: Time between two frames, seconds.
        seed: Seed of people and noise. The scene is always the same.

    Yields:
        image (uint8[H, W, 3]): RGB.
        records: Annotations.
    """
    rng, camera = np.random.default_rng((seed, 1)), StreetCamera(SIZE_HW)
    visits = sample_visits(num_frames * interval_s, rng)
    for index in range(num_frames):
        time_s, lighting = index * interval_s, compute_lighting(index / num_frames)
        scene_rng = np.random.default_rng(SCENERY_SEED)
        objects = sample_scenery(camera, lighting, scene_rng)
        present = [visit for visit in visits if visit.start_s <= time_s < visit.end_s]
        objects += [visit.to_scene_object(camera, lighting, time_s) for visit in present]
        rendered = render_scene(camera, lighting, objects, scene_rng)
        noise = rng.normal(0, NOISE_LEVELS, (*SIZE_HW, 1)).astype(np.float32)
        yield np.clip(rendered.image + noise, 0, 255).astype(np.uint8), rendered.records


def write_sequence(
    video: Path, annotations: Path, images: Path | None, num_frames: int, interval_s: float, seed: int
) -> None:
    """Write a sequence as a video with COCO annotations.

    Args:
        video: MP4 file.
        annotations: COCO file.
        images: Directory of the decoded frames as PNG, or None.
        num_frames: Number of frames.
        interval_s: Time between two frames, seconds.
        seed: Seed of people and noise.
    """
    all_records = []
    with av.open(str(video), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(1 / interval_s).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *SIZE_HW, "yuv420p"
        stream.options = {"crf": "23", "preset": "veryfast"}
        for image, records in iterate_frames(num_frames, interval_s, seed):
            all_records.append(records)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    if images:
        images.mkdir(parents=True, exist_ok=True)
        with av.open(str(video)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                cv2.imwrite(str(images / f"{index:05}.png"), frame.to_ndarray(format="bgr24"))
    write_text(annotations, json.dumps(make_coco(all_records)))


def make_coco(all_records: list[list[AnnotationRecord]]) -> dict[str, Any]:
    """Return the annotations of a sequence in the COCO format.

    Boxes are clipped to the image. People of whom less than half is inside are ignore regions.

    Args:
        all_records: Annotations of each frame.
    """
    height, width = SIZE_HW
    images, annotations = [], []
    for index, records in enumerate(all_records):
        images.append({"id": index + 1, "file_name": f"{index:05}.png", "height": height, "width": width})
        for record in records:
            box_xywh, inside_ratio = _clip_xywh(record.box_xywh)
            visible_xywh, visible_ratio = _clip_xywh(record.visible_xywh)
            if not (inside_ratio and visible_ratio):
                continue
            is_ignored = int(record.label != PEDESTRIAN or inside_ratio < MIN_INSIDE_RATIO)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": 1,
                    "bbox": box_xywh,
                    "vis_bbox": visible_xywh,
                    "area": box_xywh[2] * box_xywh[3],
                    "iscrowd": is_ignored,
                    "ignore": is_ignored,
                }
            )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def _clip_xywh(box_xywh: tuple[int, int, int, int]) -> tuple[list[int], float]:
    """Return the part of a box inside the image, and its ratio of the area."""
    x, y, width, height = box_xywh
    left, right = np.clip([x, x + width], 0, SIZE_HW[1]).tolist()
    top, bottom = np.clip([y, y + height], 0, SIZE_HW[0]).tolist()
    clipped = [left, top, right - left, bottom - top]
    return clipped, clipped[2] * clipped[3] / max(1, width * height)
