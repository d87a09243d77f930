"""Ground truth and detections in COCO JSON.

Ground truth: `images`, `annotations` and `categories`. CityPersons adds `height`, `vis_ratio`, `vis_bbox` and `ignore`
to an annotation. Detections: a list of {"image_id", "category_id", "bbox" xywh, "score"}. Files of MATLAB's writer
(dt_mat2json.m) are read too: their ids are fractions (1.0), and a single detection is a bare object.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.base import is_pixel_value
from hkd_det.datasets.person_classes import assign_class_roles
from hkd_det.errors import DataError, UsageError, first_error_line
from hkd_det.files import read_content, write_text
from hkd_det.metrics.tables import DetectionTable, Floats, GroundTruthTable, is_valid_box
from hkd_det.structures import Detections, xywh_from_xyxy

PEDESTRIAN_CATEGORY_ID = 1  # the category that the official CityPersons program evaluates
PERSON_CATEGORY_ID = 1  # of COCO

CocoId = int | float | str
BoxXYWH = tuple[float, float, float, float]


class _Image(msgspec.Struct, gc=False):
    id: CocoId
    file_name: Any = None
    im_name: Any = None  # in the official file of CityPersons
    width: Any = None
    height: Any = None


class _Category(msgspec.Struct, gc=False):
    id: CocoId
    name: str


class _Annotation(msgspec.Struct, gc=False):
    image_id: CocoId
    category_id: CocoId
    bbox: BoxXYWH
    height: float | None = None
    vis_ratio: float | None = None
    vis_bbox: BoxXYWH | None = None
    ignore: float | bool | None = None
    iscrowd: float | bool = 0
    area: float | None = None


class _GroundTruthFile(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category] = []


class _Detection(msgspec.Struct, gc=False):
    image_id: CocoId
    bbox: BoxXYWH
    score: float
    category_id: CocoId | None = None
    id: CocoId | None = None


@dataclass(frozen=True, eq=False)
class CocoGroundTruth:
    """Annotations of the person classes in a COCO file, N in all.

    Attributes:
        path: File that was read.
        image_ids: Ids of the images, sorted as in the official programs.
        persons: Names of the person categories, by id.
        table: Boxes and ignore regions of the person categories.
        area (float64 array[N]): Annotated area in square pixels, for the size classes of COCO.
        iscrowd (bool array[N]): True for crowds.
        categories: Names of all categories, by id.
        file_names: File name of each image; empty strings if the file does not contain them.
        sizes_hw (float64 array[num_images, 2]): Height and width of each image in pixels, NaN if unknown.
    """

    path: Path
    image_ids: tuple[CocoId, ...]
    persons: Mapping[CocoId, str]
    table: GroundTruthTable
    area: Floats
    iscrowd: NDArray[np.bool_]
    categories: Mapping[CocoId, str] = field(default_factory=dict)
    file_names: tuple[str, ...] = ()
    sizes_hw: Floats | None = None


def read_coco_ground_truth(path: Path, category: Sequence[str] = ()) -> CocoGroundTruth:
    """Read the annotations of the person categories.

    Args:
        path: JSON file of annotations.
        category: Names of the categories to read (default: all person classes, as the dataset readers select them).

    Returns:
        Ground-truth table, images and categories.

    Raises:
        UsageError: There is no category of this name, or no person class.
        DataError: The file is missing or an annotation is invalid; the message names both.
    """
    content = _decode_json(path, _GroundTruthFile)
    image_ids = _sort_ids([image.id for image in content.images], path)
    image_index = {image_id: index for index, image_id in enumerate(image_ids)}
    images = sorted(content.images, key=lambda image: image_index[_normalize_id(image.id)])
    categories = {_normalize_id(one.id): one.name for one in content.categories}
    persons = _select_categories(categories, category, path)
    annotations = []
    for number, annotation in enumerate(content.annotations):
        if _normalize_id(annotation.image_id) not in image_index:
            raise DataError(
                f"{path}: annotation {number}: image_id {annotation.image_id!r} is not among its images. Correct it."
            )
        if _normalize_id(annotation.category_id) in persons:
            annotations.append(annotation)
    table = GroundTruthTable(
        len(image_ids),
        np.array([image_index[_normalize_id(record.image_id)] for record in annotations], np.intp),
        _parse_coco_boxes([record.bbox for record in annotations], path, "annotation"),
        _to_array([record.bbox[3] if record.height is None else record.height for record in annotations]),
        _to_array([_compute_record_visible_ratio(record) for record in annotations]),
        np.array([_is_ignored_record(record) for record in annotations], bool),
    )
    area = _to_array(
        [record.bbox[2] * record.bbox[3] if record.area is None else record.area for record in annotations]
    )
    iscrowd = np.array([bool(record.iscrowd) for record in annotations], bool)
    names = [image.im_name if image.file_name is None else image.file_name for image in images]
    file_names = tuple(name if isinstance(name, str) else "" for name in names)
    sides = [[side if is_pixel_value(side) else np.nan for side in (image.height, image.width)] for image in images]
    return CocoGroundTruth(
        path, image_ids, persons, table, area, iscrowd, categories, file_names, _to_array(sides).reshape(-1, 2)
    )


def read_coco_detections(path: Path, ground_truth: CocoGroundTruth) -> DetectionTable:
    """Read the detections of the person categories; a detection without `category_id` belongs to them.

    An `image_id` is an id of the ground truth, or the name of an image file, with or without directory and suffix.

    Args:
        path: JSON file of detections.
        ground_truth: Ground truth that defines images and person categories.

    Returns:
        The detections, sorted by image and descending score.

    Raises:
        DataError: The file is missing or a detection is invalid (unknown image, duplicate id, wrong number).
    """
    records = _read_records(path)
    category_ids = _map_category_ids(records, ground_truth)
    if 0 in category_ids and ground_truth.categories and 0 not in ground_truth.categories:
        raise DataError(
            f"{path}: category_id 0 is not among the categories of {ground_truth.path}: "
            f"{_format_categories(ground_truth.categories)}. Its ids count from 0. Use the category ids of that file."
        )
    is_person = {key: value is None or value in ground_truth.persons for key, value in category_ids.items()}
    persons = [record for record in records if is_person[record.category_id]]
    if records and not persons:
        raise DataError(
            f"{path}: no detection is of category_id {_format_categories(ground_truth.persons)}, the person class of "
            f"{ground_truth.path}. The first has category_id {records[0].category_id!r}. Use the ids of that file."
        )
    return _build_table(persons, ground_truth, path)


def write_coco_detections(
    path: Path, image_ids: Sequence[CocoId], detections: Sequence[Detections], category_id: CocoId = PERSON_CATEGORY_ID
) -> None:
    """Write detections in the result format of COCO, which `read_coco_detections` and pycocotools read.

    Args:
        path: JSON file: a list of `image_id`, `category_id`, `bbox` (xywh, pixels) and `score`.
        image_ids: Id of each image.
        detections: Detections of each image.
        category_id: Category of all detections.
    """
    records = []
    for image_id, found in zip(image_ids, detections, strict=True):
        boxes = xywh_from_xyxy(found.boxes_xyxy.astype(np.float64))  # so that x + width is exactly the right edge
        records += [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for box, score in zip(boxes.tolist(), found.scores.tolist(), strict=True)
        ]
    write_text(path, msgspec.json.encode(records).decode() + "\n")


def read_other_categories(path: Path, ground_truth: CocoGroundTruth) -> dict[CocoId, DetectionTable]:
    """Read the detections of the categories that `read_coco_detections` omits.

    Args:
        path: JSON file of detections, which `read_coco_detections` accepts.
        ground_truth: Ground truth that defines images and person categories.

    Returns:
        The detections by category id. Categories with an unknown image are left out.
    """
    records = _read_records(path)
    tables = {}
    for key, category_id in _map_category_ids(records, ground_truth).items():
        if category_id is not None and category_id not in ground_truth.persons:
            with contextlib.suppress(DataError):
                group = [record for record in records if record.category_id == key]
                tables[category_id] = _build_table(group, ground_truth, path)
    return tables


def find_images_by_name(ground_truth: CocoGroundTruth) -> dict[str, int]:
    """Return the index of each image by its file name, with and without directory and suffix; only unique names.

    Args:
        ground_truth: Ground truth with file names.
    """
    indices: dict[str, set[int]] = {}
    for index, file_name in enumerate(ground_truth.file_names):
        name = PurePosixPath(file_name.replace("\\", "/"))
        for text in {str(name), str(name.with_suffix("")), name.name, name.stem} if file_name else set():
            indices.setdefault(text, set()).add(index)
    return {text: next(iter(found)) for text, found in indices.items() if len(found) == 1}


def _read_records(path: Path) -> list[_Detection]:
    content = _decode_json(path, list[_Detection] | _Detection)
    records: list[_Detection] = content if isinstance(content, list) else [content]
    ids = [_normalize_id(record.id) for record in records if record.id is not None]
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: duplicate detection id {_find_duplicate(ids)!r}. Make the ids unique or omit them.")
    return records


def _build_table(records: Sequence[_Detection], ground_truth: CocoGroundTruth, path: Path) -> DetectionTable:
    image_index = _find_images([_normalize_id(record.image_id) for record in records], ground_truth, path)
    scores = _to_array([record.score for record in records])
    if not np.isfinite(scores).all():
        raise DataError(f"{path}: expected finite scores, got {scores[~np.isfinite(scores)][0]}.")
    return DetectionTable.from_rows(
        image_index, _parse_coco_boxes([record.bbox for record in records], path, "detection"), scores
    )


def _find_images(image_ids: Sequence[CocoId], ground_truth: CocoGroundTruth, path: Path) -> NDArray[np.intp]:
    """Return the image index of each detection. All ids have one meaning: ids of the ground truth, or file names."""
    index_by_id = {image_id: index for index, image_id in enumerate(ground_truth.image_ids)}
    indices = [index_by_id.get(image_id, -1) for image_id in image_ids]
    if -1 in indices:
        unknown = image_ids[indices.index(-1)]
        index_by_name: dict[CocoId, int] = dict(find_images_by_name(ground_truth).items())
        # Ultralytics writes the name without suffix, as a number if it is one.
        index_by_name |= {int(name): index for name, index in index_by_name.items() if str(name).isdecimal()}
        indices = [_find_name(image_id, index_by_name) for image_id in image_ids]
        if -1 in indices:
            index_by_text = {str(image_id): index for image_id, index in index_by_id.items()}
            indices = [index_by_text.get(str(image_id), -1) for image_id in image_ids]
        if -1 in indices:
            raise DataError(
                f"{path}: image_id {unknown!r} is not among the {len(ground_truth.image_ids)} images of "
                f"{ground_truth.path}. Use the ids or the file names (file_name) of that file."
            )
    return np.array(indices, np.intp)


def _find_name(image_id: CocoId, index_by_name: Mapping[CocoId, int]) -> int:
    """Return the image of a file name, whose directory can differ from that of the ground truth, or -1."""
    if image_id in index_by_name or not isinstance(image_id, str):
        return index_by_name.get(image_id, -1)
    name = PurePosixPath(image_id.replace("\\", "/"))
    return index_by_name.get(name.name, index_by_name.get(name.stem, -1))


def _map_category_ids(
    records: Sequence[_Detection], ground_truth: CocoGroundTruth
) -> dict[CocoId | None, CocoId | None]:
    """Return the category of each `category_id` of the detections, which can be the name of a category."""
    key_by_name = {name.casefold(): key for key, name in ground_truth.categories.items()}
    category_ids: dict[CocoId | None, CocoId | None] = {}
    for key in {record.category_id for record in records}:
        category_id = None if key is None else _normalize_id(key)
        if isinstance(category_id, str) and category_id not in ground_truth.categories:
            number = int(category_id) if category_id.isdecimal() else category_id
            category_id = key_by_name.get(category_id.casefold(), number)
        category_ids[key] = category_id
    return category_ids


def _select_categories(categories: Mapping[CocoId, str], names: Sequence[str], path: Path) -> dict[CocoId, str]:
    """Return the categories to evaluate, by id."""
    if not categories and not names:
        return {PEDESTRIAN_CATEGORY_ID: "pedestrian"}
    if not names:
        try:
            roles = assign_class_roles(categories, "", "", str(path))
        except DataError:
            listed = ", ".join(categories.values())
            raise UsageError(f"--category: expected one of {listed[:500]}: {path} has no person class.") from None
        return {key: categories[key] for key in sorted(roles.persons, key=list(categories).index)}
    selected = {key: name for key, name in categories.items() if name.casefold() in map(str.casefold, names)}
    missing = [name for name in names if name.casefold() not in map(str.casefold, selected.values())]
    if missing:
        listed = ", ".join(categories.values()) or "none"
        raise UsageError(f"--category {missing[0]}: expected a category of {path}, got {listed[:500]}.")
    return selected


def _format_categories(categories: Mapping[CocoId, str]) -> str:
    return ", ".join(f"{key!r} ({name})" for key, name in list(categories.items())[:20])


def _decode_json(path: Path, cls: Any) -> Any:
    raw = read_content(path, "a COCO JSON file")
    try:
        return msgspec.json.decode(raw.removeprefix(b"\xef\xbb\xbf"), type=cls)
    except RecursionError:
        raise DataError(f"{path}: expected a COCO JSON file, got one that is nested too deeply.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a COCO JSON file: {first_error_line(error)}.") from None


def _sort_ids(image_ids: Sequence[CocoId], path: Path) -> tuple[CocoId, ...]:
    ids = [_normalize_id(image_id) for image_id in image_ids]
    if not ids:
        raise DataError(f"{path}: images: expected at least one image.")
    if len({isinstance(image_id, str) for image_id in ids}) > 1:
        raise DataError(f"{path}: its image ids are strings and numbers. Use one type for all.")
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: duplicate image id {_find_duplicate(ids)!r}. Give each image its own id.")
    return tuple(sorted(ids))


def _find_duplicate(ids: Sequence[CocoId]) -> CocoId:
    return Counter(ids).most_common(1)[0][0]


def _parse_coco_boxes(raw_boxes: Sequence[BoxXYWH], path: Path, record_name: str) -> Floats:
    boxes = _to_array(raw_boxes).reshape(-1, 4)
    is_invalid = ~is_valid_box(boxes)
    if is_invalid.any():
        box = boxes[int(np.argmax(is_invalid))].tolist()
        raise DataError(
            f"{path}: {record_name}: expected a bbox [x, y, width, height] with finite sizes of at least 0, got {box}."
        )
    return boxes


def _compute_record_visible_ratio(record: _Annotation) -> float:
    if record.vis_ratio is not None:
        return record.vis_ratio
    if record.vis_bbox is None or not record.bbox[2] * record.bbox[3]:
        return 1.0
    return record.vis_bbox[2] * record.vis_bbox[3] / (record.bbox[2] * record.bbox[3])


def _is_ignored_record(record: _Annotation) -> bool:
    """Return whether an annotation is an ignore region.

    In CityPersons' own form (with height and vis_ratio), an annotation without `ignore` is a person: the official
    program does not read `iscrowd`.
    """
    if record.ignore is None and record.height is not None and record.vis_ratio is not None:
        return False
    return bool(record.iscrowd if record.ignore is None else record.ignore)


def _to_array(values: Sequence[Any]) -> Floats:
    return np.array(values, np.float64)


def _normalize_id(value: CocoId) -> CocoId:
    """Convert the fractions that MATLAB writes: 1.0 is 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
