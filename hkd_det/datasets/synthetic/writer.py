"""A drawn street as a data set on disk, in CityPersons' layout."""

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
from tqdm import tqdm

from hkd_det.datasets.synthetic.annotations import Annotated, write_json, write_mat
from hkd_det.datasets.synthetic.scene import draw_street
from hkd_det.errors import DataError, UsageError
from hkd_det.files import replacing, write_text

VERSION = 1  # of the drawings: a set drawn by another version is not the same set
SPLITS = ("train", "val")
CITY = "hkdstadt"


@dataclass(frozen=True)
class StreetSet:
    """What decides every byte of a set; `street.json` holds it once all is written."""

    train: int
    val: int
    seed: int
    size_hw: tuple[int, int]
    version: int = VERSION


@dataclass(frozen=True)
class _Task:
    root: Path
    split: str
    index: int
    settings: StreetSet


def write_street(
    root: Path, train: int, val: int, seed: int = 0, size_hw: tuple[int, int] = (512, 1024), workers: int = 2
) -> None:
    """Write `train` and `val` pictures with their annotations under `root`; at once if they are there already.

    The same arguments give the same files, whatever the number of workers. Raises UsageError if `root`
    holds another set.
    """
    settings = StreetSet(train, val, seed, size_hw)
    mark = root / "street.json"
    if mark.exists():
        _check_same(mark, settings)
        return
    for split, count in zip(SPLITS, (train, val), strict=True):
        tasks = [_Task(root, split, index, settings) for index in range(count)]
        pictures = list(tqdm(_drawn(tasks, workers), total=count, desc=f"draw {split}", unit="picture"))
        write_mat(root / "annotations" / f"anno_{split}.mat", split, pictures)
    write_text(mark, json.dumps(asdict(settings)))


def _check_same(mark: Path, settings: StreetSet) -> None:
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{mark}: not readable ({error}); remove {mark.parent}") from None
    if found != json.loads(json.dumps(asdict(settings))):
        raise UsageError(f"{mark.parent} holds another street ({found}); remove it or choose another folder")


def _drawn(tasks: list[_Task], workers: int) -> Iterator[Annotated]:
    if workers < 2 or not tasks:
        yield from map(_draw, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_alone) as pool:
        yield from pool.imap(_draw, tasks, chunksize=4)


def _alone() -> None:
    cv2.setNumThreads(1)


def _draw(task: _Task) -> Annotated:
    settings = task.settings
    street = draw_street(settings.seed, SPLITS.index(task.split), task.index, settings.size_hw)
    stem = f"{CITY}_{task.index:06}_000019"
    picture = task.root / "leftImg8bit" / task.split / CITY / f"{stem}_leftImg8bit.png"
    with replacing(picture) as aside:
        # Grain does not compress: more effort would only cost time.
        encoded = cv2.imencode(".png", street.picture[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        aside.write_bytes(encoded.tobytes())
    tree = task.root / "gtBboxCityPersons" / task.split / CITY
    write_json(tree / f"{stem}_gtBboxCityPersons.json", settings.size_hw, street.records)
    return Annotated(CITY, stem, street.records)
