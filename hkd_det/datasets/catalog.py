"""`load_dataset`: read a dataset by its name in datasets.yaml, from a data yaml, or as a labeling tool exports it.

A data yaml has the keys of Ultralytics (`path`, `train`, `val`, `test`, `names`) and these:

* `format`: yolo (default), coco, or a key of `READERS`.
* `license`: Terms of the data owner. Exported models contain it.
* `category`, `ignore_category`, `skip_missing`, `annotations`, `frame_step`, `time`: Options of some formats, see
  `READERS`.
* `val_ratio`: Ratio of the training images that become the split val. Default without `val`: a fifth, if there are at
  least 50 training images.

A yolo split is an image directory or a text file that lists images. A coco split is
`{images: DIR, annotations: FILE}`. Both accept a list. A split of another format is a string: the name of the split
in the dataset, or `set00-set05` for Caltech. docs/reference/dataset-yaml.md describes all keys.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hkd_det.datasets.base import (
    DatasetError,
    ErrorHandler,
    filter_missing_images,
    log_notices,
    raise_error,
)
from hkd_det.datasets.caltech import read_caltech
from hkd_det.datasets.citypersons import read_citypersons
from hkd_det.datasets.coco import read_coco
from hkd_det.datasets.crowdhuman import read_crowdhuman
from hkd_det.datasets.data_yaml import (
    SPLITS,
    DatasetEntry,
    Options,
    count_keypoint_values,
    format_missing_val,
    open_entry,
    parse_class_names,
    read_catalog_entry,
)
from hkd_det.datasets.eurocity import read_eurocity
from hkd_det.datasets.image_files import check_stated_sizes, find_repeated_files, locate_path
from hkd_det.datasets.inria import read_inria, read_pennfudan
from hkd_det.datasets.layouts import find_name_conflict
from hkd_det.datasets.voc import read_voc
from hkd_det.datasets.yolo import read_yolo
from hkd_det.errors import DataError, HkdError, UsageError, import_package
from hkd_det.structures import Sample

DEFAULT_VAL_RATIO = 0.2
MIN_IMAGES_TO_SPLIT = 50  # a fifth of fewer images measures nothing
SKIP_MISSING: Options = {"skip_missing": (bool, "true or false")}
CATEGORY: Options = {
    "category": ((str, list), "a name or a list of names"),
    "ignore_category": ((str, list), "a name or a list of names"),
}


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
        data: Name in datasets.yaml, path of a data yaml, or an export of a labeling tool: a directory, an archive, or a
            COCO file.
        split: "train", "val" or "test".
        on_error: Receives the errors of invalid records and warnings (default: raise the first error, log one line for
            each kind of warning).

    Returns:
        At least one sample.

    Raises:
        UsageError: The name, the split, or a key of the data yaml is unknown, or a value has the wrong type.
        DataError: Files are missing or invalid.
        UnavailableError: The package simplejpeg is not installed. Without it, damaged JPEG data would be no error.
    """
    import_package("simplejpeg")
    notices: list[DatasetError] = []

    def collect(error: DataError) -> None:
        raise_error(error)
        if isinstance(error, DatasetError):
            notices.append(error)

    handler = collect if on_error is raise_error else on_error
    entry = open_entry(data, _list_formats())
    if split not in entry.splits:
        expected = ", ".join(entry.splits) or "train, val, test"
        raise UsageError(f"{entry.name}: no split {split!r}. Expected one of {expected}.")
    for notice in entry.notices:
        handler(notice)
    if entry.splits_train and split != "test":
        samples = _split_off_val(entry, split, handler)
    else:
        samples = _read_split(entry, split, handler)
    log_notices(notices)
    return samples


def list_splits(data: str) -> list[str]:
    """Return the splits that a dataset has. Raises like `load_dataset`.

    Args:
        data: Dataset, as for `load_dataset`.

    Returns:
        A part of train, val, test, in this order. Without val, at least `MIN_IMAGES_TO_SPLIT` training images
        include it.
    """
    entry = open_entry(data, _list_formats())
    splits = entry.splits
    if entry.splits_train and "val_ratio" not in entry.content:
        try:
            num_images = len(_read_split(entry, "train", lambda _error: None))
        except HkdError:
            num_images = 0
        if num_images < MIN_IMAGES_TO_SPLIT:
            splits.remove("val")
    return splits


def find_common_images(samples: Sequence[Sample], others: Sequence[Sample]) -> list[Sample]:
    """Return the samples whose image files also belong to another split.

    Args:
        samples: Samples of a split.
        others: Samples of another split.

    Returns:
        A part of `samples`.
    """
    indices = find_repeated_files([sample.path for sample in (*others, *samples)])[len(others) :]
    return [sample for sample, index in zip(samples, indices, strict=True) if index < len(others)]


@dataclass(frozen=True)
class CocoSource:
    """The annotation file of a split.

    Attributes:
        annotations: COCO file.
        images: Directory that each `file_name` is relative to.
        category: Names of the person categories; empty for the default.
        ignore_category: Names of the ignored categories.
    """

    annotations: Path
    images: Path
    category: str | list[str]
    ignore_category: str | list[str]


def find_coco_source(data: str, split: str) -> CocoSource | None:
    """Return the annotation file of a split, or None if the split is not exactly one COCO file.

    Args:
        data: Dataset, as for `load_dataset`.
        split: Name of a split that `load_dataset` reads.
    """
    entry = open_entry(data, _list_formats())
    parts = _ensure_list(entry.content.get(split, []))
    if entry.content.get("format", "yolo") != "coco" or len(parts) != 1:
        return None
    if split == "train" and entry.splits_train and "val" in list_splits(data):  # the other part of the file is val
        return None
    images, annotations = _parse_coco_paths(parts[0], entry.roots, f"{data}: split {split}")
    return CocoSource(annotations, images, entry.content.get("category", ""), entry.content.get("ignore_category", ""))


def list_coco_files(data: str) -> list[Path]:
    """Return the annotation files of a dataset in the format COCO, of all splits; of other formats none.

    Args:
        data: Dataset, as for `load_dataset`.
    """
    entry = open_entry(data, _list_formats())
    if entry.content.get("format", "yolo") != "coco":
        return []
    parts = [(split, part) for split in SPLITS for part in _ensure_list(entry.content.get(split, []))]
    return [_parse_coco_paths(part, entry.roots, f"{data}: split {split}")[1] for split, part in parts]


def dataset_license(data: str) -> str:
    """Return the `license` text of a dataset, or that of its Roboflow project, or "" if it has none.

    The data itself need not exist. Raises like `load_dataset` for an unknown name or a missing data yaml.

    Args:
        data: Dataset, as for `load_dataset`.
    """
    content = open_entry(data, _list_formats(), must_exist=False).content
    roboflow = content.get("roboflow")
    text = content.get("license") or (roboflow.get("license") if isinstance(roboflow, dict) else "")
    return text if isinstance(text, str) else ""


def load_catalog_entry(data: str) -> dict[str, Any]:
    """Return the entry of a dataset in datasets.yaml. Raises UsageError for an unknown name.

    Args:
        data: Name of the dataset.

    Returns:
        Keys and values, validated.
    """
    return read_catalog_entry(data, _list_formats())


def _list_formats() -> dict[str, Options]:
    """Return the options of each format."""
    readers = {name: reader.options for name, reader in READERS.items()}
    return {"yolo": CATEGORY, "coco": {**CATEGORY, **SKIP_MISSING}, **readers}


def _split_off_val(entry: DatasetEntry, split: str, on_error: ErrorHandler) -> list[Sample]:
    """Return the part of the training images that is `split`. The part of an image depends on its id only."""
    samples = _read_split(entry, "train", on_error)
    if "val_ratio" not in entry.content and len(samples) < MIN_IMAGES_TO_SPLIT:
        if split == "train":
            return samples
        raise UsageError(format_missing_val(entry, len(samples), MIN_IMAGES_TO_SPLIT))
    if len(samples) < 2:
        raise DataError(f"{entry.name}: val_ratio: expected at least 2 training images, got {len(samples)}.")
    order = sorted(samples, key=lambda sample: hashlib.sha256(str(sample.image_id).encode("utf-8", "replace")).digest())
    ratio = entry.content.get("val_ratio", DEFAULT_VAL_RATIO)
    num_val = min(max(1, round(ratio * len(samples))), len(samples) - 1)
    val = {id(sample) for sample in order[:num_val]}
    if split == "val":
        on_error(
            DatasetError(
                f"{entry.name}: {num_val} of {len(samples)} training images are the split val (val_ratio {ratio:g}). "
                "Add `val` for images of other places or days.",
                "val_split_off",
                entry.name,
                num_val,
                is_error=False,
            )
        )
    return [sample for sample in samples if (id(sample) in val) == (split == "val")]


def _read_split(entry: DatasetEntry, split: str, on_error: ErrorHandler) -> list[Sample]:
    content, where = entry.content, f"{entry.name}: split {split}"
    source = content[split]
    match content.get("format", "yolo"):
        case "yolo":
            samples = _read_yolo_split(entry, source, where, on_error)
        case "coco":
            options = (content.get("category", ""), on_error, content.get("ignore_category", ""), split == "train")
            parts = []
            for part in _ensure_list(source):
                images, annotations = _parse_coco_paths(part, entry.roots, where)
                parts.append(read_coco(annotations, images, *options))
            skip_missing = content.get("skip_missing", False)
            samples = filter_missing_images(_merge_samples(parts), skip_missing, entry.name, on_error)
            check_stated_sizes(samples, on_error)
        case format_name:
            reader = READERS[format_name]
            reader_options = {key: content[key] for key in reader.options if key in content}
            samples = reader.read(entry.roots[0], _check_str(source, where), on_error=on_error, **reader_options)
            if format_name == "voc":
                check_stated_sizes(samples, on_error)
    if not samples:
        raise DataError(f"{where}: contains no images. Check the path and the directory layout.")
    return samples


def _read_yolo_split(entry: DatasetEntry, source: Any, where: str, on_error: ErrorHandler) -> list[Sample]:
    content = entry.content
    names = parse_class_names(content, entry.name)
    sources = [locate_path(_check_str(part, where), entry.roots) for part in _ensure_list(source)]
    if not sources:
        return []
    directories = [*entry.roots, *(root / "labels" for root in entry.roots), *sources]
    if conflict := find_name_conflict(names, [*directories, *(one.parent / "labels" for one in sources)]):
        on_error(conflict)
    return read_yolo(
        sources,
        names,
        content.get("category", ""),
        on_error,
        content.get("ignore_category", ""),
        count_keypoint_values(content),
        entry.roots[0],
    )


def _ensure_list(source: Any) -> list[Any]:
    return source if isinstance(source, list) else [source]


def _merge_samples(parts: list[list[Sample]]) -> list[Sample]:
    """Concatenate samples. With several parts, prefix each image id with the index of its part to keep it unique."""
    if len(parts) == 1:
        return parts[0]
    return [
        replace(sample, image_id=f"{index}/{sample.image_id}") for index, part in enumerate(parts) for sample in part
    ]


def _parse_coco_paths(source: Any, roots: tuple[Path, ...], where: str) -> tuple[Path, Path]:
    """Return the image directory and the annotation file of one part of a split."""
    if not isinstance(source, dict) or set(source) != {"images", "annotations"}:
        raise UsageError(f"{where}: expected {{images: DIR, annotations: FILE}}, or a list of those.")
    return locate_path(_check_str(source["images"], where), roots), locate_path(
        _check_str(source["annotations"], where), roots
    )


def _check_str(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where}: expected a string, got {value!r:.80}.")
    return value
