"""CityPersons (Zhang, Benenson and Schiele, CVPR 2017): the official .mat files or the gtBboxCityPersons JSON files.

A record has a full-body box, a visible box and one of six labels. Only `pedestrian` is a person to detect. The
official evaluation ignores riders, sitting and other persons, groups and ignore regions, and so does this reader.
It does not clip boxes, because the evaluation uses them as annotated.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.base import (
    MAX_COORDINATE_PX,
    ErrorHandler,
    JsonLocations,
    filter_missing_images,
    make_coordinate_error,
    make_size_error,
    raise_error,
)
from hkd_det.datasets.mat_file import read_mat, to_float_array, to_text
from hkd_det.errors import DataError
from hkd_det.files import read_json
from hkd_det.structures import GroundTruth, Sample, xyxy_from_xywh

LABELS = ("ignore", "pedestrian", "rider", "sitting person", "other person", "people group")
PEDESTRIAN = LABELS.index("pedestrian")
# The JSON files and older tools use other names for some labels.
JSON_LABELS = {
    **{name: number for number, name in enumerate(LABELS)},
    "person (other)": 4,
    "person group": 5,
    "ignore region": 0,
}
DIRECTORY_LAYOUT = (
    "leftImg8bit/{split}/CITY/*_leftImg8bit.png and annotations/anno_{split}.mat, "
    "or gtBboxCityPersons/{split}/CITY/*_gtBboxCityPersons.json instead of the .mat file"
)


def read_citypersons(
    root: Path, split: str, skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Read a CityPersons split.

    Args:
        root: Directory with `leftImg8bit/` and the annotations.
        split: "train" or "val".
        skip_missing: Omit images that do not exist.
        on_error: Receives the errors of invalid records.

    Returns:
        Samples with all records of each image. The image id is the file name without `_leftImg8bit.png`.

    Raises:
        DataError: Annotations or images are missing or invalid. The message names file and image.
    """
    mat_paths = (root / "annotations" / f"anno_{split}.mat", root / f"anno_{split}.mat")
    mat_path = next((path for path in mat_paths if path.exists()), None)
    json_dir = root / "gtBboxCityPersons" / split
    image_dir = root / "leftImg8bit" / split
    if mat_path is not None:
        samples = _read_mat_samples(mat_path, image_dir, on_error)
    elif json_dir.is_dir():
        samples = _read_json_samples(json_dir, image_dir, on_error)
    else:
        raise DataError(
            f"{root}: no CityPersons annotations of {split}. Expected {DIRECTORY_LAYOUT.format(split=split)}."
        )
    return filter_missing_images(samples, skip_missing, str(image_dir), on_error)


def _read_mat_samples(path: Path, image_dir: Path, on_error: ErrorHandler = raise_error) -> list[Sample]:
    samples = []
    for number, record in enumerate(_read_mat_records(path), 1):
        try:
            samples.append(_parse_mat_sample(record, f"{path}: image {number}", path, image_dir, on_error))
        except DataError as error:
            on_error(error)
    return samples


def _parse_mat_sample(
    record: dict[str, Any], where: str, path: Path, image_dir: Path, on_error: ErrorHandler
) -> Sample:
    try:
        city, name = to_text(record["cityname"]), to_text(record["im_name"])
        rows = to_float_array(record["bbs"])
    except (ValueError, KeyError) as error:
        raise DataError(f"{where}: expected a CityPersons record ({error}).") from None
    if rows.size == 0:
        rows = rows.reshape(0, 10)
    if rows.ndim != 2 or rows.shape[1] != 10:
        raise DataError(f"{path}: {name}: bbs: expected the shape (records, 10), got {rows.shape}.")
    records = []
    for number, row in enumerate(rows[:, [0, 1, 2, 3, 4, 6, 7, 8, 9]], 1):
        try:
            records.append(_check_record(row, f"{path}: {name}: record {number}"))
        except DataError as error:
            on_error(error)
    return Sample(_get_image_id(name), image_dir / city / name, _build_ground_truth(records))


def _read_mat_records(path: Path) -> list[dict[str, Any]]:
    content = read_mat(path)
    cells = next(iter(content.values())) if len(content) == 1 else None
    if not isinstance(cells, np.ndarray) or cells.dtype != object or cells.ndim != 2 or cells.shape[0] != 1:
        raise DataError(
            f"{path}: expected one cell array anno_*_aligned of (1, images), got "
            f"{', '.join(content) or 'no variables'}."
        )
    records = []
    for number, cell in enumerate(cells[0], 1):
        if not isinstance(cell, np.ndarray) or cell.shape != (1, 1) or not isinstance(cell[0, 0], dict):
            raise DataError(f"{path}: image {number}: expected a struct of cityname, im_name and bbs.")
        records.append(cell[0, 0])
    return records


def _read_json_samples(annotation_dir: Path, image_dir: Path, on_error: ErrorHandler) -> list[Sample]:
    files = sorted(annotation_dir.glob("*/*_gtBboxCityPersons.json"))
    if not files:
        raise DataError(f"{annotation_dir}: expected files CITY/*_gtBboxCityPersons.json, got none.")
    samples = []
    for path in files:
        try:
            samples.append(_read_json_sample(path, image_dir, on_error))
        except DataError as error:
            on_error(error)
    return samples


def _read_json_sample(path: Path, image_dir: Path, on_error: ErrorHandler) -> Sample:
    name = path.name.replace("_gtBboxCityPersons.json", "_leftImg8bit.png")
    content = read_json(path)
    try:
        size_hw = int(content["imgHeight"]), int(content["imgWidth"])
        objects = content["objects"]
        if not isinstance(objects, list):
            raise ValueError("objects is not a list")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: expected a gtBboxCityPersons file ({type(error).__name__}: {error}).") from None
    locations, records = JsonLocations(path), []
    for index, entry in enumerate(objects):
        try:
            records.append(_parse_json_record(entry, f"{path}: record {index + 1}"))
        except DataError as error:
            on_error(locations.annotate(error, "objects", index))
    return Sample(_get_image_id(name), image_dir / path.parent.name / name, _build_ground_truth(records), size_hw)


def _parse_json_record(entry: Any, where: str) -> NDArray[np.float64]:
    try:
        label = JSON_LABELS[entry["label"]]
        boxes = np.array([entry["bbox"], entry["bboxVis"]], np.float64)
        if boxes.shape != (2, 4):
            raise ValueError("a box must have four numbers")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{where}: expected a record of label, bbox and bboxVis ({reason}).") from None
    return _check_record(np.array([label, *boxes.ravel()]), where)


def _check_record(record: NDArray[np.float64], where: str) -> NDArray[np.float64]:
    """Check and return a record of label, full box and visible box (xywh), array[9]."""
    label, boxes = record[0], record[1:]
    if label not in range(len(LABELS)):
        raise DataError(f"{where}: label: expected 0 to {len(LABELS) - 1}, got {label:g}.")
    if not (np.abs(boxes) <= MAX_COORDINATE_PX).all():
        raise make_coordinate_error(where, boxes.tolist())
    if (boxes[[2, 3, 6, 7]] < 0).any():
        raise make_size_error(where, boxes.tolist())
    return record


def _build_ground_truth(records: list[NDArray[np.float64]]) -> GroundTruth:
    rows = np.array(records, np.float64).reshape(-1, 9)
    return GroundTruth(
        xyxy_from_xywh(rows[:, 1:5]).astype(np.float32),
        rows[:, 0] != PEDESTRIAN,
        xyxy_from_xywh(rows[:, 5:]).astype(np.float32),
        tuple(LABELS[int(label)] for label in rows[:, 0]),
    )


def _get_image_id(name: str) -> str:
    return name.removesuffix(".png").removesuffix("_leftImg8bit")
