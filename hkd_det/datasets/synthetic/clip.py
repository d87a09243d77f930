"""A short film of a drawn street: people walk, the rest stands still. For the demo; it has no annotations."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_det.datasets.synthetic import figure, scene, scenery
from hkd_det.datasets.synthetic.figure import Person
from hkd_det.datasets.synthetic.view import Camera
from hkd_det.errors import UnavailableError
from hkd_det.files import atomic_write

STEP_LENGTH_M = 0.75  # a step: half a turn of the walk's phase


@dataclass(frozen=True)
class Walker:
    """Somebody who starts at (x, z) metres and walks with a speed in metres a second along either."""

    person: Person
    x: float
    z: float
    speed_x: float
    speed_z: float
    height_m: float

    def to_scene_object(self, camera: Camera, lighting: scenery.Lighting, time_s: float) -> scene.SceneObject:
        """The walker at a moment."""
        speed = math.hypot(self.speed_x, self.speed_z)
        person = replace(self.person, phase=self.person.phase + math.pi * speed * time_s / STEP_LENGTH_M)
        x, z = self.x + self.speed_x * time_s, max(3.5, self.z + self.speed_z * time_s)
        return scene.make_pedestrian(camera, lighting, person, x, z, self.height_m)


def iterate_frames(seed: int, num_frames: int, fps: float, size_hw: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Frames (H, W, 3) uint8 RGB of one street by day."""
    chance = np.random.default_rng((seed, 2))
    view, light = Camera(size_hw), scenery.LIGHTINGS[0]
    walkers = [_sample_walker(chance) for _ in range(12)]
    for index in range(num_frames):
        # The same chance for every frame: houses, cars and trees stay what they are. Grain moves.
        standing = np.random.default_rng((seed, 3))
        still = [thing for thing in scene.sample_objects(view, light, standing) if thing.label is None]
        walking = [walker.to_scene_object(view, light, index / fps) for walker in walkers]
        yield scene.render_scene(view, light, still + walking, standing).image


def write_video(
    path: Path, seed: int = 0, num_frames: int = 100, fps: float = 12.5, size_hw: tuple[int, int] = (512, 1024)
) -> None:
    """Write the film as mp4, in one step."""
    with atomic_write(path) as aside:
        writer = cv2.VideoWriter(str(aside), cv2.VideoWriter.fourcc(*"mp4v"), fps, (size_hw[1], size_hw[0]))
        if not writer.isOpened():
            raise UnavailableError(
                f"{path}: this OpenCV writes no mp4v films; install opencv-python-headless from PyPI"
            )
        try:
            pictures = iterate_frames(seed, num_frames, fps, size_hw)
            for picture in tqdm(pictures, total=num_frames, desc="film the street", unit="frame"):
                writer.write(picture[:, :, ::-1])
        finally:
            writer.release()


def _sample_walker(rng: np.random.Generator) -> Walker:
    x, z = scene.sample_position(rng)
    along = rng.random() < 0.6
    pace = float(rng.uniform(0.9, 1.6))
    speed_x, speed_z = (0.0, -pace) if along else (-math.copysign(pace, x), 0.0)
    person = replace(
        figure.sample_person(rng),
        turn=0.15 if along else math.copysign(0.95, speed_x),
        back=False,
        stride=0.42,
    )
    return Walker(person, x, max(z, 7.0), speed_x, speed_z, scene.sample_height_m(rng))
