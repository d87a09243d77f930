"""CityPersons (Zhang, Benenson, Schiele 2017): the official .mat files, or the gtBboxCityPersons JSON tree.

A record is a whole box and a visible box of one of six labels. Pedestrians are to be found; riders, sitting
and other persons, groups and ignore regions are ignore regions here, as the official evaluation has them.
Boxes are kept as annotated, also where they reach beyond the picture: the evaluation uses them so.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.datasets.base import ErrorHandler, JsonLocations, filter_missing_images, raise_error
from hkd_det.datasets.mat_file import read_mat, to_float_array, to_text
from hkd_det.errors import DataError
from hkd_det.files import read_json
from hkd_det.structures import GroundTruth, Sample

LABELS = ("ignore", "pedestrian", "rider", "sitting person", "other person", "people group")
PEDESTRIAN = LABELS.index("pedestrian")
# The JSON tree and older tools name two of the labels differently.
JSON_LABELS = {
    **{name: number for number, name in enumerate(LABELS)},
    "person (other)": 4,
    "person group": 5,
    "ignore region": 0,
}
MAX_COORDINATE_PX = 2.0**24  # whole pixels beyond it are not exact in float32
DIRECTORY_LAYOUT = (
    "leftImg8bit/{split}/CITY/*_leftImg8bit.png and annotations/anno_{split}.mat, "
    "or gtBboxCityPersons/{split}/CITY/*_gtBboxCityPersons.json in its place"
)


def read_citypersons(
    root: Path, split: str, skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Every picture of a split (train or val), every record kept.

    present_only: leave out pictures that are not on disk; otherwise a missing one is a DataError that names it.
    Raises DataError, naming file and picture, for annotations that are missing or wrong.
    """
    mat = next(
        (p for p in (root / "annotations" / f"anno_{split}.mat", root / f"anno_{split}.mat") if p.exists()), None
    )
    tree = root / "gtBboxCityPersons" / split
    pictures = root / "leftImg8bit" / split
    if mat is not None:
        samples = _read_mat_samples(mat, pictures, on_error)
    elif tree.is_dir():
        samples = _read_json_samples(tree, pictures, on_error)
    else:
        raise DataError(
            f"{root}: no CityPersons annotations of {split}; expected {DIRECTORY_LAYOUT.format(split=split)}"
        )
    return filter_missing_images(samples, skip_missing, str(pictures), on_error)


def _read_mat_samples(path: Path, image_dir: Path, on_error: ErrorHandler = raise_error) -> list[Sample]:
    samples = []
    for number, record in enumerate(_read_mat_records(path), 1):
        try:
            samples.append(_parse_mat_sample(record, f"{path}: picture {number}", path, image_dir, on_error))
        except DataError as fault:
            on_error(fault)
    return samples


def _parse_mat_sample(
    record: dict[str, Any], where: str, path: Path, image_dir: Path, on_error: ErrorHandler
) -> Sample:
    try:
        city, name = to_text(record["cityname"]), to_text(record["im_name"])
        rows = to_float_array(record["bbs"])
    except (ValueError, KeyError) as error:
        raise DataError(f"{where}: not a CityPersons record ({error})") from None
    if rows.size == 0:
        rows = rows.reshape(0, 10)
    if rows.ndim != 2 or rows.shape[1] != 10:
        raise DataError(f"{path}: {name}: its bbs have the shape {rows.shape}, expected (records, 10)")
    kept = []
    for number, row in enumerate(rows[:, [0, 1, 2, 3, 4, 6, 7, 8, 9]], 1):
        try:
            kept.append(_check_record(row, f"{path}: {name}: record {number}"))
        except DataError as fault:
            on_error(fault)
    return Sample(_get_image_id(name), image_dir / city / name, _build_ground_truth(kept))


def _read_mat_records(path: Path) -> list[dict[str, Any]]:
    content = read_mat(path)
    cells = next(iter(content.values())) if len(content) == 1 else None
    if not isinstance(cells, np.ndarray) or cells.dtype != object or cells.ndim != 2 or cells.shape[0] != 1:
        raise DataError(
            f"{path}: holds {', '.join(content) or 'nothing'}, expected one cell array anno_*_aligned of (1, pictures)"
        )
    records = []
    for number, cell in enumerate(cells[0], 1):
        if not isinstance(cell, np.ndarray) or cell.shape != (1, 1) or not isinstance(cell[0, 0], dict):
            raise DataError(f"{path}: picture {number}: not a struct of cityname, im_name and bbs")
        records.append(cell[0, 0])
    return records


def _read_json_samples(annotation_dir: Path, image_dir: Path, on_error: ErrorHandler) -> list[Sample]:
    files = sorted(annotation_dir.glob("*/*_gtBboxCityPersons.json"))
    if not files:
        raise DataError(f"{annotation_dir}: holds no CITY/*_gtBboxCityPersons.json")
    samples = []
    for path in files:
        try:
            samples.append(_read_json_sample(path, image_dir, on_error))
        except DataError as fault:
            on_error(fault)
    return samples


def _read_json_sample(path: Path, image_dir: Path, on_error: ErrorHandler) -> Sample:
    name = path.name.replace("_gtBboxCityPersons.json", "_leftImg8bit.png")
    content = read_json(path)
    try:
        size_hw = int(content["imgHeight"]), int(content["imgWidth"])
        objects = content["objects"]
        if not isinstance(objects, list):
            raise ValueError("objects is no list")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a gtBboxCityPersons file ({type(error).__name__}: {error})") from None
    places, kept = JsonLocations(path), []
    for number, entry in enumerate(objects):
        try:
            kept.append(_parse_json_record(entry, f"{path}: record {number + 1}"))
        except DataError as fault:
            on_error(places.annotate(fault, "objects", number))
    return Sample(_get_image_id(name), image_dir / path.parent.name / name, _build_ground_truth(kept), size_hw)


def _parse_json_record(entry: Any, where: str) -> NDArray[np.float64]:
    try:
        label = JSON_LABELS[entry["label"]]
        boxes = np.array([entry["bbox"], entry["bboxVis"]], np.float64)
        if boxes.shape != (2, 4):
            raise ValueError("a box is four numbers")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: not a record of label, bbox and bboxVis ({type(error).__name__}: {error})") from None
    return _check_record(np.array([label, *boxes.ravel()]), where)


def _check_record(record: NDArray[np.float64], where: str) -> NDArray[np.float64]:
    """A record of label, whole and visible box xywh [9], as it is; DataError for one that can't be meant."""
    label, box = record[0], record[1:]
    if label not in range(len(LABELS)):
        raise DataError(f"{where}: label {label:g} is none of 0 to {len(LABELS) - 1}")
    if not (np.abs(box) <= MAX_COORDINATE_PX).all():
        raise DataError(f"{where}: {box.tolist()} holds NaN, infinity or no pixels")
    if (box[[2, 3, 6, 7]] < 0).any():
        raise DataError(f"{where}: {box.tolist()} has a negative width or height")
    return record


def _build_ground_truth(records: list[NDArray[np.float64]]) -> GroundTruth:
    rows = np.array(records, np.float64).reshape(-1, 9)
    return GroundTruth(
        box_math.xyxy_from_xywh(rows[:, 1:5]).astype(np.float32),
        rows[:, 0] != PEDESTRIAN,
        box_math.xyxy_from_xywh(rows[:, 5:]).astype(np.float32),
        tuple(LABELS[int(label)] for label in rows[:, 0]),
    )


def _get_image_id(name: str) -> str:
    """A picture's id: its file name without ending and `_leftImg8bit`."""
    return name.removesuffix(".png").removesuffix("_leftImg8bit")
