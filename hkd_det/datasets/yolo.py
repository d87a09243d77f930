"""YOLO directories: `images/` and `labels/`, one text file per image, `class cx cy w h` relative to the image size.

A box is clipped to its image. A box without area is an ignore region.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkd_det.boxes import box_area
from hkd_det.datasets.base import ErrorHandler, make_size_error, raise_error, select_person_class
from hkd_det.errors import DataError
from hkd_det.image import IMAGE_SUFFIXES, read_image_header
from hkd_det.structures import GroundTruth, Sample

MAX_COORDINATE_RATIO = 2.0  # a person can be partly outside the image; larger values are probably pixels


def read_yolo(
    source: Path, names: Mapping[int, str], category: str = "", on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Read a directory or a list of images with YOLO labels.

    Args:
        source: Image directory, read recursively, or a text file with one image path per line.
        names: Class names by class id, as in the data yaml.
        category: Name of the person class (default: "person" or "pedestrian", or the only class).
        on_error: Receives the errors of invalid records.

    Returns:
        One sample per image. The image id is the path relative to `source`, or as listed. A duplicate line of
        the list is read once. An image without a label file has no persons.

    Raises:
        DataError: Files are missing or invalid. The message names file and line.
    """
    person_class_id = select_person_class(names, category, f"{source}: `names`")
    paths = _list_images(source)
    if not paths:
        raise DataError(f"{source}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none.")
    missing = [path for path in paths.values() if not path.is_file()]
    for index, path in enumerate(missing):
        others = f", and {len(missing) - 1} others of the {len(paths)} that {source} lists" if index == 0 else ""
        on_error(DataError(f"{path}: no such image{others}. Add it, or remove it from the list."))
    samples = []
    for image_id, path in paths.items():
        if path.is_file():
            try:
                samples.append(_read_sample(image_id, path, person_class_id, names, on_error))
            except DataError as error:
                on_error(error)
    return samples


def get_label_path(image_path: Path) -> Path:
    """Return the label file of an image: the last directory `images` becomes `labels`, the suffix `.txt`.

    Args:
        image_path: Image file.
    """
    parts = list(image_path.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _list_images(source: Path) -> dict[str, Path]:
    """Return image paths by image id."""
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        return {path.relative_to(source).as_posix(): path for path in paths}
    if not source.is_file():
        raise DataError(f"{source}: no such image directory or image list. Check the path.")
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        lines = ["\0"]
    if any("\0" in line for line in lines):
        raise DataError(f"{source}: not a text file. Expected an image directory or a list of images.")
    return {line: source.parent / line for line in lines if line}


def _read_sample(
    image_id: str, path: Path, person_class_id: int, names: Mapping[int, str], on_error: ErrorHandler
) -> Sample:
    size_hw = read_image_header(path).size_hw
    label_path = get_label_path(path)
    ratios = _read_boxes(label_path, person_class_id, names, on_error) if label_path.exists() else np.zeros((0, 4))
    height, width = size_hw
    boxes = (ratios * [width, height, width, height]).astype(np.float32)
    ground_truth = GroundTruth(boxes, box_area(boxes) <= 0, boxes, ("person",) * len(boxes))
    return Sample(image_id, path, ground_truth, size_hw)


def _read_boxes(
    path: Path, person_class_id: int, names: Mapping[int, str], on_error: ErrorHandler
) -> NDArray[np.float64]:
    """Return the person boxes of a label file, clipped to the image: xyxy [N, 4], 0 to 1."""
    boxes = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            class_id, box = _parse_line(line, names, f"{path}, line {number}")
        except DataError as error:
            on_error(error)
            continue
        if class_id == person_class_id:
            boxes.append(box)
    return np.array(boxes, np.float64).reshape(-1, 4)


def _parse_line(line: str, names: Mapping[int, str], where: str) -> tuple[int, list[float]]:
    """Return class id and xyxy."""
    try:
        row = [float(word) for word in line.split()]
    except ValueError:
        raise DataError(f"{where}: expected `class cx cy w h`, got {line.strip()[:60]!r}.") from None
    if len(row) != 5 or not all(math.isfinite(value) for value in row):
        raise DataError(f"{where}: expected `class cx cy w h` of finite numbers, got {line.strip()[:60]!r}.")
    class_id, x, y, width, height = row
    if class_id not in names:
        raise DataError(f"{where}: class: expected one of the {len(names)} `names`, got {class_id:g}.")
    if width < 0 or height < 0:
        raise make_size_error(where, row[1:])
    if max(map(abs, row[1:])) > MAX_COORDINATE_RATIO:
        raise DataError(
            f"{where}: expected values relative to the image size (0 to 1), got {row[1:]}. "
            "Divide pixels by the image size."
        )
    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    if box[0] >= 1 or box[1] >= 1 or box[2] <= 0 or box[3] <= 0:
        raise DataError(f"{where}: expected a box inside its image, got {row[1:]}.")
    return int(class_id), [min(max(value, 0.0), 1.0) for value in box]
