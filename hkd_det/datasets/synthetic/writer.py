"""A drawn street as a data set on disk, in CityPersons' layout."""

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
from tqdm import tqdm

from hkd_det.datasets.synthetic.annotations import ImageAnnotations, write_citypersons_json, write_citypersons_mat
from hkd_det.datasets.synthetic.scene import generate_scene
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write, write_text

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
