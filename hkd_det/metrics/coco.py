"""Ground truth and detections in COCO JSON, and COCO's average precision and recall of the person class.

Ground truth: `images`, `annotations` and `categories`. CityPersons adds `height`, `vis_ratio`, `vis_bbox` and `ignore`
to an annotation. Detections: a list of {"image_id", "category_id", "bbox" xywh, "score"}. Files of MATLAB's writer
(dt_mat2json.m) are read too: their ids are fractions (1.0), and a single detection is a bare object.

The metrics are computed by pycocotools, the official program. It does not read `ignore`, so ignore regions are passed
to it as crowds: detections in them count neither as true nor as false positives.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hkd_det.datasets.base import select_person_class
from hkd_det.errors import DataError, first_error_line
from hkd_det.files import read_content
from hkd_det.metrics.tables import DetectionTable, Floats, GroundTruthTable, is_valid_box
from hkd_det.structures import Detections, Sample

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
PEDESTRIAN_CATEGORY_ID = 1  # the category that the official CityPersons program evaluates

CocoId = int | float | str
BoxXYWH = tuple[float, float, float, float]


class _Image(msgspec.Struct, gc=False):
    id: CocoId


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
    """Annotations of the person class in a COCO file, N in all.

    Attributes:
        path: File that was read.
        image_ids: Ids of the images, sorted as in the official programs.
        category_id: Category of the person class.
        table: Boxes and ignore regions of the person class.
        area (float64 array[N]): Annotated area in square pixels, for the size classes of COCO.
        iscrowd (bool array[N]): True for crowds.
    """

    path: Path
    image_ids: tuple[CocoId, ...]
    category_id: CocoId
    table: GroundTruthTable
    area: Floats
    iscrowd: NDArray[np.bool_]


def read_coco_ground_truth(path: Path) -> CocoGroundTruth:
    """Read the annotations of the person class.

    Args:
        path: JSON file of annotations.

    Returns:
        Ground-truth table, image ids and category id.

    Raises:
        DataError: The file is missing or an annotation is invalid; the message names both.
    """
    content = _decode_json(path, _GroundTruthFile)
    image_ids = _sort_ids([image.id for image in content.images], path)
    image_index = {image_id: index for index, image_id in enumerate(image_ids)}
    category_id = _find_person_category(content.categories, path)
    annotations = []
    for number, annotation in enumerate(content.annotations):
        if _normalize_id(annotation.image_id) not in image_index:
            raise DataError(
                f"{path}: annotation {number}: image_id {annotation.image_id!r} is not among its images. Correct it."
            )
        if _normalize_id(annotation.category_id) == category_id:
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
    return CocoGroundTruth(path, image_ids, category_id, table, area, iscrowd)


def read_coco_detections(path: Path, ground_truth: CocoGroundTruth) -> DetectionTable:
    """Read the detections of the person class; a detection without `category_id` belongs to it.

    Args:
        path: JSON file of detections.
        ground_truth: Ground truth that defines image ids and the person class.

    Returns:
        The detections, sorted by image and descending score.

    Raises:
        DataError: The file is missing or a detection is invalid (unknown image, duplicate id, wrong number).
    """
    content = _decode_json(path, list[_Detection] | _Detection)
    records = content if isinstance(content, list) else [content]
    _check_detection_ids(records, path)
    detections = [
        record
        for record in records
        if record.category_id is None or _normalize_id(record.category_id) == ground_truth.category_id
    ]
    if records and not detections:
        raise DataError(
            f"{path}: no detection is of category_id {ground_truth.category_id!r}, the person class of "
            f"{ground_truth.path}. The first has category_id {records[0].category_id!r}."
        )
    index_by_id = {image_id: index for index, image_id in enumerate(ground_truth.image_ids)}
    image_index = np.array([index_by_id.get(_normalize_id(record.image_id), -1) for record in detections], np.intp)
    if (image_index < 0).any():
        unknown = detections[int(np.argmax(image_index < 0))].image_id
        raise DataError(
            f"{path}: image_id {unknown!r} is not among the {len(ground_truth.image_ids)} images of "
            f"{ground_truth.path}. Use the ids of that file."
        )
    scores = _to_array([record.score for record in detections])
    if not np.isfinite(scores).all():
        raise DataError(f"{path}: expected finite scores, got {scores[~np.isfinite(scores)][0]}.")
    boxes = _parse_coco_boxes([record.bbox for record in detections], path, "detection")
    return DetectionTable.from_rows(image_index, boxes, scores)


def evaluate(ground_truth: CocoGroundTruth, detections: DetectionTable) -> dict[str, float]:
    """Compute the twelve metrics of COCO.

    Args:
        ground_truth: Ground truth.
        detections: Detections in the same images.

    Returns:
        The metrics of `METRIC_NAMES` as fractions; -1 for a size class without ground truth.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        coco = _build_coco_index(ground_truth)
        if not len(detections):
            return {name: 0.0 if (~ground_truth.table.ignore).any() else -1.0 for name in METRIC_NAMES}
        columns = (detections.image_index + 1, *detections.boxes_xywh.T, detections.scores, np.ones(len(detections)))
        coco_eval = COCOeval(coco, coco.loadRes(np.stack(columns, axis=1)), "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return dict(zip(METRIC_NAMES, coco_eval.stats.tolist(), strict=True))


def evaluate_average_precision(samples: Sequence[Sample], detections: Sequence[Detections]) -> dict[str, float]:
    """Compute the twelve metrics of COCO for detections in memory.

    Args:
        samples: Annotated images.
        detections: Detections of each sample, in the same order.

    Returns:
        The metrics of `METRIC_NAMES` as fractions; -1 for a size class without ground truth.
    """
    table = GroundTruthTable.from_samples([sample.ground_truth for sample in samples])
    area = table.boxes_xywh[:, 2] * table.boxes_xywh[:, 3]
    ground_truth = CocoGroundTruth(
        Path(), tuple(range(len(samples))), PEDESTRIAN_CATEGORY_ID, table, area, np.zeros(len(area), bool)
    )
    return evaluate(ground_truth, DetectionTable.from_detections(detections))


def _build_coco_index(ground_truth: CocoGroundTruth) -> COCO:
    """Build pycocotools' index; ids start at 1 because pycocotools never matches an annotation with id 0."""
    table = ground_truth.table
    columns = zip(
        table.image_index.tolist(),
        table.boxes_xywh.tolist(),
        ground_truth.area.tolist(),
        (ground_truth.iscrowd | table.ignore).tolist(),
        strict=True,
    )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index + 1} for index in range(table.num_images)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": row + 1,
                "image_id": image_index + 1,
                "category_id": 1,
                "bbox": box,
                "area": area,
                "iscrowd": int(is_ignored),
            }
            for row, (image_index, box, area, is_ignored) in enumerate(columns)
        ],
    }
    coco.createIndex()
    return coco


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


def _find_person_category(categories: Sequence[_Category], path: Path) -> CocoId:
    names = {_normalize_id(category.id): category.name for category in categories}
    return select_person_class(names, "", f"{path}: its categories") if names else PEDESTRIAN_CATEGORY_ID


def _check_detection_ids(detections: Sequence[_Detection], path: Path) -> None:
    ids = [_normalize_id(record.id) for record in detections if record.id is not None]
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: duplicate detection id {_find_duplicate(ids)!r}. Make the ids unique or omit them.")


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
