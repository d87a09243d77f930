"""`open_data`: from a name in datasets.yaml, or the user's own data yaml, to samples.

The yaml has Ultralytics' keys (`path, train, val, test, names`) and a few more:
  format        yolo (default), coco, citypersons, caltech, voc, inria, pennfudan, crowdhuman, eurocity
  category      yolo, coco, voc: the person class, where its name does not say so
  skip_missing  all but yolo: take only the pictures that are on disk
  time          eurocity: day (default) or night
  annotations   caltech: old (default) or new
  every         caltech: of the training sets, every 30th frame (default), or 3 for ten times as many
  terms         what its owners allow, in words: it goes with the weights into exported files
A yolo split is a folder of pictures or a text file that lists them, a coco split is
`{images: FOLDER, annotations: FILE}`; of both there may be a list. A caltech split is its sets, such as set00-set05;
of the other formats it is the name that the split has in their files, such as train, val or Train.
"""

import difflib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hkd_det.datasets.base import ErrorHandler, filter_missing_images, raise_error
from hkd_det.datasets.caltech import ORIGINAL, TEST_FRAME_STEP, read_caltech
from hkd_det.datasets.citypersons import read_citypersons
from hkd_det.datasets.coco import read_coco
from hkd_det.datasets.crowdhuman import read_crowdhuman
from hkd_det.datasets.eurocity import TIMES_OF_DAY, read_eurocity
from hkd_det.datasets.inria import read_inria, read_pennfudan
from hkd_det.datasets.voc import read_voc
from hkd_det.datasets.yolo import read_yolo
from hkd_det.errors import DataError, UsageError
from hkd_det.structures import Sample

SPLITS = ("train", "val", "test")


YAML_SUFFIXES = (".yaml", ".yml")


# `nc`, `download` and, for other formats than yolo, `names` stand in Ultralytics' files and say nothing new here.
COMMON_KEYS = {"format", "path", *SPLITS, "names", "nc", "download", "license"}


FORMAT_KEYS = {
    "yolo": {"category"},
    "coco": {"category", "skip_missing"},
    "citypersons": {"skip_missing"},
    "caltech": {"annotations", "frame_step", "skip_missing"},
    "voc": {"category", "skip_missing"},
    "inria": {"skip_missing"},
    "pennfudan": {"skip_missing"},
    "crowdhuman": {"skip_missing"},
    "eurocity": {"time", "skip_missing"},
}


CATALOG_KEYS = {"homepage", "directory_layout"}  # datasets.yaml only: what a user has to know to get it


DATASETS_DIR = Path("datasets")  # where the named data sets lie, under the working directory


def load_dataset(data: str, split: str, on_error: ErrorHandler = raise_error) -> list[Sample]:
    """The samples of a split (train, val or test) of a data set, never empty.

    data: a name in datasets.yaml, or the path of a yaml file. on_fault: what to do with a faulty record; by default it
    is raised. Raises UsageError for a name or key that does
    not exist, DataError for what is wrong on disk.
    """
    entry = _load_entry(data)
    if data.endswith(YAML_SUFFIXES):
        path = Path(data)
        return _read_split(entry, path.parent / entry.get("path", "."), split, str(path), on_error)
    root = DATASETS_DIR / entry.get("path", data)
    if not root.is_dir():
        there = f"--data {data}: {root.resolve()} is not there"
        if "download" in entry:
            raise DataError(f"{there}; `hkd-train --data {data} --download` fetches it")
        raise DataError(
            f"{there}; get it from {entry.get('homepage')} ({entry.get('license')}) and unpack it as {entry.get('directory_layout')}"
        )
    return _read_split(entry, root, split, data, on_error)


def list_splits(data: str) -> list[str]:
    """Which of train, val and test a data set has; raises as `open_data` does."""
    entry = _load_entry(data)
    return [split for split in SPLITS if entry.get(split) is not None]


def dataset_license(data: str) -> str:
    """What the owners of a data set allow, in words: its `terms`, "" where it has none.

    Raises as `open_data` does for a name or yaml that is not there; the data itself need not be.
    """
    terms: str = _load_entry(data).get("license", "")
    return terms


def _load_entry(data: str) -> dict[str, Any]:
    return (
        _validate_entry(_load_yaml(Path(data)), data, set())
        if data.endswith(YAML_SUFFIXES)
        else load_catalog_entry(data)
    )


def load_catalog_entry(data: str) -> dict[str, Any]:
    """What datasets.yaml says of a data set; UsageError for a name that is not there."""
    catalogue = _load_yaml(find_catalog_file())
    if data not in catalogue:
        raise UsageError(
            f"--data {data}: not in datasets.yaml ({', '.join(catalogue)}){_format_suggestion(data, catalogue)}, "
            "and no path to a .yaml file"
        )
    return _validate_entry(catalogue[data], f"{find_catalog_file()}: {data}", CATALOG_KEYS)


def find_catalog_file() -> Path:
    """datasets.yaml: inside the installed package, or at the root of a checkout."""
    here = Path(__file__).parent
    packaged = here / "datasets.yaml"
    return packaged if packaged.exists() else here.parents[1] / "datasets.yaml"


def _read_split(entry: dict[str, Any], root: Path, split: str, name: str, on_error: ErrorHandler) -> list[Sample]:
    if split not in SPLITS or entry.get(split) is None:
        there = [known for known in SPLITS if entry.get(known) is not None]
        raise UsageError(f"{name}: has no split {split!r}, only {', '.join(there) or 'none'}")
    source, category = entry[split], entry.get("category", "")
    skip_missing = entry.get("skip_missing", False)
    match entry.get("format", "yolo"):
        case "coco":
            read = (_read_coco_split(one, root, split, category, name, on_error) for one in _ensure_list(source))
            samples = filter_missing_images(_merge_samples(read), skip_missing, name, on_error)
        case "yolo":
            names = _parse_class_names(entry, name)
            read = (
                read_yolo(root / _check_str(one, split, name), names, category, on_error)
                for one in _ensure_list(source)
            )
            samples = _merge_samples(read)
        case form:
            samples = _read_named_format(form, entry, root, _check_str(source, split, name), name, on_error)
    if not samples:
        raise DataError(f"{name}: split {split} holds no pictures")
    return samples


def _read_named_format(
    format_name: str, entry: dict[str, Any], root: Path, source: str, name: str, on_error: ErrorHandler
) -> list[Sample]:
    """The formats that are one public set's own, and VOC: a split is a word."""
    skip_missing = entry.get("skip_missing", False)
    match format_name:
        case "citypersons":
            samples = read_citypersons(root, source, skip_missing, on_error)
        case "caltech":
            annotations, every = entry.get("annotations", ORIGINAL), entry.get("frame_step", TEST_FRAME_STEP)
            samples = read_caltech(root, source, annotations, every, skip_missing, on_error)
        case "voc":
            samples = read_voc(root, source, entry.get("category", ""), on_error)
            samples = filter_missing_images(samples, skip_missing, name, on_error)
        case "inria":
            samples = read_inria(root, source, skip_missing, on_error)
        case "pennfudan":
            samples = read_pennfudan(root, source, skip_missing, on_error)
        case "crowdhuman":
            samples = read_crowdhuman(root, source, skip_missing, on_error)
        case _:
            samples = read_eurocity(root, source, entry.get("time", TIMES_OF_DAY[0]), skip_missing, on_error)
    return samples


def _ensure_list(source: Any) -> list[Any]:
    return source if isinstance(source, list) else [source]


def _merge_samples(parts: Iterable[list[Sample]]) -> list[Sample]:
    """All samples; where there are several parts their ids begin with the part's number: two may count alike."""
    lists = list(parts)
    if len(lists) == 1:
        return lists[0]
    return [replace(one, image_id=f"{number}/{one.image_id}") for number, part in enumerate(lists) for one in part]


def _read_coco_split(
    source: Any, root: Path, split: str, category: str, name: str, on_error: ErrorHandler
) -> list[Sample]:
    if not isinstance(source, dict) or set(source) != {"images", "annotations"}:
        raise UsageError(f"{name}: split {split} must be {{images: FOLDER, annotations: FILE}}, or a list of those")
    images, annotations = (root / _check_str(source[key], split, name) for key in ("images", "annotations"))
    return read_coco(annotations, images, category, on_error)


def _check_str(value: Any, split: str, name: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name}: split {split}: {value!r} must be a text")
    return value


def _parse_class_names(entry: dict[str, Any], name: str) -> dict[int, str]:
    names = entry.get("names")
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(numbered, dict) or not numbered or not all(type(number) is int for number in numbered):
        raise UsageError(f"{name}: a yolo data set needs `names`, a list or number: name pairs")
    return {number: str(value) for number, value in numbered.items()}


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such data yaml") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, expected a data yaml") from None
    except RecursionError:
        raise DataError(f"{path}: not a data yaml: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date or number that is none
        raise DataError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected `key: value` lines such as path, train, val")
    return content


def _validate_entry(entry: Any, name: str, extra_keys: set[str]) -> dict[str, Any]:
    """The entry, if its keys are known to its format and hold what they should."""
    if not isinstance(entry, dict):
        raise DataError(f"{name}: expected `key: value` lines such as path, train, val")
    form = entry.get("format", "yolo")
    if not isinstance(form, str) or form not in FORMAT_KEYS:
        raise UsageError(f"{name}: format {form!r} is none of {', '.join(FORMAT_KEYS)}")
    keys = COMMON_KEYS | FORMAT_KEYS[form] | extra_keys
    for key in entry:
        if key not in keys:
            raise UsageError(f"{name}: unknown key {key!r} for format {form}{_format_suggestion(str(key), keys)}")
    _check_type(entry, "path", str, "a folder", name)
    _check_type(entry, "category", str, "a name", name)
    _check_type(entry, "license", str, "words", name)
    _check_type(entry, "skip_missing", bool, "true or false", name)
    _check_type(entry, "annotations", str, "original or corrected", name)
    _check_type(entry, "frame_step", int, "a whole number", name)
    if entry.get("time", TIMES_OF_DAY[0]) not in TIMES_OF_DAY:
        raise UsageError(f"{name}: time: {entry['time']!r} must be {' or '.join(TIMES_OF_DAY)}")
    return entry


def _check_type(entry: dict[str, Any], key: str, cls: type, meaning: str, name: str) -> None:
    if key in entry and not isinstance(entry[key], cls):
        raise UsageError(f"{name}: {key}: {entry[key]!r} must be {meaning}")


def _format_suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
