"""Boxes of COCO records: from `bbox`, `segmentation` and a rotation, and checks of their form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.base import DatasetError, is_pixel_value, make_outside_error
from hkd_det.errors import DataError, import_package
from hkd_det.structures import Boxes, box_area, clip_boxes, xyxy_from_xywh

MAX_MASK_PIXELS = 2**28
AREA_TOLERANCE = 0.02  # relative
BEYOND_TOLERANCE_PX = 2.0
SizeHW = tuple[int, int]


@dataclass(frozen=True, eq=False)
class CocoBox:
    """Boxes of a record.

    Attributes:
        full (array[4], float64): Full box, xyxy, pixels.
        visible (array[4], float64): Visible box, xyxy, pixels.
    """

    full: Boxes
    visible: Boxes


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


def find_form_error(
    records: Sequence[dict[str, Any]], sizes_hw: Sequence[SizeHW | None], where: str
) -> DatasetError | None:
    """Return an error if the boxes of a file are not [x, y, width, height] in pixels.

    Args:
        records: Records with a valid `bbox`.
        sizes_hw: Image height and width of each record in pixels, or None if unknown.
        where: Prefix of the error message, the annotation file.

    Returns:
        The error about corners, relative values, or boxes beyond their images; None if the boxes have the expected
        form.
    """
    pairs = [
        (record["bbox"], record.get("area"), size)
        for record, size in zip(records, sizes_hw, strict=True)
        if "vis_bbox" not in record and _has_bbox(record) and any(record["bbox"])
    ]
    if not pairs:
        return None
    boxes = np.array([box for box, _, _ in pairs], np.float64)
    areas = np.array([area if is_pixel_value(area) else np.nan for _, area, _ in pairs], np.float64)
    sides = np.array([(size[1], size[0]) if size else (np.inf, np.inf) for _, _, size in pairs], np.float64)
    num_boxes = len(boxes)
    if boxes.max() <= 1.01 and boxes.min() >= 0 and num_boxes > 1:
        return DatasetError(
            f"{where}: {num_boxes} of {num_boxes} boxes have values from 0 to 1. Expected pixels. Multiply them by the "
            "image size.",
            "boxes_normalized",
            where,
            num_boxes,
        )
    start, end = boxes[:, :2], boxes[:, 2:]
    num_beyond = int((start + end > sides + np.maximum(BEYOND_TOLERANCE_PX, 0.02 * sides)).any(axis=1).sum())
    are_corners = bool((end > start).all() and (end <= sides + BEYOND_TOLERANCE_PX).all())
    num_areas = int((_equals(areas, (end - start).prod(axis=1)) & ~_equals(areas, end.prod(axis=1))).sum())
    if are_corners and (2 * num_areas > num_boxes or (2 * num_beyond >= num_boxes > 1)):
        return DatasetError(
            f"{where}: the boxes look like corners [x1, y1, x2, y2]: {num_areas} of {num_boxes} areas are those of "
            f"corners, and {num_beyond} boxes reach beyond their image. Convert them to [x, y, width, height].",
            "boxes_xyxy",
            where,
            max(num_areas, num_beyond),
        )
    if 2 * num_beyond >= num_boxes > 2:
        return DatasetError(
            f"{where}: {num_beyond} of {num_boxes} boxes reach beyond their image. Expected [x, y, width, height] in "
            "pixels of the image files. Convert or scale the boxes.",
            "boxes_beyond_image",
            where,
            num_beyond,
        )
    return None


def _equals(values: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.abs(values - expected) <= AREA_TOLERANCE * np.abs(expected)


def _has_bbox(record: dict[str, Any]) -> bool:
    box = record.get("bbox")
    return isinstance(box, list) and len(box) == 4 and all(map(is_pixel_value, box))


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
