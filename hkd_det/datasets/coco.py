"""COCO JSON (Lin et al., ECCV 2014): boxes xywh in pixels, from `bbox`, `segmentation` and a rotation.

Crowds, boxes marked `ignore`, and boxes without area are ignore regions. A box is clipped to its image. If the
record has a `vis_bbox` (visible box), its `bbox` is a full-body box and is not clipped.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hkd_det.datasets.base import (
    DatasetError,
    ErrorHandler,
    ImageBox,
    JsonLocations,
    drop_repeated_boxes,
    is_pixel_value,
    make_outside_error,
    parse_flag,
    raise_error,
    set_image,
)
from hkd_det.datasets.image_files import SizeHW, find_form_error, locate_path, merge_repeated_images
from hkd_det.datasets.person_classes import ClassRoles, Names, assign_class_roles, report_unused_classes
from hkd_det.errors import DataError, import_package
from hkd_det.files import read_json
from hkd_det.image import read_image_header
from hkd_det.structures import Boxes, GroundTruth, Sample, box_area, clip_boxes, xyxy_from_xywh

MAX_MASK_PIXELS = 2**28


@dataclass(frozen=True, eq=False)
class CocoBox:
    """Boxes of a record.

    Attributes:
        full (array[4], float64): Full box, xyxy, pixels.
        visible (array[4], float64): Visible box, xyxy, pixels.
    """

    full: Boxes
    visible: Boxes


PersonRecord = tuple[CocoBox, bool]  # boxes, ignore


def read_coco(
    annotations: Path,
    images: Path,
    category: Names = "",
    on_error: ErrorHandler = raise_error,
    ignore_category: Names = (),
    drop_repeated: bool = False,
) -> list[Sample]:
    """Read a COCO annotation file.

    Args:
        annotations: JSON file with the lists `images`, `annotations` and `categories`.
        images: Directory that each `file_name` is relative to.
        category: Names of the person categories (default: all standard names of persons, or the only category).
        on_error: Receives the errors of invalid records.
        ignore_category: Names of the categories whose boxes are ignore regions.
        drop_repeated: Remove exact repetitions of a box, as for training. The evaluation programs of COCO keep them.

    Returns:
        One sample per image file, including images without persons.

    Raises:
        DataError: The file is missing or invalid. The message names file, line and record.
    """
    content = read_coco_content(annotations)
    categories = {entry["id"]: entry["name"] for entry in content["categories"]}
    roles = assign_class_roles(
        list_annotated_categories(content), category, ignore_category, f"{annotations}: categories"
    )
    locations = JsonLocations(annotations)
    images_by_id = _parse_images(content["images"], annotations, locations, on_error)
    invalid_ids = {image["id"] for image in content["images"] if _has_id(image, "id")} - images_by_id.keys()
    paths = {image_id: locate_path(image["file_name"], [images]) for image_id, image in images_by_id.items()}
    sizes = {
        image_id: _get_size_hw(image) or _read_size_hw(paths[image_id]) for image_id, image in images_by_id.items()
    }
    known = [record for record in content["annotations"] if _has_id(record, "image_id")]
    known = [record for record in known if record["image_id"] in images_by_id]
    if form_error := find_form_error(known, [sizes[record["image_id"]] for record in known], str(annotations)):
        on_error(form_error)
    persons: dict[Any, list[PersonRecord]] = defaultdict(list)
    unused: dict[str, list[ImageBox]] = defaultdict(list)
    for index, record in enumerate(content["annotations"]):
        if _has_id(record, "image_id") and record["image_id"] in invalid_ids:
            continue  # reported with its image
        try:
            _check_record(record, images_by_id, categories, annotations)
            if roles.is_used(record["category_id"]):
                image_id = record["image_id"]
                persons[image_id].append(_parse_person(record, sizes[image_id], roles, annotations))
            else:
                box = (paths[record["image_id"]], _read_unused_box(record))
                unused[categories[record["category_id"]]].append(box)
        except DataError as error:
            located = locations.annotate(error, "annotations", index)
            has_image = _has_id(record, "image_id") and record["image_id"] in paths
            on_error(set_image(located, paths[record["image_id"]]) if has_image else located)
    report_unused_classes(unused, annotations, on_error)
    _report_crowds(content["annotations"], roles, annotations, on_error)
    samples = [
        Sample(image_id, paths[image_id], _build_ground_truth(persons[image_id]), _get_size_hw(image))
        for image_id, image in images_by_id.items()
    ]
    samples = merge_repeated_images(samples, str(annotations), on_error)
    return _check_boxes(samples, annotations, drop_repeated, on_error)


def read_coco_content(path: Path) -> dict[str, Any]:
    """Read a COCO file and check its structure, not its records.

    Args:
        path: JSON file.

    Returns:
        Content with the lists `images`, `annotations` and `categories`; each category has an id and a name.

    Raises:
        DataError: The file is missing or is not a COCO file.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(f"{path}: expected a COCO file with the lists 'images', 'annotations' and 'categories'.")
    for entry in content["categories"]:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise DataError(f"{path}: categories: expected a list of objects with id and name.")
    return content


def list_annotated_categories(content: Mapping[str, Any]) -> dict[Any, str]:
    """Return category names by id without the root category of Roboflow.

    The root category has the name of the project. It has no annotations and is the supercategory of the others.

    Args:
        content: Content of `read_coco_content`.
    """
    used = {record["category_id"] for record in content["annotations"] if _has_id(record, "category_id")}
    parents = {
        entry["supercategory"]: entry["id"]
        for entry in content["categories"]
        if isinstance(entry.get("supercategory"), str) and entry["supercategory"] != entry["name"]
    }
    return {
        entry["id"]: entry["name"]
        for entry in content["categories"]
        if entry["id"] in used or parents.get(entry["name"], entry["id"]) == entry["id"]
    }


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
    has_box = isinstance(record, dict) and ("bbox" in record or "segmentation" in record)
    if not has_box or not {"image_id", "category_id"} <= record.keys():
        raise DataError(f"{path}: annotation {_format_record_id(record)}: expected image_id, category_id and bbox.")
    for key, known in (("image_id", images_by_id), ("category_id", categories)):
        if not _is_id(record[key]) or record[key] not in known:
            where = f"{path}: annotation {_format_record_id(record)}"
            raise DataError(f"{where}: {key} {record[key]!r} is not in the file. Add it, or remove the annotation.")


def _build_ground_truth(records: list[PersonRecord]) -> GroundTruth:
    boxes = np.array([box.full for box, _ in records], np.float32).reshape(-1, 4)
    visible = np.array([box.visible for box, _ in records], np.float32).reshape(-1, 4)
    ignore = np.array([flag for _, flag in records], bool)
    return GroundTruth(boxes, ignore | (box_area(boxes) <= 0), visible, ("person",) * len(records))


def _parse_person(record: dict[str, Any], size_hw: SizeHW | None, roles: ClassRoles[Any], path: Path) -> PersonRecord:
    where = f"{path}: annotation {_format_record_id(record)}"
    is_ignored = record["category_id"] in roles.ignored or _is_crowd(record, where)
    return parse_coco_box(record, size_hw, where), is_ignored


def _read_unused_box(record: dict[str, Any]) -> tuple[float, ...]:
    """Return the box of a record of another class, xyxy; empty if it is invalid, which is no error."""
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_pixel_value, box)):
        return ()
    x, y, width, height = box
    return x, y, x + width, y + height


def _is_crowd(record: dict[str, Any], where: str) -> bool:
    flags = [parse_flag(record.get(key), f"{where}: {key}") for key in ("iscrowd", "ignore")]
    return any(flags)


def _report_crowds(records: list[Any], roles: ClassRoles[Any], path: Path, on_error: ErrorHandler) -> None:
    """Report that all persons are crowds: some tools set iscrowd for every mask."""
    persons = [one for one in records if _has_id(one, "category_id") and one["category_id"] in roles.persons]
    flags = []
    for record in persons:
        with suppress(DataError):  # reported with the record
            flags.append(_is_crowd(record, ""))
    if flags and all(flags):
        on_error(
            DatasetError(
                f"{path}: all {len(flags)} records of persons have iscrowd or ignore 1, so there is no person to "
                "detect. Set iscrowd to 0 for single persons.",
                "all_iscrowd",
                path,
                len(flags),
            )
        )


def _check_boxes(samples: list[Sample], path: Path, drop_repeated: bool, on_error: ErrorHandler) -> list[Sample]:
    """Report repeated boxes and boxes without area, and remove repeated ones."""
    checked, num_repeated, num_empty = [], 0, 0
    repeated_images, empty_images = [], []
    for sample in samples:
        ground_truth, num = drop_repeated_boxes(sample.ground_truth)
        checked.append(replace(sample, ground_truth=ground_truth) if num and drop_repeated else sample)
        num_repeated += num
        num_without_area = int((box_area(ground_truth.boxes_xyxy) <= 0).sum())
        num_empty += num_without_area
        repeated_images += [sample.path] if num else []
        empty_images += [sample.path] if num_without_area else []
    use = "Training uses each box once" if drop_repeated else "All are kept, as in the evaluation of COCO"
    without_area = "boxes without area count as ignore regions. Correct or remove them."
    for count, kind, images, text in (
        (num_repeated, "repeated_box", repeated_images, f"repeated boxes. {use}. Remove the repetitions."),
        (num_empty, "box_without_area", empty_images, without_area),
    ):
        if count:
            on_error(DatasetError(f"{path}: {count} {text}", kind, path, count, is_error=False, images=images))
    return checked


def _get_size_hw(image: dict[str, Any]) -> tuple[int, int] | None:
    return (int(image["height"]), int(image["width"])) if {"height", "width"} <= image.keys() else None


def _read_size_hw(path: Path) -> SizeHW | None:
    """Return height and width of an image file; None if it is missing or unreadable, which is reported later."""
    try:
        return read_image_header(path).size_hw
    except (DataError, OSError, ValueError):
        return None


def _has_id(record: Any, key: str) -> bool:
    return isinstance(record, dict) and _is_id(record.get(key))


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _is_valid_size(value: Any) -> bool:
    return is_pixel_value(value) and value > 0 and value % 1 == 0  # some tools write 640.0


def _format_record_id(record: Any) -> str:
    return f"{record['id']}" if isinstance(record, dict) and "id" in record else repr(record)[:60]


def parse_coco_box(record: dict[str, Any], size_hw: SizeHW | None, where: str) -> CocoBox:
    """Return the boxes of a record.

    A missing `bbox`, or one without any extent, is replaced by the bounding box of `segmentation`. A `bbox` with
    `attributes.rotation`, as CVAT writes it, is replaced by the bounding box of the rotated box.

    Args:
        record: Record with `bbox`, `segmentation` or both.
        size_hw: Image height and width in pixels, or None if unknown.
        where: Prefix of error messages: file and record.

    Returns:
        The boxes, clipped to the image unless the record has a `vis_bbox`.

    Raises:
        DataError: A value is invalid, or the box is outside the image.
    """
    full = _parse_bbox(record, "bbox", where) if record.get("bbox") not in (None, []) else None
    if full is None or box_area(full)[0] <= 0:
        outline = _bound_segmentation(record.get("segmentation"), where)
        full = outline if outline is not None else full
        if full is None or not np.any(full[0, 2:] - full[0, :2]):
            raise DatasetError(
                f"{where}: the bbox {record.get('bbox')!r:.60} has no extent, and there is no segmentation. Add the "
                "box, or remove the record.",
                "box_without_area",
            )
    elif rotation := _parse_rotation(record, where):
        outline = _bound_segmentation(record.get("segmentation"), where)
        full = _bound_rotated(full, rotation) if outline is None else outline
    if record.get("vis_bbox") is not None:
        visible = _parse_bbox(record, "vis_bbox", where)
    else:
        visible = full
    if size_hw is None:
        return CocoBox(full[0], visible[0])
    clipped = clip_boxes(visible, size_hw)
    if box_area(visible) > 0 and box_area(clipped) <= 0:
        raise make_outside_error(where, record.get("bbox"), size_hw)
    return CocoBox(full[0], visible[0]) if "vis_bbox" in record else CocoBox(clipped[0], clipped[0])


def _parse_bbox(record: dict[str, Any], key: str, where: str) -> Boxes:
    """Return a box as xyxy [1, 4]."""
    box = record[key]
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_pixel_value, box)) or box[2] < 0 or box[3] < 0:
        raise DataError(f"{where}: {key}: expected [x, y, width, height] in pixels, got {box!r:.80}.")
    return xyxy_from_xywh(np.array(box, np.float64))


def _parse_rotation(record: dict[str, Any], where: str) -> float:
    """Return the rotation in degrees, 0 without one."""
    attributes = record.get("attributes")
    value = attributes.get("rotation") if isinstance(attributes, dict) else record.get("rotation")
    if value is None:
        return 0.0
    try:
        rotation = float(value)
    except (TypeError, ValueError):
        rotation = math.nan
    if not math.isfinite(rotation):
        raise DataError(f"{where}: rotation: expected an angle in degrees, got {value!r:.40}.")
    return rotation % 360


def _bound_rotated(box: Boxes, degrees: float) -> Boxes:
    """Return the bounding box of a box that is rotated about its center."""
    center, half = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]) / 2
    cosine, sine = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    half = half @ np.array([[cosine, sine], [sine, cosine]])
    return np.concatenate([center - half, center + half], axis=1)


def _bound_segmentation(segmentation: Any, where: str) -> Boxes | None:
    """Return the bounding box of polygons or of a mask as xyxy [1, 4]; None without area."""
    if isinstance(segmentation, dict):
        return _bound_mask(segmentation, where)
    if not isinstance(segmentation, list):
        return None
    polygons = segmentation if all(isinstance(polygon, list) for polygon in segmentation) else [segmentation]
    values = [value for polygon in polygons for value in polygon[: len(polygon) // 2 * 2]]
    if len(values) < 6 or not all(map(is_pixel_value, values)):
        return None
    box = np.array([[min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]], np.float64)
    return box if box_area(box) > 0 else None


def _bound_mask(mask: dict[str, Any], where: str) -> Boxes | None:
    """Return the bounding box of a run-length encoded mask."""
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return None
    if not isinstance(counts, (list, str)) or size[0] * size[1] > MAX_MASK_PIXELS:
        return None
    coder = import_package("pycocotools.mask")
    try:
        if isinstance(counts, list):
            coded = coder.frPyObjects(mask, *size)
        else:
            coded = {"size": size, "counts": counts.encode("ascii")}
        x, y, width, height = coder.toBbox(coded).tolist()
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: segmentation: not a run-length encoded mask ({error}). Correct the mask.") from None
    box = np.array([[x, y, x + width, y + height]], np.float64)
    return box if box_area(box) > 0 else None
