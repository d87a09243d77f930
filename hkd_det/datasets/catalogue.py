"""`open_data`: from a name in datasets.yaml, or the user's own data yaml, to samples.

The yaml has Ultralytics' keys (`path, train, val, test, names`) and a few more:
  format        yolo (default), coco, citypersons
  category      the person class, where its name does not say so
  present_only  citypersons: take only the pictures that are on disk
A yolo split is a folder of pictures or a text file that lists them; a coco split is
`{images: FOLDER, annotations: FILE}`, or a list of those; a citypersons split is its name, train or val.
"""

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hkd_det.datasets.citypersons import read_citypersons
from hkd_det.datasets.coco import read_coco
from hkd_det.datasets.sample import Sample
from hkd_det.datasets.yolo import read_yolo
from hkd_det.errors import DataError, UsageError

SPLITS = ("train", "val", "test")
KEYS = {"format", "path", *SPLITS, "names", "nc", "category", "present_only", "download"}
ABOUT_KEYS = {"page", "terms", "layout"}  # datasets.yaml only: what a user has to know to get it
FORMATS = ("yolo", "coco", "citypersons")
HOME = Path("datasets")  # where the named data sets lie, under the working directory


def open_data(data: str, split: str) -> list[Sample]:
    """The samples of a split (train, val or test) of a data set, never empty.

    data: a name in datasets.yaml, or the path of a yaml file. Raises UsageError for a name or key that does
    not exist, DataError for what is wrong on disk.
    """
    if data.endswith((".yaml", ".yml")):
        path = Path(data)
        entry = _checked(_load_yaml(path), path, KEYS)
        root = path.parent / str(entry.get("path", "."))
        return _samples(entry, root, split, str(path))
    catalogue_path = catalogue_file()
    catalogue = _load_yaml(catalogue_path)
    if data not in catalogue:
        raise UsageError(f"--data {data}: not in datasets.yaml ({', '.join(catalogue)}), and no path to a .yaml file")
    entry = _checked(catalogue[data], catalogue_path, KEYS | ABOUT_KEYS)
    root = HOME / str(entry.get("path", data))
    if not root.is_dir():
        raise DataError(
            f"--data {data}: {root.resolve()} is not there; get it from {entry.get('page')} "
            f"({entry.get('terms')}) and unpack it as {entry.get('layout')}"
        )
    return _samples(entry, root, split, data)


def catalogue_file() -> Path:
    """datasets.yaml: inside the installed package, or at the root of a checkout."""
    here = Path(__file__).parent
    packaged = here / "datasets.yaml"
    return packaged if packaged.exists() else here.parents[1] / "datasets.yaml"


def _samples(entry: dict[str, Any], root: Path, split: str, name: str) -> list[Sample]:
    if split not in entry or entry[split] is None:
        there = [known for known in SPLITS if entry.get(known) is not None]
        raise UsageError(f"{name}: has no split {split!r}, only {', '.join(there) or 'none'}")
    match entry.get("format", "yolo"):
        case "citypersons":
            samples = read_citypersons(root, str(entry[split]), bool(entry.get("present_only", False)))
        case "coco":
            samples = _coco(entry, root, split, name)
        case "yolo":
            samples = read_yolo(root / str(entry[split]), _names(entry, name), str(entry.get("category", "")))
        case other:
            raise UsageError(f"{name}: format {other!r} is none of {', '.join(FORMATS)}")
    if not samples:
        raise DataError(f"{name}: split {split} holds no pictures")
    return samples


def _coco(entry: dict[str, Any], root: Path, split: str, name: str) -> list[Sample]:
    sources = entry[split] if isinstance(entry[split], list) else [entry[split]]
    samples: list[Sample] = []
    for number, source in enumerate(sources):
        if not isinstance(source, dict) or set(source) != {"images", "annotations"}:
            raise UsageError(f"{name}: split {split} must be {{images: FOLDER, annotations: FILE}}, or a list of those")
        annotations, images = root / str(source["annotations"]), root / str(source["images"])
        read = read_coco(annotations, images, str(entry.get("category", "")))
        # Two files may number their pictures alike.
        samples += read if len(sources) == 1 else [replace(one, image_id=f"{number}/{one.image_id}") for one in read]
    return samples


def _names(entry: dict[str, Any], name: str) -> dict[int, str]:
    names = entry.get("names")
    if isinstance(names, list) and names:
        return {number: str(value) for number, value in enumerate(names)}
    if isinstance(names, dict) and names and all(isinstance(number, int) for number in names):
        return {number: str(value) for number, value in names.items()}
    raise UsageError(f"{name}: a yolo data set needs `names`, a list or number: name pairs")


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such data yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not YAML ({reason})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected `key: value` lines such as path, train, val")
    return content


def _checked(entry: Any, path: Path, keys: set[str]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(f"{path}: expected `key: value` lines such as path, train, val")
    for key in entry:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, 1)
            raise UsageError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return entry
