"""Keys of a data YAML: validation, class names, and the keys of Ultralytics and Roboflow without effect."""

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hkd_det.config import suggest_name
from hkd_det.datasets.base import DatasetError
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
