"""YOLO folders: `images/` beside `labels/`, a text file a picture, `class cx cy w h` as shares of the picture.

A box is cut at its picture's borders; one without area is an ignore region.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import imagesize
import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.datasets.base import ErrorHandler, raise_error, select_person_class
from hkd_det.errors import DataError
from hkd_det.image import IMAGE_SUFFIXES
from hkd_det.structures import GroundTruth, Sample

MAX_COORDINATE_RATIO = 2.0  # a person half outside the picture; what is larger was meant as pixels


def read_yolo(
    source: Path, names: Mapping[int, str], category: str = "", on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Every picture of a folder, or of a text file that lists them, with its people.

    names: class number to name, as in data.yaml. category: the person class's name; by default the one called
    person or pedestrian, or the only one. A picture without a label file shows nobody.
    A picture's id is its path below `source`, or as listed; listed twice it is taken once.
    Raises DataError, naming file and line.
    """
    person = select_person_class(names, category, f"{source}: `names`")
    pictures = _list_images(source)
    if not pictures:
        raise DataError(f"{source}: holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
    missing = [path for path in pictures.values() if not path.is_file()]
    for number, path in enumerate(missing):
        others = f", and {len(missing) - 1} others of the {len(pictures)} that {source} lists" if number == 0 else ""
        on_error(DataError(f"{path}: no such picture{others}"))
    samples = []
    for image_id, path in pictures.items():
        if path.is_file():
            try:
                samples.append(_read_sample(image_id, path, person, names, on_error))
            except DataError as fault:
                on_error(fault)
    return samples


def get_label_path(image_path: Path) -> Path:
    """Where the labels of a picture lie: the last folder named `images` becomes `labels`, the ending `.txt`."""
    parts = list(image_path.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _list_images(source: Path) -> dict[str, Path]:
    """Pictures by their id."""
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        return {path.relative_to(source).as_posix(): path for path in found}
    if not source.is_file():
        raise DataError(f"{source}: no such folder or list of pictures")
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise DataError(f"{source}: not a text file; expected a folder of pictures or a list of them") from None
    if any("\0" in line for line in lines):
        raise DataError(f"{source}: not a text file; expected a folder of pictures or a list of them")
    return {line: source.parent / line for line in lines if line}


def _read_sample(
    image_id: str, path: Path, person_class_id: int, names: Mapping[int, str], on_error: ErrorHandler
) -> Sample:
    size_hw = _read_size_hw(path)
    labels = get_label_path(path)
    shares = _read_boxes(labels, person_class_id, names, on_error) if labels.exists() else np.zeros((0, 4))
    height, width = size_hw
    boxes = (shares * [width, height, width, height]).astype(np.float32)
    return Sample(
        image_id, path, GroundTruth(boxes, box_math.box_area(boxes) <= 0, boxes, ("person",) * len(boxes)), size_hw
    )


def _read_size_hw(path: Path) -> tuple[int, int]:
    """Height and width from the file's header, without decoding it."""
    try:
        width, height = imagesize.get(str(path))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not a readable picture ({error})") from None
    if width <= 0 or height <= 0:
        raise DataError(f"{path}: not a readable picture (no size in its header)")
    return int(height), int(width)


def _read_boxes(
    path: Path, person_class_id: int, names: Mapping[int, str], on_error: ErrorHandler
) -> NDArray[np.float64]:
    """[N, 4] xyxy of a label file's people, shares of the picture, cut at its borders."""
    boxes = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, box = _parse_line(line, names, f"{path}, line {number}")
        except DataError as fault:
            on_error(fault)
            continue
        if label == person_class_id:
            boxes.append(box)
    return np.array(boxes, np.float64).reshape(-1, 4)


def _parse_line(line: str, names: Mapping[int, str], where: str) -> tuple[int, list[float]]:
    """Class number and xyxy."""
    try:
        row = [float(word) for word in line.split()]
    except ValueError:
        raise DataError(f"{where}: {line.strip()[:60]!r} is not `class cx cy w h`") from None
    if len(row) != 5 or not all(math.isfinite(value) for value in row):
        raise DataError(f"{where}: {line.strip()[:60]!r} is not `class cx cy w h` of finite numbers")
    label, x, y, width, height = row
    if label not in names:
        raise DataError(f"{where}: class {label:g} is not among the {len(names)} `names`")
    if width < 0 or height < 0:
        raise DataError(f"{where}: the box has a negative size: width {width:g}, height {height:g}")
    if max(map(abs, row[1:])) > MAX_COORDINATE_RATIO:
        raise DataError(f"{where}: {row[1:]} are not shares of the picture (0 to 1); are they pixels?")
    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    if box[0] >= 1 or box[1] >= 1 or box[2] <= 0 or box[3] <= 0:
        raise DataError(f"{where}: the box {row[1:]} is outside its picture")
    return int(label), [min(max(value, 0.0), 1.0) for value in box]
