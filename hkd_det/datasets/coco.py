"""COCO JSON: boxes xywh in pixels; crowds, boxes marked `ignore` and boxes without area are ignore regions.

A box is cut at its picture's borders, unless a `vis_bbox` says which part of it can be seen: then it is the
whole person, as far as that reaches.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from hkd_det import boxes as box_math
from hkd_det.datasets.base import ErrorHandler, JsonLocations, raise_error, select_person_class
from hkd_det.errors import DataError
from hkd_det.files import read_json
from hkd_det.structures import GroundTruth, Sample

MAX_COORDINATE_PX = 2.0**24  # whole pixels beyond it are not exact in float32
PersonRecord = tuple[box_math.Boxes, box_math.Boxes, bool]  # whole box xyxy [4], visible box xyxy [4], to be ignored


def read_coco(
    annotations: Path, images: Path, category: str = "", on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Every picture of an annotation file, its people as truth.

    images: the folder that `file_name` is relative to. category: the person category's name; by default the
    one called person or pedestrian, or the only one.
    Raises DataError, naming the file and the record.
    """
    content = read_json(annotations)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(f"{annotations}: not a COCO file: it needs the lists 'images', 'annotations' and 'categories'")
    categories = _parse_categories(content["categories"], annotations)
    wanted = select_person_class(categories, category, f"{annotations}: its categories")
    places = JsonLocations(annotations)
    pictures = _parse_images(content["images"], annotations, places, on_error)
    faulty = {image["id"] for image in content["images"] if _has_id(image, "id")} - pictures.keys()
    people: dict[Any, list[PersonRecord]] = defaultdict(list)
    for number, record in enumerate(content["annotations"]):
        if _has_id(record, "image_id") and record["image_id"] in faulty:
            continue  # reported with its picture
        try:
            _check_record(record, pictures, categories, annotations)
            if record["category_id"] == wanted:
                people[record["image_id"]].append(_parse_person(record, pictures[record["image_id"]], annotations))
        except DataError as fault:
            on_error(places.annotate(fault, "annotations", number))
    return [
        Sample(image_id, images / image["file_name"], _build_ground_truth(people[image_id]), _get_size_hw(image))
        for image_id, image in pictures.items()
    ]


def _parse_categories(categories: list[Any], path: Path) -> dict[Any, str]:
    for entry in categories:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise DataError(f"{path}: 'categories' must be a list of objects with id and name")
    return {entry["id"]: entry["name"] for entry in categories}


def _parse_images(
    images: list[Any], path: Path, locations: JsonLocations, on_error: ErrorHandler
) -> dict[Any, dict[str, Any]]:
    if not images:
        raise DataError(f"{path}: lists no pictures")
    pictures: dict[Any, dict[str, Any]] = {}
    for number, image in enumerate(images):
        try:
            _check_image(image, pictures, path)
            pictures[image["id"]] = image
        except DataError as fault:
            on_error(locations.annotate(fault, "images", number))
    return pictures


def _check_image(image: Any, images_by_id: dict[Any, Any], path: Path) -> None:
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
        raise DataError(f"{path}: picture {_format_record_id(image)} has no id or file_name")
    if not _is_id(image["id"]):
        raise DataError(f"{path}: picture id {image['id']!r} is neither a number nor a text")
    if image["id"] in images_by_id:
        raise DataError(f"{path}: picture id {image['id']} stands twice")
    if any(key in image and not _is_valid_size(image[key]) for key in ("width", "height")):
        raise DataError(
            f"{path}: picture {_format_record_id(image)}: width {image.get('width')!r} and height {image.get('height')!r} "
            "must be whole numbers of pixels"
        )


def _check_record(record: Any, images_by_id: dict[Any, Any], categories: dict[Any, str], path: Path) -> None:
    if not isinstance(record, dict) or not {"image_id", "category_id", "bbox"} <= record.keys():
        raise DataError(f"{path}: annotation {_format_record_id(record)} has no image_id, category_id or bbox")
    for key, listed in (("image_id", images_by_id), ("category_id", categories)):
        if not _is_id(record[key]) or record[key] not in listed:
            raise DataError(f"{path}: annotation {_format_record_id(record)}: its {key} {record[key]!r} is not listed")


def _build_ground_truth(records: list[PersonRecord]) -> GroundTruth:
    whole = np.array([one[0] for one in records], np.float32).reshape(-1, 4)
    seen = np.array([one[1] for one in records], np.float32).reshape(-1, 4)
    marked = np.array([one[2] for one in records], bool)
    return GroundTruth(whole, marked | (box_math.box_area(whole) <= 0), seen, ("person",) * len(records))


def _parse_person(record: dict[str, Any], image: dict[str, Any], path: Path) -> PersonRecord:
    return *_parse_boxes(record, image, path), bool(record.get("iscrowd")) or bool(record.get("ignore"))


def _parse_boxes(record: dict[str, Any], image: dict[str, Any], path: Path) -> tuple[box_math.Boxes, box_math.Boxes]:
    """A record's whole and visible box, xyxy [4]."""
    whole = _parse_box(record, "bbox", path)
    seen = _parse_box(record, "vis_bbox", path) if "vis_bbox" in record else whole
    size_hw = _get_size_hw(image)
    if size_hw is None:
        return whole[0], seen[0]
    cut = box_math.clip_boxes(seen, size_hw)
    if box_math.box_area(seen) > 0 and box_math.box_area(cut) <= 0:
        raise DataError(f"{path}: annotation {_format_record_id(record)}: box {record['bbox']} is outside its picture")
    return (whole[0], seen[0]) if "vis_bbox" in record else (cut[0], cut[0])


def _parse_box(record: dict[str, Any], key: str, path: Path) -> box_math.Boxes:
    """[1, 4] xyxy."""
    box = record[key]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_coordinate, box)) or box[2] < 0 or box[3] < 0:
        raise DataError(
            f"{path}: annotation {_format_record_id(record)}: {key} {box!r:.80} is not [x, y, width, height] in pixels"
        )
    return box_math.xyxy_from_xywh(np.array(box, np.float64))


def _get_size_hw(image: dict[str, Any]) -> tuple[int, int] | None:
    return (int(image["height"]), int(image["width"])) if {"height", "width"} <= image.keys() else None


def _has_id(record: Any, key: str) -> bool:
    return isinstance(record, dict) and _is_id(record.get(key))


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _is_valid_size(value: Any) -> bool:
    return _is_coordinate(value) and value > 0 and value % 1 == 0  # some tools write 640.0


def _is_coordinate(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= MAX_COORDINATE_PX  # NaN and infinity are not


def _format_record_id(record: Any) -> str:
    return f"{record['id']}" if isinstance(record, dict) and "id" in record else repr(record)[:60]
