"""Exports of labeling tools: find out format, splits and class names of a directory, an archive or a COCO file."""

import hashlib
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hkd_det.datasets.archive import ARCHIVE_SUFFIXES, extract_archive
from hkd_det.datasets.base import DatasetError
from hkd_det.datasets.image_files import is_hidden, locate_path
from hkd_det.datasets.voc import find_annotations_dir
from hkd_det.errors import DataError
from hkd_det.files import atomic_write_dir, read_content, read_json
from hkd_det.image import IMAGE_SUFFIXES

YAML_SUFFIXES = (".yaml", ".yml")
SPLIT_NAMES = {
    "train": ("train", "training", "trainval", "train2017"),
    "val": ("val", "valid", "validation", "dev", "val2017"),
    "test": ("test", "testing"),
}
NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "_classes.txt", "notes.json")
EXPORTS_DIR = ".exports"
FILE_NAME_PATTERN = re.compile(rb'"file_name"\s*:\s*"((?:[^"\\]|\\.)*)"')
EXPECTED = (
    "Expected a data YAML, obj.data, COCO files, Annotations/ and JPEGImages/, or images/, labels/ and classes.txt"
)


def find_data_yaml(directory: Path) -> Path | None:
    """Return the data YAML of a directory: data.yaml, or the only YAML file with the key `train` or `val`.

    Args:
        directory: Directory of an export.
    """
    paths = [path for path in _list_visible(directory) if path.suffix.lower() in YAML_SUFFIXES]
    for path in paths:
        if path.stem in ("data", "dataset"):
            return path
    pattern = re.compile(rb"^(train|val)\s*:", re.MULTILINE)
    paths = [path for path in paths if pattern.search(read_content(path, "a YAML file", max_bytes=2**20))]
    return paths[0] if len(paths) == 1 else None


def unpack_export(archive: Path, datasets_dir: Path) -> Path:
    """Extract the archive of an export once.

    Args:
        archive: Archive file.
        datasets_dir: Directory that receives the files, in a subdirectory of its own.

    Returns:
        Directory of the export.

    Raises:
        DataError: The archive is damaged or too large.
    """
    stat = archive.stat()
    key = f"{archive.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    directory = datasets_dir / EXPORTS_DIR / f"{archive.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not directory.is_dir():
        with atomic_write_dir(directory) as temp_path:
            extract_archive(archive, temp_path)
    return enter_single_directory(directory)


def is_archive(path: Path) -> bool:
    """Return whether a file name has the suffix of an archive.

    Args:
        path: File.
    """
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def enter_single_directory(directory: Path) -> Path:
    """Return the directory that contains the files: archives often have one directory at the top.

    Args:
        directory: Directory of an export.
    """
    content = _list_visible(directory)
    while len(content) == 1 and content[0].is_dir():
        directory, content = content[0], _list_visible(content[0])
    return directory


def describe_export(path: Path) -> tuple[dict[str, Any], Path]:
    """Return the content of a data YAML that describes an export without one.

    Args:
        path: Directory, COCO file, or `.data` file of Darknet.

    Returns:
        entry: Keys and values of the data YAML.
        root: Directory that its paths are relative to.

    Raises:
        DataError: The format is unknown.
    """
    if path.is_file():
        if path.suffix.lower() == ".json":
            split = next((one for one in SPLIT_NAMES if path.parent.name in SPLIT_NAMES[one]), "train")
            return {"format": "coco", split: _describe_coco_file(path, path.parent, split)}, Path()
        if path.suffix.lower() == ".data":
            return _describe_darknet(path), path.parent
        raise DataError(f"--data {path}: not a dataset. {EXPECTED}, a COCO file or an archive.")
    darknet = [file for file in _list_visible(path) if file.suffix == ".data" and file.is_file()]
    for entry in (
        _describe_darknet(darknet[0]) if darknet else None,
        _describe_coco(path),
        _describe_voc(path),
        _describe_yolo(path),
    ):
        if entry:
            return entry, Path() if entry.get("format") == "coco" else path
    raise DataError(f"--data {path}: unknown layout. {EXPECTED}. Otherwise write a data YAML and pass it as --data.")


def find_name_conflict(names: Mapping[int, str], directories: Sequence[Path]) -> DatasetError | None:
    """Return an error if a file with class names assigns other ids to the same names.

    Args:
        names: Class names by id that are used.
        directories: Directories that can contain such files.

    Returns:
        The error, or None.
    """
    ids = {name.strip().casefold(): key for key, name in names.items()}
    for path in _find_name_files(directories):
        others = {name.casefold(): key for key, name in read_class_names(path).items()}
        differing = [name for name, key in others.items() if ids.get(name, key) != key]
        if differing:
            used, other = _format_names(names), _format_names(read_class_names(path))
            return DatasetError(
                f"{path}: the class ids differ from those in use: {other} instead of {used}. Compare classes.txt, "
                "notes.json and the data YAML with the labels, and correct or remove the wrong file.",
                "class_names",
                path,
                len(differing),
            )
    return None


def read_class_names(path: Path) -> dict[int, str]:
    """Read class names by id from a text file with one name per line, or from notes.json of Label Studio.

    Args:
        path: File with class names.

    Returns:
        Names by id; empty if the file has another content.
    """
    if path.suffix == ".json":
        content = read_json(path)
        categories = content.get("categories") if isinstance(content, dict) else None
        records = [one for one in categories or [] if isinstance(one, dict) and type(one.get("id")) is int]
        return {one["id"]: str(one.get("name", "")).strip() for one in records}
    lines = read_content(path, "a text file").decode("utf-8-sig", "replace").splitlines()
    return {number: line.strip() for number, line in enumerate(lines) if line.strip()}


def _find_name_files(directories: Sequence[Path]) -> Iterator[Path]:
    for directory in dict.fromkeys(directories):
        for name in NAME_FILES:
            if (directory / name).is_file():
                yield directory / name


def _describe_darknet(path: Path) -> dict[str, Any]:
    """Describe the `.data` file of Darknet and of the format YOLO 1.1 of CVAT."""
    text = read_content(path, "a Darknet file").decode("utf-8-sig", "replace")
    values = {
        key.strip(): value.strip()
        for key, equals, value in (line.partition("=") for line in text.splitlines())
        if equals
    }
    names_path = locate_path(values.get("names", "obj.names"), [path.parent])
    entry: dict[str, Any] = {"names": read_class_names(names_path)}
    for key, split in (("train", "train"), ("valid", "val"), ("val", "val"), ("test", "test")):
        if key in values and locate_path(values[key], [path.parent]).exists():
            entry[split] = values[key]
    return entry


def _describe_coco(root: Path) -> dict[str, Any] | None:
    """Describe COCO files: one per split directory (Roboflow), in annotations/ (CVAT, COCO), or at the top."""
    entry: dict[str, Any] = {}
    for split, directory in _list_split_directories(root):
        files = _list_coco_files(directory)
        if len(files) == 1:
            entry[split] = _describe_coco_file(files[0], root, split)
    if not entry:
        files = _list_coco_files(root / "annotations") or _list_coco_files(root)
        instances = [path for path in files if path.name.startswith("instances")]
        for path in instances or files:
            words = re.split(r"[^a-z0-9]+", path.stem.lower())
            split = next((one for one, names in SPLIT_NAMES.items() if set(names) & set(words)), "train")
            if split in entry:
                raise DataError(
                    f"--data {root}: several COCO files for the split {split}, such as {path}. Write a data YAML that "
                    "names the file of each split."
                )
            entry[split] = _describe_coco_file(path, root, split)
    return {"format": "coco", **entry} if entry else None


def _describe_coco_file(path: Path, root: Path, split: str) -> dict[str, str]:
    """Return the file and the directory that contains its first image."""
    subset = path.stem.removeprefix("instances_")
    parents = [path.parent, root, path.parent.parent]
    candidates = [path.parent, *(parent / name for parent in parents for name in ("images", "data"))]
    names = (subset, *SPLIT_NAMES[split])
    candidates += [parent / name for parent in (root / "images", path.parent.parent / "images", root) for name in names]
    candidates += parents[1:]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        match = FILE_NAME_PATTERN.search(raw)
        name = match[1].decode("utf-8", "replace").replace("\\\\", "\\") if match else ""
    found = next((one for one in candidates if name and locate_path(name, [one]).is_file()), path.parent)
    return {"images": str(found), "annotations": str(path)}


def _describe_voc(root: Path) -> dict[str, Any] | None:
    """Describe Annotations/ with ImageSets/ (VOC, CVAT), or XML files next to the images (Roboflow)."""
    entry: dict[str, Any] = {}
    if find_annotations_dir(root):
        lists = [path.stem for path in _list_visible(root / "ImageSets" / "Main") if path.suffix == ".txt"]
        for split, names in SPLIT_NAMES.items():
            listed = [name for name in names if name in lists]
            entry |= {split: listed[0]} if listed else {}
        return {"format": "voc", **(entry or {"train": "default" if "default" in lists else "train"})}
    for split, directory in _list_split_directories(root):
        if any(path.suffix == ".xml" for path in _list_visible(directory)):
            entry[split] = directory.name
    if not entry and any(path.suffix == ".xml" for path in _list_visible(root)):
        entry["train"] = "."
    return {"format": "voc", **entry} if entry else None


def _describe_yolo(root: Path) -> dict[str, Any] | None:
    """Describe images with YOLO labels whose class names are in a file such as classes.txt."""
    entry: dict[str, Any] = {}
    for split, directory in (*_list_split_directories(root / "images"), *_list_split_directories(root)):
        source = directory / "images" if (directory / "images").is_dir() else directory
        if split not in entry:
            entry[split] = source.relative_to(root).as_posix()
    if not entry:
        images = [path for path in _list_visible(root) if path.is_dir() and path.name.lower() == "images"]
        if not images and not any(path.suffix.lower() in IMAGE_SUFFIXES for path in _list_visible(root)):
            return None
        entry["train"] = images[0].name if images else "."
    sources = [root / str(source) for source in entry.values()]
    labels = [root / "labels", root / "Labels", *(source.parent / "labels" for source in sources)]
    files = list(_find_name_files([root, *labels, *sources]))
    if not files:
        return None
    return {"names": read_class_names(files[0]), **entry}


def _list_split_directories(root: Path) -> list[tuple[str, Path]]:
    directories = {path.name.lower(): path for path in _list_visible(root) if path.is_dir()}
    return [
        (split, next(directories[name] for name in names if name in directories))
        for split, names in SPLIT_NAMES.items()
        if any(name in directories for name in names)
    ]


def _list_coco_files(directory: Path) -> list[Path]:
    return [path for path in _list_visible(directory) if path.suffix.lower() == ".json" and _is_coco_file(path)]


def _is_coco_file(path: Path) -> bool:
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        return all(raw.find(key) >= 0 for key in (b'"images"', b'"annotations"', b'"categories"'))


def _list_visible(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if not is_hidden(path.name))


def _format_names(names: Mapping[int, str]) -> str:
    return ", ".join(f"{key} {name:.30}" for key, name in list(names.items())[:8]) + (", ..." if len(names) > 8 else "")
