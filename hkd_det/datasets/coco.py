"""COCO JSON: boxes xywh in pixels; crowds, boxes marked `ignore` and boxes without area are ignore regions.

A box is cut at its picture's borders, unless a `vis_bbox` says which part of it can be seen: then it is the
whole person, as far as that reaches.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from hkd_det import boxes as box_math
from hkd_det.datasets.faults import OnFault, stop
from hkd_det.datasets.json_file import read_json
from hkd_det.datasets.json_places import JsonPlaces
from hkd_det.datasets.person_class import choose_person
from hkd_det.datasets.sample import Sample, Truth
from hkd_det.errors import DataError

LARGEST_PX = 2.0**24  # whole pixels beyond it are not exact in float32
Person = tuple[box_math.Boxes, box_math.Boxes, bool]  # whole box xyxy [4], visible box xyxy [4], to be ignored


def read_coco(annotations: Path, images: Path, category: str = "", on_fault: OnFault = stop) -> list[Sample]:
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
    categories = _categories(content["categories"], annotations)
    wanted = choose_person(categories, category, f"{annotations}: its categories")
    places = JsonPlaces(annotations)
    pictures = _pictures(content["images"], annotations, places, on_fault)
    faulty = {image["id"] for image in content["images"] if _has_id(image, "id")} - pictures.keys()
    people: dict[Any, list[Person]] = defaultdict(list)
    for number, record in enumerate(content["annotations"]):
        if _has_id(record, "image_id") and record["image_id"] in faulty:
            continue  # reported with its picture
        try:
            _check_record(record, pictures, categories, annotations)
            if record["category_id"] == wanted:
                people[record["image_id"]].append(_person(record, pictures[record["image_id"]], annotations))
        except DataError as fault:
            on_fault(places.told(fault, "annotations", number))
    return [
        Sample(image_id, images / image["file_name"], _truth(people[image_id]), _size(image))
        for image_id, image in pictures.items()
    ]


def _categories(categories: list[Any], path: Path) -> dict[Any, str]:
    for entry in categories:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise DataError(f"{path}: 'categories' must be a list of objects with id and name")
    return {entry["id"]: entry["name"] for entry in categories}


def _pictures(images: list[Any], path: Path, places: JsonPlaces, on_fault: OnFault) -> dict[Any, dict[str, Any]]:
    if not images:
        raise DataError(f"{path}: lists no pictures")
    pictures: dict[Any, dict[str, Any]] = {}
    for number, image in enumerate(images):
        try:
            _check_picture(image, pictures, path)
            pictures[image["id"]] = image
        except DataError as fault:
            on_fault(places.told(fault, "images", number))
    return pictures


def _check_picture(image: Any, pictures: dict[Any, Any], path: Path) -> None:
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
        raise DataError(f"{path}: picture {_name(image)} has no id or file_name")
    if not _is_id(image["id"]):
        raise DataError(f"{path}: picture id {image['id']!r} is neither a number nor a text")
    if image["id"] in pictures:
        raise DataError(f"{path}: picture id {image['id']} stands twice")
    if any(key in image and not _is_side(image[key]) for key in ("width", "height")):
        raise DataError(
            f"{path}: picture {_name(image)}: width {image.get('width')!r} and height {image.get('height')!r} "
            "must be whole numbers of pixels"
        )


def _check_record(record: Any, pictures: dict[Any, Any], categories: dict[Any, str], path: Path) -> None:
    if not isinstance(record, dict) or not {"image_id", "category_id", "bbox"} <= record.keys():
        raise DataError(f"{path}: annotation {_name(record)} has no image_id, category_id or bbox")
    for key, listed in (("image_id", pictures), ("category_id", categories)):
        if not _is_id(record[key]) or record[key] not in listed:
            raise DataError(f"{path}: annotation {_name(record)}: its {key} {record[key]!r} is not listed")


def _truth(people: list[Person]) -> Truth:
    whole = np.array([one[0] for one in people], np.float32).reshape(-1, 4)
    seen = np.array([one[1] for one in people], np.float32).reshape(-1, 4)
    marked = np.array([one[2] for one in people], bool)
    return Truth(whole, marked | (box_math.area(whole) <= 0), seen, ("person",) * len(people))


def _person(record: dict[str, Any], image: dict[str, Any], path: Path) -> Person:
    return *_boxes(record, image, path), bool(record.get("iscrowd")) or bool(record.get("ignore"))


def _boxes(record: dict[str, Any], image: dict[str, Any], path: Path) -> tuple[box_math.Boxes, box_math.Boxes]:
    """A record's whole and visible box, xyxy [4]."""
    whole = _box(record, "bbox", path)
    seen = _box(record, "vis_bbox", path) if "vis_bbox" in record else whole
    size_hw = _size(image)
    if size_hw is None:
        return whole[0], seen[0]
    cut = box_math.clip(seen, size_hw)
    if box_math.area(seen) > 0 and box_math.area(cut) <= 0:
        raise DataError(f"{path}: annotation {_name(record)}: box {record['bbox']} is outside its picture")
    return (whole[0], seen[0]) if "vis_bbox" in record else (cut[0], cut[0])


def _box(record: dict[str, Any], key: str, path: Path) -> box_math.Boxes:
    """[1, 4] xyxy."""
    box = record[key]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_coordinate, box)) or box[2] < 0 or box[3] < 0:
        raise DataError(f"{path}: annotation {_name(record)}: {key} {box!r:.80} is not [x, y, width, height] in pixels")
    return box_math.xyxy_from_xywh(np.array(box, np.float64))


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    return (int(image["height"]), int(image["width"])) if {"height", "width"} <= image.keys() else None


def _has_id(record: Any, key: str) -> bool:
    return isinstance(record, dict) and _is_id(record.get(key))


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _is_side(value: Any) -> bool:
    return _is_coordinate(value) and value > 0 and value % 1 == 0  # some tools write 640.0


def _is_coordinate(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= LARGEST_PX  # NaN and infinity are not


def _name(record: Any) -> str:
    return f"{record['id']}" if isinstance(record, dict) and "id" in record else repr(record)[:60]
