"""YOLO folders: `images/` beside `labels/`, a text file a picture, `class cx cy w h` as shares of the picture."""

import math
from collections.abc import Mapping
from pathlib import Path

import imagesize
import numpy as np

from hkd_det.datasets.sample import Sample, Truth
from hkd_det.errors import DataError

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
PERSON_NAMES = ("person", "pedestrian", "people", "human")
TOLERANCE = 1e-4  # shares are written rounded: a box may reach this far beyond its picture


def read_yolo(source: Path, names: Mapping[int, str], category: str = "") -> list[Sample]:
    """Every picture of a folder, or of a text file that lists them, with its people.

    names: class number to name, as in data.yaml. category: the person class's name; by default the one called
    person or pedestrian, or the only one. A picture without a label file shows nobody.
    Raises DataError, naming file and line.
    """
    person = _person_class(source, names, category)
    pictures = _listed(source)
    if not pictures:
        raise DataError(f"{source}: holds no pictures ({', '.join(sorted(PICTURES))})")
    return [_sample(path, person, len(names)) for path in pictures]


def label_path(picture: Path) -> Path:
    """Where the labels of a picture lie: the last folder named `images` becomes `labels`, the ending `.txt`."""
    parts = list(picture.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _person_class(source: Path, names: Mapping[int, str], category: str) -> int:
    numbers = {name: number for number, name in names.items()}
    wanted = (category,) if category else PERSON_NAMES
    for name in wanted:
        if name in numbers:
            return numbers[name]
    if len(names) == 1 and not category:
        return next(iter(names))
    raise DataError(
        f"{source}: no class {' or '.join(wanted)} among `names`: {', '.join(names.values())}; say `category: NAME`"
    )


def _listed(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURES)
    if source.is_file():
        lines = source.read_text(encoding="utf-8").splitlines()
        return [source.parent / line.strip() for line in lines if line.strip()]
    raise DataError(f"{source}: no such folder or list of pictures")


def _sample(path: Path, person: int, classes: int) -> Sample:
    size_hw = _size_hw(path)
    labels = label_path(path)
    rows = _rows(labels, classes) if labels.exists() else np.zeros((0, 5))
    people = rows[rows[:, 0] == person, 1:]
    centre, half = people[:, :2], people[:, 2:] / 2
    shares = np.concatenate([centre - half, centre + half], axis=1).clip(0, 1)
    boxes = (shares * [size_hw[1], size_hw[0], size_hw[1], size_hw[0]]).astype(np.float32)
    return Sample(path.stem, path, Truth(boxes, np.zeros(len(boxes), bool), boxes, ("person",) * len(boxes)), size_hw)


def _size_hw(path: Path) -> tuple[int, int]:
    """Height and width from the file's header, without decoding it."""
    try:
        width, height = imagesize.get(str(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a readable picture ({error})") from None
    if width <= 0 or height <= 0:
        raise DataError(f"{path}: not a readable picture (no size in its header)")
    return int(height), int(width)


def _rows(path: Path, classes: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            raise DataError(f"{where}: {line.strip()[:60]!r} is not `class cx cy w h`") from None
        if len(row) != 5 or not all(math.isfinite(value) for value in row):
            raise DataError(f"{where}: {line.strip()[:60]!r} is not `class cx cy w h` of finite numbers")
        if row[0] not in range(classes):
            raise DataError(f"{where}: class {row[0]:g} is not among the {classes} `names`")
        _check_box(row[1:], where)
        rows.append(row)
    return np.array(rows, np.float64).reshape(-1, 5)


def _check_box(box: list[float], where: str) -> None:
    width, height = box[2:]
    if width <= 0 or height <= 0:
        raise DataError(f"{where}: the box has no area: width {width:g}, height {height:g}")
    if max(box) > 1 + TOLERANCE or min(box) < -TOLERANCE:
        raise DataError(f"{where}: {box} are not shares of the picture (0 to 1); are they pixels?")
