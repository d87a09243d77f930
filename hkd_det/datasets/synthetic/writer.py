"""Writers of synthetic data: CityPersons annotation files, complete datasets, and videos without annotations."""

import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import scipy.io
from numpy.typing import NDArray

from hkd_det.console import iterate_with_progress, log_stage
from hkd_det.datasets.synthetic.person import Person, sample_person
from hkd_det.datasets.synthetic.renderer import LIGHTINGS, Camera, Lighting
from hkd_det.datasets.synthetic.scene import (
    AnnotationRecord,
    SceneObject,
    generate_scene,
    make_pedestrian,
    render_scene,
    sample_height_m,
    sample_objects,
    sample_position,
)
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.files import atomic_write, write_text

DATASET_VERSION = 1  # increases when equal arguments give other images
SPLITS = ("train", "val")
CITY_NAME = "hkdstadt"
STEP_LENGTH_M = 0.75  # half a period of the walk
JSON_LABELS = ("ignore", "pedestrian", "rider", "sitting person", "person (other)", "person group")


@dataclass(frozen=True)
class ImageAnnotations:
    """Annotations of one image.

    Attributes:
        city: Directory of the image.
        stem: Start of the file names (CITY_000000_000000).
        records: Annotations.
    """

    city: str
    stem: str
    records: list[AnnotationRecord]


def write_citypersons_mat(path: Path, split: str, annotations: Sequence[ImageAnnotations]) -> None:
    """Write `anno_SPLIT.mat` in the form of the official files: a (1, N) cell array of (1, 1) structs.

    Args:
        path: Output file.
        split: train or val.
        annotations: Annotations of each image.
    """
    cells = np.empty((1, len(annotations)), object)
    for index, image in enumerate(annotations):
        rows = [[record.label, *record.box_xywh, record.instance_id, *record.visible_xywh] for record in image.records]
        struct = np.empty((1, 1), [("cityname", "O"), ("im_name", "O"), ("bbs", "O")])
        struct[0, 0] = (
            image.city,
            f"{image.stem}_leftImg8bit.png",
            np.array(rows, np.int16 if np.min(rows, initial=0) < 0 else np.uint16).reshape(-1, 10),
        )
        cells[0, index] = struct
    with atomic_write(path) as temp_path:
        scipy.io.savemat(temp_path, {f"anno_{split}_aligned": cells}, do_compression=True)


def write_citypersons_json(path: Path, size_hw: tuple[int, int], records: Sequence[AnnotationRecord]) -> None:
    """Write `*_gtBboxCityPersons.json` of one image.

    Args:
        path: Output file.
        size_hw: Height and width of the image in pixels.
        records: Annotations.
    """
    objects = [
        {
            "instanceId": record.instance_id,
            "bbox": list(record.box_xywh),
            "bboxVis": list(record.visible_xywh),
            "label": JSON_LABELS[record.label],
        }
        for record in records
    ]
    write_text(path, json.dumps({"imgHeight": size_hw[0], "imgWidth": size_hw[1], "objects": objects}, indent=1))


@dataclass(frozen=True)
class SyntheticDatasetConfig:
    """Arguments that determine a dataset; written to `dataset.json` when the dataset is complete.

    Attributes:
        num_train: Number of training images.
        num_val: Number of validation images.
        seed: Seed of the scenes.
        size_hw: Height and width of the images in pixels.
        version: `DATASET_VERSION`.
    """

    num_train: int
    num_val: int
    seed: int
    size_hw: tuple[int, int]
    version: int = DATASET_VERSION


@dataclass(frozen=True)
class _RenderTask:
    root: Path
    split: str
    index: int
    config: SyntheticDatasetConfig


def write_synthetic_dataset(
    root: Path,
    num_train: int,
    num_val: int,
    seed: int = 0,
    size_hw: tuple[int, int] = (512, 1024),
    num_workers: int = 2,
) -> None:
    """Write a dataset in the CityPersons layout, unless it exists already.

    Equal arguments give equal files for any number of workers.

    Args:
        root: Output directory.
        num_train: Number of training images.
        num_val: Number of validation images.
        seed: Seed of the scenes.
        size_hw: Height and width of the images in pixels.
        num_workers: Number of processes.

    Raises:
        UsageError: The directory contains a dataset with other arguments.
        DataError: `dataset.json` is damaged.
    """
    config = SyntheticDatasetConfig(num_train, num_val, seed, size_hw)
    config_path = root / "dataset.json"
    if config_path.exists():
        _check_existing_dataset(config_path, config)
        return
    for split, count in zip(SPLITS, (num_train, num_val), strict=True):
        tasks = [_RenderTask(root, split, index, config) for index in range(count)]
        log_stage(f"render {count} images of {split}")
        images = iterate_with_progress(_render_images(tasks, num_workers), count, f"render {split}", "image")
        write_citypersons_mat(root / "annotations" / f"anno_{split}.mat", split, list(images))
    write_text(config_path, json.dumps(asdict(config)))


def _check_existing_dataset(config_path: Path, config: SyntheticDatasetConfig) -> None:
    try:
        existing = json.loads(config_path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{config_path}: not readable ({error}). Remove {config_path.parent}.") from None
    if existing != json.loads(json.dumps(asdict(config))):
        raise UsageError(
            f"{config_path.parent}: contains another dataset ({existing}). Remove it or select another directory."
        )


def _render_images(tasks: list[_RenderTask], num_workers: int) -> Iterator[ImageAnnotations]:
    if num_workers < 2 or not tasks:
        yield from map(_render_image, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(num_workers, initializer=_disable_opencv_threads) as pool:
        yield from pool.imap(_render_image, tasks, chunksize=4)


def _disable_opencv_threads() -> None:
    cv2.setNumThreads(1)


def _render_image(task: _RenderTask) -> ImageAnnotations:
    config = task.config
    scene_image = generate_scene(config.seed, SPLITS.index(task.split), task.index, config.size_hw)
    stem = f"{CITY_NAME}_{task.index:06}_000019"
    image_path = task.root / "leftImg8bit" / task.split / CITY_NAME / f"{stem}_leftImg8bit.png"
    with atomic_write(image_path) as temp_path:
        # Noise does not compress: a higher level would only cost time.
        encoded = cv2.imencode(".png", scene_image.image[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        temp_path.write_bytes(encoded.tobytes())
    json_dir = task.root / "gtBboxCityPersons" / task.split / CITY_NAME
    write_citypersons_json(json_dir / f"{stem}_gtBboxCityPersons.json", config.size_hw, scene_image.records)
    return ImageAnnotations(CITY_NAME, stem, scene_image.records)


@dataclass(frozen=True)
class Walker:
    """A person that walks in a straight line.

    Attributes:
        person: Appearance.
        x, z: Start position in meters.
        speed_x, speed_z: Speed in meters per second.
        height_m: Body height in meters.
    """

    person: Person
    x: float
    z: float
    speed_x: float
    speed_z: float
    height_m: float

    def to_scene_object(self, camera: Camera, lighting: Lighting, time_s: float) -> SceneObject:
        """Return the scene object at a time in seconds.

        Args:
            camera: Projection.
            lighting: Colors and brightness.
            time_s: Time since the start of the video.
        """
        speed = math.hypot(self.speed_x, self.speed_z)
        person = replace(self.person, phase=self.person.phase + math.pi * speed * time_s / STEP_LENGTH_M)
        x, z = self.x + self.speed_x * time_s, max(3.5, self.z + self.speed_z * time_s)
        return make_pedestrian(camera, lighting, person, x, z, self.height_m)


def iterate_frames(seed: int, num_frames: int, fps: float, size_hw: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of one scene by day: persons walk, all other objects are static.

    Args:
        seed: Seed of the scene.
        num_frames: Number of frames.
        fps: Frames per second.
        size_hw: Height and width in pixels.

    Yields:
        frame (uint8 array[H, W, 3]): RGB.
    """
    camera, lighting = Camera(size_hw), LIGHTINGS[0]
    rng = np.random.default_rng((seed, 2))
    walkers = [_sample_walker(rng) for _ in range(12)]
    for index in range(num_frames):
        # The same seed in every frame keeps houses, cars and trees unchanged.
        static_rng = np.random.default_rng((seed, 3))
        static = [one for one in sample_objects(camera, lighting, static_rng) if one.label is None]
        moving = [walker.to_scene_object(camera, lighting, index / fps) for walker in walkers]
        yield render_scene(camera, lighting, static + moving, static_rng).image


def write_video(
    path: Path, seed: int = 0, num_frames: int = 100, fps: float = 12.5, size_hw: tuple[int, int] = (512, 1024)
) -> None:
    """Write a video (mp4) of walking persons; the file is replaced atomically.

    Args:
        path: Output file.
        seed: Seed of the scene.
        num_frames: Number of frames.
        fps: Frames per second.
        size_hw: Height and width in pixels.

    Raises:
        UnavailableError: OpenCV cannot encode mp4v.
    """
    with atomic_write(path) as temp_path:
        writer = cv2.VideoWriter(str(temp_path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (size_hw[1], size_hw[0]))
        if not writer.isOpened():
            raise UnavailableError(f"{path}: OpenCV cannot encode mp4v. Install opencv-python-headless from PyPI.")
        try:
            frames = iterate_frames(seed, num_frames, fps, size_hw)
            log_stage(f"render {path.name}, {num_frames} frames")
            for frame in iterate_with_progress(frames, num_frames, "render video", "frame"):
                writer.write(frame[:, :, ::-1])
        finally:
            writer.release()


def _sample_walker(rng: np.random.Generator) -> Walker:
    x, z = sample_position(rng)
    is_along_road = rng.random() < 0.6
    speed = float(rng.uniform(0.9, 1.6))
    speed_x, speed_z = (0.0, -speed) if is_along_road else (-math.copysign(speed, x), 0.0)
    person = replace(
        sample_person(rng),
        facing=0.15 if is_along_road else math.copysign(0.95, speed_x),
        is_facing_away=False,
        stride=0.42,
    )
    return Walker(person, x, max(z, 7.0), speed_x, speed_z, sample_height_m(rng))
