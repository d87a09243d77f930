"""`load_dataset`: read a dataset by its name in datasets.yaml, or from a data yaml of the user.

A data yaml has the keys of Ultralytics (`path`, `train`, `val`, `test`, `names`) and these:

* `format`: yolo (default), coco, or a key of `READERS`.
* `license`: Terms of the data owner. Exported models contain it.
* `skip_missing`, `category`, `annotations`, `frame_step`, `time`: Options of some formats, see `READERS`.

A yolo split is an image directory or a text file that lists images. A coco split is
`{images: DIR, annotations: FILE}`. Both accept a list. A split of another format is a string: the name of the split
in the dataset, or `set00-set05` for Caltech. docs/reference/dataset-yaml.md describes all keys.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hkd_det.config import suggest_name
from hkd_det.datasets.base import ErrorHandler, filter_missing_images, raise_error
from hkd_det.datasets.caltech import read_caltech
from hkd_det.datasets.citypersons import read_citypersons
from hkd_det.datasets.coco import read_coco
from hkd_det.datasets.crowdhuman import read_crowdhuman
from hkd_det.datasets.eurocity import read_eurocity
from hkd_det.datasets.inria import read_inria, read_pennfudan
from hkd_det.datasets.voc import read_voc
from hkd_det.datasets.yolo import read_yolo
from hkd_det.errors import DataError, UsageError
from hkd_det.files import read_yaml
from hkd_det.structures import Sample

SPLITS = ("train", "val", "test")
YAML_SUFFIXES = (".yaml", ".yml")
DATASETS_DIR = Path("datasets")  # root of the named datasets, relative to the working directory

# Ultralytics files contain `nc`, `download` and, for other formats than yolo, `names`. They have no effect.
COMMON_KEYS = {"format", "path", *SPLITS, "names", "nc", "download", "license"}
CATALOG_KEYS = {"homepage", "directory_layout"}  # only in datasets.yaml: how to get the dataset

Options = Mapping[str, tuple[type, str]]  # key of the yaml -> type, description of the value

SKIP_MISSING: Options = {"skip_missing": (bool, "true or false")}
CATEGORY: Options = {"category": (str, "a name")}


@dataclass(frozen=True)
class DatasetReader:
    """One dataset format.

    Attributes:
        read: Function `read(root, split, on_error=..., **options)` that returns the samples of a split. `split`
            is the string of the data yaml. It reports invalid records to `on_error`.
        options: Keys of the data yaml that are passed to `read` as keyword arguments.
    """

    read: Callable[..., list[Sample]]
    options: Options = field(default_factory=lambda: SKIP_MISSING)


READERS: dict[str, DatasetReader] = {
    "citypersons": DatasetReader(read_citypersons),
    "caltech": DatasetReader(
        read_caltech,
        {"annotations": (str, "original or corrected"), "frame_step": (int, "an integer"), **SKIP_MISSING},
    ),
    "voc": DatasetReader(read_voc, {**CATEGORY, **SKIP_MISSING}),
    "inria": DatasetReader(read_inria),
    "pennfudan": DatasetReader(read_pennfudan),
    "crowdhuman": DatasetReader(read_crowdhuman),
    "eurocity": DatasetReader(read_eurocity, {"time": (str, "day or night"), **SKIP_MISSING}),
}


def load_dataset(data: str, split: str, on_error: ErrorHandler = raise_error) -> list[Sample]:
    """Load one split of a dataset.

    Args:
        data: Name in datasets.yaml, or path of a data yaml.
        split: "train", "val" or "test".
        on_error: Receives the errors of invalid records (default: raise the first one).

    Returns:
        At least one sample.

    Raises:
        UsageError: The name, the split, or a key of the data yaml is unknown, or a value has the wrong type.
        DataError: Files are missing or invalid.
    """
    entry = _load_entry(data)
    root = _get_root(entry, data)
    if not data.endswith(YAML_SUFFIXES) and not root.is_dir():
        if "download" in entry:
            hint = f"Download it with `hkd-train --data {data} --download`."
        else:
            hint = (
                f"Get it from {entry.get('homepage')}. License: {entry.get('license')}. Extract it as "
                f"{entry.get('directory_layout')}."
            )
        raise DataError(f"--data {data}: {root.resolve()} does not exist. {hint}")
    return _read_split(entry, root, split, data, on_error)


def list_splits(data: str) -> list[str]:
    """Return the splits that a dataset has. Raises like `load_dataset`.

    Args:
        data: Name in datasets.yaml, or path of a data yaml.

    Returns:
        A part of train, val, test, in this order.
    """
    entry = _load_entry(data)
    return [split for split in SPLITS if entry.get(split) is not None]


@dataclass(frozen=True)
class CocoSource:
    """The annotation file of a split.

    Attributes:
        annotations: COCO file.
        images: Directory that each `file_name` is relative to.
        category: Name of the person category; empty for the default.
    """

    annotations: Path
    images: Path
    category: str


def find_coco_source(data: str, split: str) -> CocoSource | None:
    """Return the annotation file of a split, or None if the split is not exactly one COCO file.

    Args:
        data: Name in datasets.yaml, or path of a data yaml.
        split: Name of a split that `load_dataset` reads.
    """
    entry = _load_entry(data)
    parts = _ensure_list(entry[split])
    if entry.get("format", "yolo") != "coco" or len(parts) != 1:
        return None
    images, annotations = _parse_coco_paths(parts[0], _get_root(entry, data), f"{data}: split {split}")
    return CocoSource(annotations, images, entry.get("category", ""))


def dataset_license(data: str) -> str:
    """Return the `license` text of a dataset, or "" if it has none.

    The data itself need not exist. Raises like `load_dataset` for an unknown name or a missing data yaml.

    Args:
        data: Name in datasets.yaml, or path of a data yaml.
    """
    text: str = _load_entry(data).get("license", "")
    return text


def load_catalog_entry(data: str) -> dict[str, Any]:
    """Return the entry of a dataset in datasets.yaml.

    Args:
        data: Name of the dataset.

    Returns:
        Keys and values, validated.

    Raises:
        UsageError: The name is unknown.
    """
    catalog = _load_yaml(find_catalog_file())
    if data not in catalog:
        raise UsageError(
            f"--data {data}: neither a .yaml file nor a name in datasets.yaml{suggest_name(data, catalog)}"
        )
    return _validate_entry(catalog[data], f"{find_catalog_file()}: {data}", CATALOG_KEYS)


def find_catalog_file() -> Path:
    """Return the path of datasets.yaml: in the installed package, or at the root of a checkout."""
    package = Path(__file__).parent
    installed = package / "datasets.yaml"
    return installed if installed.exists() else package.parents[1] / "datasets.yaml"


def _get_root(entry: dict[str, Any], data: str) -> Path:
    if data.endswith(YAML_SUFFIXES):
        return Path(data).parent / entry.get("path", ".")
    return DATASETS_DIR / entry.get("path", data)


def _load_entry(data: str) -> dict[str, Any]:
    if data.endswith(YAML_SUFFIXES):
        return _validate_entry(_load_yaml(Path(data)), data, set())
    return load_catalog_entry(data)


def _read_split(entry: dict[str, Any], root: Path, split: str, name: str, on_error: ErrorHandler) -> list[Sample]:
    if split not in SPLITS or entry.get(split) is None:
        known = [key for key in SPLITS if entry.get(key) is not None]
        raise UsageError(f"{name}: no split {split!r}. Expected one of {', '.join(known) or 'train, val, test'}.")
    source, where = entry[split], f"{name}: split {split}"
    match entry.get("format", "yolo"):
        case "yolo":
            names, category = _parse_class_names(entry, name), entry.get("category", "")
            parts = [
                read_yolo(root / _check_str(part, where), names, category, on_error) for part in _ensure_list(source)
            ]
            samples = _merge_samples(parts)
        case "coco":
            category = entry.get("category", "")
            parts = [_read_coco_split(part, root, category, where, on_error) for part in _ensure_list(source)]
            samples = filter_missing_images(_merge_samples(parts), entry.get("skip_missing", False), name, on_error)
        case format_name:
            reader = READERS[format_name]
            options = {key: entry[key] for key in reader.options if key in entry}
            samples = reader.read(root, _check_str(source, where), on_error=on_error, **options)
    if not samples:
        raise DataError(f"{where}: contains no images. Check the path and the directory layout.")
    return samples


def _ensure_list(source: Any) -> list[Any]:
    return source if isinstance(source, list) else [source]


def _merge_samples(parts: list[list[Sample]]) -> list[Sample]:
    """Concatenate samples. With several parts, prefix each image id with the index of its part to keep it unique."""
    if len(parts) == 1:
        return parts[0]
    return [
        replace(sample, image_id=f"{index}/{sample.image_id}") for index, part in enumerate(parts) for sample in part
    ]


def _read_coco_split(source: Any, root: Path, category: str, where: str, on_error: ErrorHandler) -> list[Sample]:
    images, annotations = _parse_coco_paths(source, root, where)
    return read_coco(annotations, images, category, on_error)


def _parse_coco_paths(source: Any, root: Path, where: str) -> tuple[Path, Path]:
    """Return the image directory and the annotation file of one part of a split."""
    if not isinstance(source, dict) or set(source) != {"images", "annotations"}:
        raise UsageError(f"{where}: expected {{images: DIR, annotations: FILE}}, or a list of those.")
    return root / _check_str(source["images"], where), root / _check_str(source["annotations"], where)


def _check_str(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where}: expected a string, got {value!r}.")
    return value


def _parse_class_names(entry: dict[str, Any], name: str) -> dict[int, str]:
    names = entry.get("names")
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(numbered, dict) or not numbered or not all(type(number) is int for number in numbered):
        raise UsageError(f"{name}: the format yolo requires `names`, a list or a mapping of class ids to names.")
    return {number: str(value) for number, value in numbered.items()}


def _load_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected `key: value` lines such as path, train, val.")
    return content


def _validate_entry(entry: Any, name: str, extra_keys: set[str]) -> dict[str, Any]:
    """Check keys and value types of an entry, and return it."""
    if not isinstance(entry, dict):
        raise DataError(f"{name}: expected `key: value` lines such as path, train, val.")
    formats: dict[str, Options] = {
        "yolo": CATEGORY,
        "coco": {**CATEGORY, **SKIP_MISSING},
        **{format_name: reader.options for format_name, reader in READERS.items()},
    }
    format_name = entry.get("format", "yolo")
    if not isinstance(format_name, str) or format_name not in formats:
        raise UsageError(f"{name}: format: expected one of {', '.join(formats)}, got {format_name!r}.")
    options = formats[format_name]
    known: Iterable[str] = sorted(COMMON_KEYS | options.keys() | extra_keys)
    for key in entry:
        if key not in known:
            raise UsageError(f"{name}: unknown key {key!r} for format {format_name}{suggest_name(str(key), known)}")
    for key, (cls, meaning) in {"path": (str, "a directory"), "license": (str, "a string"), **options}.items():
        if key in entry and not isinstance(entry[key], cls):
            raise UsageError(f"{name}: {key}: expected {meaning}, got {entry[key]!r}.")
    return entry
