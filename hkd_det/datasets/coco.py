"""COCO JSON (Lin et al., ECCV 2014): boxes xywh in pixels.

Crowds, boxes marked `ignore`, and boxes without area are ignore regions. A box is clipped to its image. If the
record has a `vis_bbox` (visible box), its `bbox` is a full-body box and is not clipped.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from hkd_det.boxes import Boxes, box_area, clip_boxes, xyxy_from_xywh
from hkd_det.datasets.base import (
    ErrorHandler,
    is_pixel_value,
    make_outside_error,
    raise_error,
    select_person_class,
)
from hkd_det.datasets.json_locations import JsonLocations
from hkd_det.errors import DataError
from hkd_det.files import read_json
from hkd_det.structures import GroundTruth, Sample

PersonRecord = tuple[Boxes, Boxes, bool]  # full box xyxy [4], visible box xyxy [4], ignore


def read_coco(
    annotations: Path, images: Path, category: str = "", on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Read a COCO annotation file.

    Args:
        annotations: JSON file with the lists `images`, `annotations` and `categories`.
        images: Directory that each `file_name` is relative to.
        category: Name of the person category (default: "person" or "pedestrian", or the only category).
        on_error: Receives the errors of invalid records.

    Returns:
        One sample per image, including images without persons.

    Raises:
        DataError: The file is missing or invalid. The message names file, line and record.
    """
    content = read_json(annotations)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(f"{annotations}: expected a COCO file with the lists 'images', 'annotations' and 'categories'.")
    categories = _parse_categories(content["categories"], annotations)
    person_id = select_person_class(categories, category, f"{annotations}: categories")
    locations = JsonLocations(annotations)
    images_by_id = _parse_images(content["images"], annotations, locations, on_error)
    invalid_ids = {image["id"] for image in content["images"] if _has_id(image, "id")} - images_by_id.keys()
    persons: dict[Any, list[PersonRecord]] = defaultdict(list)
    for index, record in enumerate(content["annotations"]):
        if _has_id(record, "image_id") and record["image_id"] in invalid_ids:
            continue  # reported with its image
        try:
            _check_record(record, images_by_id, categories, annotations)
            if record["category_id"] == person_id:
                image_id = record["image_id"]
                persons[image_id].append(_parse_person(record, images_by_id[image_id], annotations))
        except DataError as error:
            on_error(locations.annotate(error, "annotations", index))
    return [
        Sample(image_id, images / image["file_name"], _build_ground_truth(persons[image_id]), _get_size_hw(image))
        for image_id, image in images_by_id.items()
    ]


def _parse_categories(categories: list[Any], path: Path) -> dict[Any, str]:
    for entry in categories:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise DataError(f"{path}: categories: expected a list of objects with id and name.")
    return {entry["id"]: entry["name"] for entry in categories}


def _parse_images(
    images: list[Any], path: Path, locations: JsonLocations, on_error: ErrorHandler
) -> dict[Any, dict[str, Any]]:
    if not images:
        raise DataError(f"{path}: images: expected at least one image.")
    images_by_id: dict[Any, dict[str, Any]] = {}
    for index, image in enumerate(images):
        try:
            _check_image(image, images_by_id, path)
            images_by_id[image["id"]] = image
        except DataError as error:
            on_error(locations.annotate(error, "images", index))
    return images_by_id


def _check_image(image: Any, images_by_id: dict[Any, Any], path: Path) -> None:
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
        raise DataError(f"{path}: image {_format_record_id(image)}: expected an id and a file_name.")
    if not _is_id(image["id"]):
        raise DataError(f"{path}: image id: expected a number or a string, got {image['id']!r}.")
    if image["id"] in images_by_id:
        raise DataError(f"{path}: duplicate image id {image['id']}. Give each image its own id.")
    if any(key in image and not _is_valid_size(image[key]) for key in ("width", "height")):
        raise DataError(
            f"{path}: image {_format_record_id(image)}: expected a width and height of at least 1, got "
            f"{image.get('width')!r} and {image.get('height')!r}."
        )


def _check_record(record: Any, images_by_id: dict[Any, Any], categories: dict[Any, str], path: Path) -> None:
    if not isinstance(record, dict) or not {"image_id", "category_id", "bbox"} <= record.keys():
        raise DataError(f"{path}: annotation {_format_record_id(record)}: expected image_id, category_id and bbox.")
    for key, known in (("image_id", images_by_id), ("category_id", categories)):
        if not _is_id(record[key]) or record[key] not in known:
            where = f"{path}: annotation {_format_record_id(record)}"
            raise DataError(f"{where}: {key} {record[key]!r} is not in the file. Add it, or remove the annotation.")


def _build_ground_truth(records: list[PersonRecord]) -> GroundTruth:
    boxes = np.array([record[0] for record in records], np.float32).reshape(-1, 4)
    visible = np.array([record[1] for record in records], np.float32).reshape(-1, 4)
    ignore = np.array([record[2] for record in records], bool)
    return GroundTruth(boxes, ignore | (box_area(boxes) <= 0), visible, ("person",) * len(records))


def _parse_person(record: dict[str, Any], image: dict[str, Any], path: Path) -> PersonRecord:
    return *_parse_boxes(record, image, path), bool(record.get("iscrowd")) or bool(record.get("ignore"))


def _parse_boxes(record: dict[str, Any], image: dict[str, Any], path: Path) -> tuple[Boxes, Boxes]:
    """Return the full box and the visible box, xyxy [4] each."""
    boxes = _parse_box(record, "bbox", path)
    visible = _parse_box(record, "vis_bbox", path) if "vis_bbox" in record else boxes
    size_hw = _get_size_hw(image)
    if size_hw is None:
        return boxes[0], visible[0]
    clipped = clip_boxes(visible, size_hw)
    if box_area(visible) > 0 and box_area(clipped) <= 0:
        raise make_outside_error(f"{path}: annotation {_format_record_id(record)}", record["bbox"], size_hw)
    return (boxes[0], visible[0]) if "vis_bbox" in record else (clipped[0], clipped[0])


def _parse_box(record: dict[str, Any], key: str, path: Path) -> Boxes:
    """Return a box as xyxy [1, 4]."""
    box = record[key]
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_pixel_value, box)) or box[2] < 0 or box[3] < 0:
        raise DataError(
            f"{path}: annotation {_format_record_id(record)}: {key}: expected [x, y, width, height] in pixels, got "
            f"{box!r:.80}."
        )
    return xyxy_from_xywh(np.array(box, np.float64))


def _get_size_hw(image: dict[str, Any]) -> tuple[int, int] | None:
    return (int(image["height"]), int(image["width"])) if {"height", "width"} <= image.keys() else None


def _has_id(record: Any, key: str) -> bool:
    return isinstance(record, dict) and _is_id(record.get(key))


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _is_valid_size(value: Any) -> bool:
    return is_pixel_value(value) and value > 0 and value % 1 == 0  # some tools write 640.0


def _format_record_id(record: Any) -> str:
    return f"{record['id']}" if isinstance(record, dict) and "id" in record else repr(record)[:60]
