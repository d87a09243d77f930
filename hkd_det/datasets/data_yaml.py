"""The dataset that `--data` names: an entry of datasets.yaml, a data YAML, or an export of a labeling tool.

Keys are validated. Those of Ultralytics and Roboflow without effect are accepted.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkd_det.config import suggest_name
from hkd_det.datasets.base import DatasetError
from hkd_det.datasets.image_files import locate_path
from hkd_det.datasets.layouts import (
    YAML_SUFFIXES,
    describe_export,
    enter_single_directory,
    find_data_yaml,
    is_archive,
    unpack_export,
)
from hkd_det.errors import DataError, UsageError
from hkd_det.files import read_yaml

SPLITS = ("train", "val", "test")
SPLIT_ALIASES = {"valid": "val", "validation": "val"}
NAMES_HINT = "a list or a mapping of class ids to names"

# Keys of Ultralytics and Roboflow. They have no effect; `kpt_shape` states the length of pose rows.
NO_EFFECT_KEYS = {
    "nc", "download", "channels", "kpt_shape", "kpt_names", "flip_idx", "minival", "yaml_file", "masks_dir", "roboflow",
}  # fmt: skip
COMMON_KEYS = {"format", "path", *SPLITS, *SPLIT_ALIASES, "names", "license", "val_ratio", *NO_EFFECT_KEYS}
CATALOG_KEYS = {"homepage", "directory_layout"}  # only in datasets.yaml: how to get the dataset
TYPO_SIMILARITY = 0.75

Options = Mapping[str, tuple[type | tuple[type, ...], str]]  # key -> types, description of the value
DATASETS_DIR = Path("datasets")  # root of the named datasets, relative to the working directory


def load_data_yaml(path: Path) -> dict[str, Any]:
    """Read a data YAML or datasets.yaml.

    Args:
        path: YAML file.

    Returns:
        Keys and values, not validated.

    Raises:
        DataError: The file is missing or is not a mapping.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected `key: value` lines such as path, train, val.")
    return content


def validate_entry(
    entry: Any, name: str, extra_keys: set[str], formats: Mapping[str, Options]
) -> tuple[dict[str, Any], list[DatasetError]]:
    """Check keys and value types of an entry.

    Args:
        entry: Content of a data YAML.
        name: Its path or name, the prefix of error messages.
        extra_keys: Additional valid keys.
        formats: Options of each format.

    Returns:
        entry: The entry without empty values; `valid` and `validation` are renamed to `val`.
        notices: Warnings about keys without effect.

    Raises:
        UsageError: A key is misspelled or belongs to another format, or a value has the wrong type.
        DataError: The entry is not a mapping.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{name}: expected `key: value` lines such as path, train, val.")
    format_name = entry.get("format", "yolo")
    if not isinstance(format_name, str) or format_name not in formats:
        raise UsageError(f"{name}: format: expected one of {', '.join(formats)}, got {format_name!r:.80}.")
    options = formats[format_name]
    known = sorted(COMMON_KEYS | options.keys() | extra_keys)
    other_options = {key for others in formats.values() for key in others}
    unknown = []
    for key in entry:
        if key in known:
            continue
        if key in other_options or _is_misspelled(key, known, entry):
            raise UsageError(f"{name}: unknown key {key!r:.80} for format {format_name}{suggest_name(str(key), known)}")
        unknown.append(key)
    types: Options = {
        "path": (str, "a directory"),
        "license": (str, "a string"),
        "val_ratio": (float, "a number between 0 and 1"),
        **options,
    }
    entry = {key: value for key, value in entry.items() if value is not None}
    for key, (cls, meaning) in types.items():
        if key in entry and (not isinstance(entry[key], cls) or _has_wrong_items(entry[key])):
            raise UsageError(f"{name}: {key}: expected {meaning}, got {_format_value(entry[key])}.")
    if not 0 < entry.get("val_ratio", 0.5) < 1:
        raise UsageError(f"{name}: val_ratio: expected a number between 0 and 1, got {entry['val_ratio']}.")
    for alias, split in SPLIT_ALIASES.items():
        if alias in entry:
            entry.setdefault(split, entry.pop(alias))
    notices = [
        DatasetError(
            f"{name}: the key {key!r:.80} has no effect. Remove it, or compare it with the valid keys: "
            f"{', '.join(known)}.",
            "unknown_key",
            name,
            is_error=False,
        )
        for key in unknown
    ]
    return entry, notices


def parse_class_names(entry: Mapping[str, Any], name: str) -> dict[int, str]:
    """Return the class names of a YOLO dataset.

    Args:
        entry: Validated entry with `names`, or with the number of classes `nc`.
        name: Prefix of error messages.

    Returns:
        Names by class id.

    Raises:
        UsageError: The value is not a list or mapping of names.
    """
    names, num_classes = entry.get("names"), entry.get("nc")
    if names is None and isinstance(num_classes, int) and 0 < num_classes <= 10_000:
        return {number: f"class_{number}" for number in range(num_classes)}
    items = (
        list(enumerate(names)) if isinstance(names, list) else list(names.items()) if isinstance(names, dict) else []
    )
    numbered: dict[int, str] = {}
    for key, value in items:
        is_number = type(key) is int or (isinstance(key, str) and key.strip().isdecimal() and len(key) < 10)
        if not is_number or not isinstance(value, (str, int, float)):
            raise UsageError(f"{name}: names: expected {NAMES_HINT}, got {_format_value(value)} for {key!r:.40}.")
        numbered[int(key)] = str(value)
    if not numbered:
        raise UsageError(f"{name}: the format yolo requires `names`, {NAMES_HINT}.")
    return numbered


def count_keypoint_values(entry: Mapping[str, Any]) -> int:
    """Return the number of values that follow the box in pose labels, from `kpt_shape`; 0 without it.

    Args:
        entry: Validated entry.
    """
    shape = entry.get("kpt_shape")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(side) is int and side > 0 for side in shape)
    return math.prod(shape) if is_shape and shape else 0


def _is_misspelled(key: Any, known: Iterable[str], entry: Mapping[Any, Any]) -> bool:
    """Return whether a key is similar to a valid key that the entry lacks."""
    if not isinstance(key, str):
        return True
    absent = [name for name in known if name not in entry]
    return bool(difflib.get_close_matches(key, absent, 1, TYPO_SIMILARITY))


def _has_wrong_items(value: Any) -> bool:
    return isinstance(value, list) and not all(isinstance(item, str) for item in value)


def _format_value(value: Any) -> str:
    """Format a value for a message. The text of a list of aliases can be much longer than its file."""
    return f"a {type(value).__name__}" if isinstance(value, (list, dict)) else f"{value!r:.80}"


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset with its directories.

    Attributes:
        name: The value of --data.
        content: Keys and values of its data YAML.
        roots: Directories that the paths can be relative to, in the order of the search.
        notices: Warnings about the data YAML.
    """

    name: str
    content: dict[str, Any]
    roots: tuple[Path, ...]
    notices: tuple[DatasetError, ...] = ()

    @property
    def splits(self) -> list[str]:
        """Splits of the dataset, with the split val that is a part of the split train."""
        return [split for split in SPLITS if split in self.content or (split == "val" and self.splits_train)]

    @property
    def splits_train(self) -> bool:
        """Whether the split val is a part of the split train: of `val_ratio`, or of the default ratio."""
        return "train" in self.content and "val" not in self.content


def open_entry(data: str, formats: Mapping[str, Options], must_exist: bool = True) -> DatasetEntry:
    """Return the entry that --data names.

    Args:
        data: Name in datasets.yaml, data yaml, COCO file, `.data` file of Darknet, directory or archive.
        formats: Options of each format.
        must_exist: Whether the directory of a named dataset must exist.

    Returns:
        The entry, validated.

    Raises:
        UsageError: The name or a key is unknown, or a value has the wrong type.
        DataError: A file or directory is missing or invalid.
    """
    path = Path(data)
    if not data.endswith(YAML_SUFFIXES) and data in load_data_yaml(find_catalog_file()):
        content = read_catalog_entry(data, formats)
        root = DATASETS_DIR / content.get("path", data)
        if must_exist and not root.is_dir():
            raise DataError(f"--data {data}: {root.resolve()} does not exist. {_format_download_hint(data, content)}")
        return DatasetEntry(data, content, (root,))
    if not data.endswith(YAML_SUFFIXES) and not path.exists():
        read_catalog_entry(data, formats)  # raises
    if path.is_file() and is_archive(path):
        path = unpack_export(path, DATASETS_DIR)
    elif path.is_dir() and not find_data_yaml(path):
        path = enter_single_directory(path)
    yaml_path = find_data_yaml(path) if path.is_dir() and not data.endswith(YAML_SUFFIXES) else path
    if yaml_path is None or not (data.endswith(YAML_SUFFIXES) or yaml_path.suffix in YAML_SUFFIXES):
        content, root = describe_export(path)
        return DatasetEntry(data, content, (root,))
    return _open_yaml(data, yaml_path, formats)


def _open_yaml(data: str, path: Path, formats: Mapping[str, Options]) -> DatasetEntry:
    name = data if data.endswith(YAML_SUFFIXES) else str(path)
    content, notices = validate_entry(load_data_yaml(path), name, set(), formats)
    root = locate_path(content.get("path", "."), [path.parent])
    if not any(split in content for split in SPLITS) and root.is_dir() and "path" in content:
        exported, export_root = describe_export(root)  # a data YAML that adds settings to an export
        return DatasetEntry(name, {**exported, **content}, (export_root,), tuple(notices))
    roots = (root, path.parent) if root.is_dir() else (path.parent, root)  # `path` can be that of another machine
    is_yolo = content.get("format", "yolo") == "yolo"
    if (
        is_yolo and "test" in content and not _has_source(content["test"], roots)
    ):  # Roboflow names a split test in any case
        message = f"{name}: test: {content['test']!r:.80} does not exist. Correct or remove the line."
        notices.append(DatasetError(message, "no_test_split", name, is_error=False))
        content = {key: value for key, value in content.items() if key != "test"}
    return DatasetEntry(name, content, tuple(dict.fromkeys(roots)), tuple(notices))


def _has_source(source: Any, roots: Sequence[Path]) -> bool:
    """Return whether a split that is a path exists; a split of another form counts as existing."""
    return not isinstance(source, str) or locate_path(source, roots).exists()


def read_catalog_entry(data: str, formats: Mapping[str, Options]) -> dict[str, Any]:
    """Return the entry of a dataset in datasets.yaml.

    Args:
        data: Name of the dataset.
        formats: Options of each format.

    Returns:
        Keys and values, validated.

    Raises:
        UsageError: The name is unknown.
    """
    catalog = load_data_yaml(find_catalog_file())
    if data not in catalog:
        raise UsageError(
            f"--data {data}: no such file or directory, and no name in datasets.yaml{suggest_name(data, catalog)}"
        )
    return validate_entry(catalog[data], f"{find_catalog_file()}: {data}", CATALOG_KEYS, formats)[0]


def find_catalog_file() -> Path:
    """Return the path of datasets.yaml: in the installed package, or at the root of a checkout."""
    package = Path(__file__).parent
    installed = package / "datasets.yaml"
    return installed if installed.exists() else package.parents[1] / "datasets.yaml"


def _format_download_hint(data: str, content: Mapping[str, Any]) -> str:
    if "download" in content:
        return f"Download it with `hkd-train --data {data} --download`."
    return (
        f"Get it from {content.get('homepage')}. License: {content.get('license')}. Extract it as "
        f"{content.get('directory_layout')}."
    )


def format_missing_val(entry: DatasetEntry, num_images: int, min_images: int) -> str:
    """Format the message about a dataset without the split val that has too few images to split one off.

    Args:
        entry: The dataset.
        num_images: Number of training images.
        min_images: Least number of training images of which a part becomes the split val without `val_ratio`.

    Returns:
        Message that says how to make the split val.
    """
    if entry.name.endswith(YAML_SUFFIXES):
        hint = "Add `val: DIR`, or `val_ratio: 0.2` to use a fifth of the training images."
    else:
        hint = (
            f"Write a data YAML with the lines `path: {entry.name}` and `val_ratio: 0.2`, to use a fifth of the "
            "training images, and pass it as --data."
        )
    return (
        f"{entry.name}: no split 'val', and a part of {num_images} training images (expected at least {min_images}) is "
        f"not used for it by default. {hint}"
    )
