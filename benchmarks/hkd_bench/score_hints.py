"""Why the detections of a file miss: boxes of another form or size, another category, other image ids.

`find_hint` reads the boxes of a file in other ways. A hint names the way in which far more persons match a detection
than in the form that COCO defines. It never changes a metric.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkd_det.metrics.coco_files import CocoGroundTruth, find_images_by_name, read_other_categories
from hkd_det.metrics.tables import DetectionTable, Floats

MAX_IMAGES = 500  # images with persons that are compared
MAX_DETECTIONS_PER_IMAGE = 10
MIN_IOU = 0.5
MAX_MATCHED_RATIO = 0.5  # no hint if at least this part of the persons matches
MIN_GAIN = 0.3  # a hint needs so many more matching persons, as a part of all
MIN_MATCHED = 3  # fewer persons can match by chance
BOX_FORMS = {
    "[x, y, width, height]": "",
    "[x1, y1, x2, y2]": "corners (xyxy)",
    "[center x, center y, width, height]": "center, width and height",
    "[y1, x1, y2, x2]": "corners with y first",
}
FACTORS = (2, 3, 4, 8, 1.5, 4 / 3, 3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 8)
NETWORK_SIDES = (
    *range(224, 865, 32), 300, 896, 960, 1024, 1088, 1152, 1216, 1280, 1333, 1536, 1920,
)  # fmt: skip


class _Pairs:
    """All pairs of a person and a detection of the same image.

    Args:
        ground_truth: Persons; the first `MAX_IMAGES` images with persons are used.
        detections: Detections; the best of each image are used.
    """

    def __init__(self, ground_truth: CocoGroundTruth, detections: DetectionTable) -> None:
        table = ground_truth.table
        persons = np.flatnonzero(~table.ignore)
        used_images = np.unique(table.image_index[persons])[:MAX_IMAGES]
        persons = persons[np.isin(table.image_index[persons], used_images)]
        is_used = np.isin(detections.image_index, used_images)
        detections = detections.select(is_used & (detections.rank_per_image() < MAX_DETECTIONS_PER_IMAGE))
        person_images = table.image_index[persons]
        starts, ends = (np.searchsorted(detections.image_index, person_images, side) for side in ("left", "right"))
        self.num_persons = len(persons)
        self.person_rows = np.repeat(np.arange(len(persons)), ends - starts)
        self.detection_rows = np.concatenate(
            [np.arange(start, end) for start, end in zip(starts, ends, strict=True)] or [np.zeros(0, np.intp)]
        ).astype(np.intp)
        self.persons_xywh = table.boxes_xywh[persons]
        self.boxes = detections.boxes_xywh
        sizes = ground_truth.sizes_hw
        self.sizes_hw = np.full((len(self.boxes), 2), np.nan) if sizes is None else sizes[detections.image_index]

    def count_matched(self, boxes_xywh: Floats) -> int:
        """Count the persons that a detection overlaps."""
        iou = _compute_pair_iou(self.persons_xywh[self.person_rows], boxes_xywh[self.detection_rows])
        return len(np.unique(self.person_rows[iou >= MIN_IOU]))


def find_hint(path: Path, ground_truth: CocoGroundTruth, detections: DetectionTable) -> str:
    """Explain why most persons match no detection of a file.

    Args:
        path: Detection file.
        ground_truth: Persons and images.
        detections: Detections of the file.

    Returns:
        One or two sentences, or an empty string if enough persons match or no explanation is found.
    """
    pairs = _Pairs(ground_truth, detections)
    matched = pairs.count_matched(pairs.boxes)
    if not pairs.num_persons or matched >= MAX_MATCHED_RATIO * pairs.num_persons:
        return ""
    best, explanation = max(matched + MIN_GAIN * pairs.num_persons, MIN_MATCHED - 1), ""
    for num_matched, text in _iterate_explanations(path, ground_truth, detections, pairs):
        if num_matched > best and num_matched >= 2 * matched:
            best, explanation = num_matched, text
    if explanation:
        counts = f"{matched} of {pairs.num_persons} persons match a detection, but {best:g} would match"
        return f"{counts} {explanation}"
    if matched or not len(detections):
        return ""
    num_outside = _count_outside(pairs)
    outside = f"; {num_outside} of {len(pairs.boxes)} boxes reach beyond their image" if num_outside else ""
    return (
        f"none of {pairs.num_persons} persons matches a detection{outside}. Expected a bbox [x, y, width, height] in "
        "pixels of the image, and the image_id and category_id of the ground truth."
    )


def _iterate_explanations(
    path: Path, ground_truth: CocoGroundTruth, detections: DetectionTable, pairs: _Pairs
) -> Iterator[tuple[int, str]]:
    """Yield the number of matched persons and the explanation of each reading of the file, simple ones first."""
    for text, boxes in _iterate_boxes(pairs):
        yield pairs.count_matched(boxes), text
    for category_id, table in read_other_categories(path, ground_truth).items():
        other = _Pairs(ground_truth, table)
        yield (
            other.count_matched(other.boxes),
            f"with the detections of category_id {category_id!r}. Use the category ids of the ground truth.",
        )
    for text, image_index in _iterate_image_indices(ground_truth, detections):
        known = image_index >= 0
        moved = DetectionTable.from_rows(image_index[known], detections.boxes_xywh[known], detections.scores[known])
        other = _Pairs(ground_truth, moved)
        yield other.count_matched(other.boxes), text


def _iterate_boxes(pairs: _Pairs) -> Iterator[tuple[str, Floats]]:
    """Yield an explanation and the converted boxes of each box form and image size."""
    remedy = "Write bbox as [x, y, width, height] in pixels of the image."
    forms = {form: _convert_form(pairs.boxes, form) for form in BOX_FORMS}
    for form, boxes in forms.items():
        yield f"if bbox is read as {form}, {BOX_FORMS[form]}. {remedy}", boxes
    height, width = pairs.sizes_hw.T
    full_size = np.stack([width, height, width, height], axis=1)
    for form, boxes in forms.items():
        description = f" and {form}" if BOX_FORMS[form] else ""
        text = f"if bbox is read as relative to the image size (normalized){description}. {remedy}"
        yield text, boxes * full_size
    for form, boxes in forms.items():
        description = f" and bbox is read as {form}" if BOX_FORMS[form] else ""
        for text, factors, offsets in _iterate_scales(pairs.sizes_hw):
            yield f"if boxes are scaled {text}{description}. {remedy}", (boxes - offsets) * factors


def _iterate_scales(sizes_hw: Floats) -> Iterator[tuple[str, Floats, Floats]]:
    """Yield the name, the factors and the offsets of boxes in images of another size."""
    height, width = sizes_hw.T
    zeros = np.zeros((len(sizes_hw), 4))
    for factor in FACTORS:
        size = "smaller" if factor > 1 else "larger"
        yield f"by {factor:.3g}: they are in pixels of a {size} image", np.full((len(sizes_hw), 1), factor), zeros
    for side in NETWORK_SIDES:
        name = f"from the network input size {side}"
        stretched = np.stack([width, height, width, height], axis=1) / side
        yield f"{name} x {side}", stretched, zeros
        factor = np.maximum(width, height)[:, None] / side
        yield f"{name} (letterbox)", factor, zeros
        padding = np.stack([(side - width / factor[:, 0]) / 2, (side - height / factor[:, 0]) / 2], axis=1)
        yield f"{name} (centered letterbox)", factor, np.concatenate([padding, np.zeros_like(padding)], axis=1)


def _iterate_image_indices(
    ground_truth: CocoGroundTruth, detections: DetectionTable
) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Yield an explanation and the image of each detection for other meanings of `image_id`; -1 for no image."""
    ids = ground_truth.image_ids
    index_by_number = {
        int(name): index for name, index in find_images_by_name(ground_truth).items() if name.isdecimal()
    }
    index_by_id = {image_id: index for index, image_id in enumerate(ids)}
    meanings = {"the number in the file name": index_by_number}
    if all(isinstance(image_id, int) for image_id in ids):
        for shift in (1, -1):
            numbers = f"counted from {'0' if shift == 1 else '1'}"
            meanings[numbers] = {int(key) - shift: index for key, index in index_by_id.items()}
    for name, indices in meanings.items():
        lookup = np.array([indices.get(image_id, -1) if isinstance(image_id, int) else -1 for image_id in ids])
        text = f"if image_id is read as {name}. Use the image ids of the ground truth."
        yield text, lookup[detections.image_index].astype(np.intp)


def _convert_form(boxes: Floats, form: str) -> Floats:
    """Convert boxes of a form of `BOX_FORMS` to xywh."""
    a, b, c, d = boxes.T
    columns = {
        "[x, y, width, height]": (a, b, c, d),
        "[x1, y1, x2, y2]": (a, b, c - a, d - b),
        "[center x, center y, width, height]": (a - c / 2, b - d / 2, c, d),
        "[y1, x1, y2, x2]": (b, a, d - b, c - a),
    }
    return np.stack(columns[form], axis=1)


def _compute_pair_iou(first_xywh: Floats, second_xywh: Floats) -> Floats:
    """Return the IoU of each row of two arrays; 0 for boxes of negative size or unknown position."""
    low = np.maximum(first_xywh[:, :2], second_xywh[:, :2])
    high = np.minimum(first_xywh[:, :2] + first_xywh[:, 2:], second_xywh[:, :2] + second_xywh[:, 2:])
    overlap = np.maximum(high - low, 0).prod(axis=1)
    union = first_xywh[:, 2:].prod(axis=1) + np.maximum(second_xywh[:, 2:], 0).prod(axis=1) - overlap
    return np.nan_to_num(np.divide(overlap, union, out=np.zeros_like(union), where=union > 0))


def _count_outside(pairs: _Pairs) -> int:
    """Count boxes that end more than 10 % beyond their image."""
    ends = pairs.boxes[:, :2] + pairs.boxes[:, 2:]
    return int((ends > 1.1 * pairs.sizes_hw[:, ::-1]).any(axis=1).sum())
