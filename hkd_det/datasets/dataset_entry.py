"""The dataset that `--data` names: an entry of datasets.yaml, a data yaml, or an export of a labeling tool."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hkd_det.config import suggest_name
from hkd_det.datasets.base import DatasetError
from hkd_det.datasets.data_yaml import CATALOG_KEYS, SPLITS, Options, load_data_yaml, validate_entry
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

DATASETS_DIR = Path("datasets")  # root of the named datasets, relative to the working directory


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
        """Splits of the dataset, with the one that `val_ratio` makes."""
        return [split for split in SPLITS if split in self.content or (split == "val" and self.has_val_ratio)]

    @property
    def has_val_ratio(self) -> bool:
        """Whether the split val is a part of the split train."""
        return "val_ratio" in self.content and "train" in self.content and "val" not in self.content


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


def format_missing_split(entry: DatasetEntry, split: str) -> str:
    """Format the message about a split that a dataset lacks.

    Args:
        entry: The dataset.
        split: Name of the split.

    Returns:
        Message with the splits of the dataset, and how to make the split val.
    """
    known = ", ".join(entry.splits)
    if split != "val" or "train" not in entry.splits:
        return f"{entry.name}: no split {split!r}. Expected one of {known or 'train, val, test'}."
    if entry.name.endswith(YAML_SUFFIXES):
        hint = "Add `val: DIR`, or `val_ratio: 0.2` to use a fifth of the training images."
    else:
        hint = (
            f"Write a data YAML with the lines `path: {entry.name}` and `val_ratio: 0.2`, to use a fifth of the "
            "training images, and pass it as --data."
        )
    return f"{entry.name}: no split 'val'. Expected one of {known}. {hint}"
