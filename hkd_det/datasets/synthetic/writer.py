"""CityPersons' own files: `anno_*.mat` and the gtBboxCityPersons JSON tree.

A drawn street as a data set on disk, in CityPersons' layout.

A short film of a drawn street: people walk, the rest stands still. For the demo; it has no annotations.
"""

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
from tqdm import tqdm

from hkd_det.datasets.synthetic import person as figure
from hkd_det.datasets.synthetic import scene, scenery
from hkd_det.datasets.synthetic.person import Person
from hkd_det.datasets.synthetic.renderer import Camera
from hkd_det.datasets.synthetic.scene import AnnotationRecord, generate_scene
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.files import atomic_write, write_text

JSON_LABELS = ("ignore", "pedestrian", "rider", "sitting person", "person (other)", "person group")


@dataclass(frozen=True)
class ImageAnnotations:
    """One picture's place in the tree, `city` and file stem (CITY_000000_000000), and its records."""

    city: str
    stem: str
    records: list[AnnotationRecord]


def write_citypersons_mat(path: Path, split: str, annotations: Sequence[ImageAnnotations]) -> None:
    """`anno_train.mat` or `anno_val.mat`, nested as the official ones: a (1, N) cell of (1, 1) structs."""
    cells = np.empty((1, len(annotations)), object)
    for index, picture in enumerate(annotations):
        rows = [
            [record.label, *record.box_xywh, record.instance_id, *record.visible_xywh] for record in picture.records
        ]
        struct = np.empty((1, 1), [("cityname", "O"), ("im_name", "O"), ("bbs", "O")])
        struct[0, 0] = (
            picture.city,
            f"{picture.stem}_leftImg8bit.png",
            np.array(rows, np.int16 if np.min(rows, initial=0) < 0 else np.uint16).reshape(-1, 10),
        )
        cells[0, index] = struct
    with atomic_write(path) as aside:
        scipy.io.savemat(aside, {f"anno_{split}_aligned": cells}, do_compression=True)


def write_citypersons_json(path: Path, size_hw: tuple[int, int], records: Sequence[AnnotationRecord]) -> None:
    """`*_gtBboxCityPersons.json` of one picture."""
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


DATASET_VERSION = 1  # of the drawings: a set drawn by another version is not the same set


SPLITS = ("train", "val")


CITY_NAME = "hkdstadt"


@dataclass(frozen=True)
class SyntheticDatasetConfig:
    """What decides every byte of a set; `street.json` holds it once all is written."""

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
    """Write `train` and `val` pictures with their annotations under `root`; at once if they are there already.

    The same arguments give the same files, whatever the number of workers. Raises UsageError if `root`
    holds another set.
    """
    settings = SyntheticDatasetConfig(num_train, num_val, seed, size_hw)
    mark = root / "street.json"
    if mark.exists():
        _check_existing_dataset(mark, settings)
        return
    for split, count in zip(SPLITS, (num_train, num_val), strict=True):
        tasks = [_RenderTask(root, split, index, settings) for index in range(count)]
        pictures = list(tqdm(_render_images(tasks, num_workers), total=count, desc=f"draw {split}", unit="picture"))
        write_citypersons_mat(root / "annotations" / f"anno_{split}.mat", split, pictures)
    write_text(mark, json.dumps(asdict(settings)))


def _check_existing_dataset(config_path: Path, config: SyntheticDatasetConfig) -> None:
    try:
        found = json.loads(config_path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{config_path}: not readable ({error}); remove {config_path.parent}") from None
    if found != json.loads(json.dumps(asdict(config))):
        raise UsageError(f"{config_path.parent} holds another street ({found}); remove it or choose another folder")


def _render_images(tasks: list[_RenderTask], num_workers: int) -> Iterator[ImageAnnotations]:
    if num_workers < 2 or not tasks:
        yield from map(_render_image, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(num_workers, initializer=_disable_opencv_threads) as pool:
        yield from pool.imap(_render_image, tasks, chunksize=4)


def _disable_opencv_threads() -> None:
    cv2.setNumThreads(1)


def _render_image(task: _RenderTask) -> ImageAnnotations:
    settings = task.config
    street = generate_scene(settings.seed, SPLITS.index(task.split), task.index, settings.size_hw)
    stem = f"{CITY_NAME}_{task.index:06}_000019"
    picture = task.root / "leftImg8bit" / task.split / CITY_NAME / f"{stem}_leftImg8bit.png"
    with atomic_write(picture) as aside:
        # Grain does not compress: more effort would only cost time.
        encoded = cv2.imencode(".png", street.image[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        aside.write_bytes(encoded.tobytes())
    tree = task.root / "gtBboxCityPersons" / task.split / CITY_NAME
    write_citypersons_json(tree / f"{stem}_gtBboxCityPersons.json", settings.size_hw, street.records)
    return ImageAnnotations(CITY_NAME, stem, street.records)


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
        facing=0.15 if along else math.copysign(0.95, speed_x),
        is_facing_away=False,
        stride=0.42,
    )
    return Walker(person, x, max(z, 7.0), speed_x, speed_z, scene.sample_height_m(rng))
