"""COCO JSON: boxes xywh in pixels; crowds, and boxes marked `ignore`, are ignore regions."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from hkd_det import boxes as box_math
from hkd_det.datasets.sample import Sample, Truth
from hkd_det.errors import DataError

PERSON_NAMES = ("person", "pedestrian", "people", "human")


def read_coco(annotations: Path, images: Path, category: str = "") -> list[Sample]:
    """Every picture of an annotation file, its people as truth.

    images: the folder that `file_name` is relative to. category: the person category's name; by default the
    one called person or pedestrian, or the only one. `vis_bbox` is read where it stands.
    Raises DataError, naming the file and the record.
    """
    content = _load(annotations)
    wanted = _category_id(content, annotations, category)
    sizes = _pictures(content, annotations)
    records: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for record in content["annotations"]:
        if not isinstance(record, dict) or "image_id" not in record or "bbox" not in record:
            raise DataError(f"{annotations}: annotation {_name(record)} has no image_id or bbox")
        if not isinstance(record["image_id"], (int, str)) or record["image_id"] not in sizes:
            raise DataError(f"{annotations}: annotation {_name(record)} is of picture {record['image_id']}, not listed")
        if record.get("category_id", wanted) == wanted:
            records[record["image_id"]].append(record)
    return [
        Sample(image_id, images / image["file_name"], _truth(records[image_id], image, annotations), _size(image))
        for image_id, image in sizes.items()
    ]


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise DataError(f"{path}: not a COCO file: it needs the lists 'images', 'annotations' and 'categories'")
    return content


def _category_id(content: dict[str, Any], path: Path, category: str) -> Any:
    categories = content.get("categories")
    if not isinstance(categories, list) or not all(
        isinstance(c, dict) and {"id", "name"} <= c.keys() for c in categories
    ):
        raise DataError(f"{path}: 'categories' must be a list of objects with id and name")
    ids = {str(entry["name"]): entry["id"] for entry in categories}
    names = (category,) if category else PERSON_NAMES
    for name in names:
        if name in ids:
            return ids[name]
    if len(ids) == 1 and not category:
        return next(iter(ids.values()))
    raise DataError(f"{path}: no category {' or '.join(names)} among {', '.join(ids) or 'none'}; say `category: NAME`")


def _pictures(content: dict[str, Any], path: Path) -> dict[Any, dict[str, Any]]:
    pictures: dict[Any, dict[str, Any]] = {}
    for image in content["images"]:
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
            raise DataError(f"{path}: picture {_name(image)} has no id or file_name")
        if not isinstance(image["id"], (int, str)):
            raise DataError(f"{path}: picture id {image['id']!r} is neither a number nor a text")
        if image["id"] in pictures:
            raise DataError(f"{path}: picture id {image['id']} stands twice")
        pictures[image["id"]] = image
    if not pictures:
        raise DataError(f"{path}: lists no pictures")
    return pictures


def _truth(records: list[dict[str, Any]], image: dict[str, Any], path: Path) -> Truth:
    whole = [_box(record, "bbox", path) for record in records]
    visible = [
        _box(record, "vis_bbox", path) if "vis_bbox" in record else box
        for record, box in zip(records, whole, strict=True)
    ]
    boxes = box_math.xyxy_from_xywh(np.array(whole, np.float64).reshape(-1, 4))
    seen = box_math.xyxy_from_xywh(np.array(visible, np.float64).reshape(-1, 4))
    size = _size(image)
    if size is not None and all("vis_bbox" not in record for record in records):
        boxes = _clipped(boxes, size, records, path)
        seen = boxes
    return Truth(
        boxes.astype(np.float32),
        np.array([bool(record.get("iscrowd")) or bool(record.get("ignore")) for record in records], bool),
        seen.astype(np.float32),
        tuple("person" for _ in records),
    )


def _clipped(
    boxes: box_math.Boxes, size_hw: tuple[int, int], records: list[dict[str, Any]], path: Path
) -> box_math.Boxes:
    cut = box_math.clip(boxes, size_hw)
    for record, gone in zip(records, box_math.area(cut) <= 0, strict=True):
        if gone:
            raise DataError(f"{path}: annotation {_name(record)}: box {record['bbox']} is outside its picture")
    return cut


def _box(record: dict[str, Any], key: str, path: Path) -> list[float]:
    box = record[key]
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)
    if not numbers or not all(math.isfinite(v) for v in box) or box[2] < 0 or box[3] < 0:
        raise DataError(f"{path}: annotation {_name(record)}: {key} {box!r} is not [x, y, width, height] in pixels")
    return [float(v) for v in box]


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _name(record: Any) -> str:
    return f"{record['id']}" if isinstance(record, dict) and "id" in record else repr(record)[:60]
