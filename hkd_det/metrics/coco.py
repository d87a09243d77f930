"""Truth and detections in COCO's JSON, and in the forms that CityPersons' programs write of it.

Truth: `images`, `annotations`, `categories`; CityPersons adds `height`, `vis_ratio`, `vis_bbox` and `ignore` to a
record.
Detections: a list of {"image_id", "category_id", "bbox" xywh, "score"}. MATLAB's writers (dt_mat2json.m) make ids
fractions (1.0) and a single detection a bare object: taken too.

COCO's average precision and recall of the person class, by pycocotools: the official program itself.

Ignore regions (`ignore`, which pycocotools itself does not read) are passed to it as crowds: what falls into them
counts neither way.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hkd_det.datasets.base import select_person_class
from hkd_det.errors import DataError
from hkd_det.metrics.tables import DetectionTable, Floats, GroundTruthTable, is_valid_box
from hkd_det.structures import Detections, Sample

CocoId = int | float | str


BoxXYWH = tuple[float, float, float, float]


PEDESTRIAN_CATEGORY_ID = 1  # the category that the official CityPersons program evaluates


Content = TypeVar("Content")


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
    """A truth file. ids: of the pictures, sorted, as the official programs go through them; category: the person's.

    area_px: [N] float64 and crowd: [N] bool, of the records in `table`, for COCO's own measure.
    """

    path: Path
    image_ids: tuple[CocoId, ...]
    category_id: CocoId
    table: GroundTruthTable
    area: Floats
    iscrowd: NDArray[np.bool_]


def read_coco_ground_truth(path: Path) -> CocoGroundTruth:
    """The people of a truth file. Raises DataError, naming the file and the record."""
    content = _decode_json(path, _GroundTruthFile)
    ids = _sort_ids([image.id for image in content.images], path)
    index = {one: number for number, one in enumerate(ids)}
    category = _find_person_category(content.categories, path)
    records = []
    for number, record in enumerate(content.annotations):
        if _normalize_id(record.image_id) not in index:
            raise DataError(f"{path}: annotation {number}: image_id {record.image_id!r} is not among its images")
        if _normalize_id(record.category_id) == category:
            records.append(record)
    boxes = _parse_coco_boxes([record.bbox for record in records], path, "annotation")
    table = GroundTruthTable(
        len(ids),
        np.array([index[_normalize_id(record.image_id)] for record in records], np.intp),
        boxes,
        _to_float_array([record.bbox[3] if record.height is None else record.height for record in records]),
        _to_float_array([_compute_record_visible_ratio(record) for record in records]),
        np.array([_is_ignored_record(record) for record in records], bool),
    )
    area = _to_float_array([one.bbox[2] * one.bbox[3] if one.area is None else one.area for one in records])
    crowd = np.array([bool(record.iscrowd) for record in records], bool)
    return CocoGroundTruth(path, ids, category, table, area, crowd)


def read_coco_detections(path: Path, ground_truth: CocoGroundTruth) -> DetectionTable:
    """The people found in the truth's pictures; a detection without category_id is one.

    Raises DataError, naming the file and the detection, for unknown pictures, an id that stands twice, wrong numbers.
    """
    content = _decode_json(path, list[_Detection] | _Detection)
    every = content if isinstance(content, list) else [content]
    _check_detection_ids(every, path)
    found = [
        one for one in every if one.category_id is None or _normalize_id(one.category_id) == ground_truth.category_id
    ]
    if every and not found:
        raise DataError(
            f"{path}: no detection is of category_id {ground_truth.category_id!r}, the person of {ground_truth.path}; "
            f"the first is of {every[0].category_id!r}"
        )
    index = {one: number for number, one in enumerate(ground_truth.image_ids)}
    pictures = np.array([index.get(_normalize_id(one.image_id), -1) for one in found], np.intp)
    if (pictures < 0).any():
        unknown = found[int(np.argmax(pictures < 0))].image_id
        raise DataError(
            f"{path}: image_id {unknown!r} is not among the {len(ground_truth.image_ids)} pictures of {ground_truth.path}"
        )
    scores = _to_float_array([one.score for one in found])
    if not np.isfinite(scores).all():
        raise DataError(f"{path}: a score is {scores[~np.isfinite(scores)][0]}")
    return DetectionTable.from_rows(pictures, _parse_coco_boxes([one.bbox for one in found], path, "detection"), scores)


def _decode_json(path: Path, cls: Any) -> Any:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, expected a COCO JSON file") from None
    try:
        return msgspec.json.decode(raw.removeprefix(b"\xef\xbb\xbf"), type=cls)
    except RecursionError:
        raise DataError(f"{path}: not a COCO file: nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not as COCO JSON should be ({error})") from None


def _sort_ids(image_ids: Sequence[CocoId], path: Path) -> tuple[CocoId, ...]:
    ids = [_normalize_id(one) for one in image_ids]
    if not ids:
        raise DataError(f"{path}: lists no pictures")
    if len({isinstance(one, str) for one in ids}) > 1:
        raise DataError(f"{path}: its picture ids are texts and numbers; make them one kind")
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise DataError(f"{path}: picture id {twice!r} stands twice")
    return tuple(sorted(ids))  # one kind, as just checked


def _find_person_category(categories: Sequence[_Category], path: Path) -> CocoId:
    names = {_normalize_id(one.id): one.name for one in categories}
    return select_person_class(names, "", f"{path}: its categories") if names else PEDESTRIAN_CATEGORY_ID


def _check_detection_ids(detections: Sequence[_Detection], path: Path) -> None:
    ids = [_normalize_id(one.id) for one in detections if one.id is not None]
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise DataError(f"{path}: detection id {twice!r} stands twice; give each its own, or none")


def _parse_coco_boxes(raw_boxes: Sequence[BoxXYWH], path: Path, record_name: str) -> Floats:
    boxes = np.array(raw_boxes, np.float64).reshape(-1, 4)
    wrong = ~is_valid_box(boxes)
    if wrong.any():
        box = boxes[int(np.argmax(wrong))].tolist()
        raise DataError(f"{path}: {record_name} with bbox {box}: not [x, y, width, height] of finite sizes from 0")
    return boxes


def _compute_record_visible_ratio(record: _Annotation) -> float:
    if record.vis_ratio is not None:
        return record.vis_ratio
    if record.vis_bbox is None or not record.bbox[2] * record.bbox[3]:
        return 1.0
    return record.vis_bbox[2] * record.vis_bbox[3] / (record.bbox[2] * record.bbox[3])


def _is_ignored_record(record: _Annotation) -> bool:
    """In a file of CityPersons' own form a record without `ignore` is a person, as for the official program."""
    if record.ignore is None and record.height is not None and record.vis_ratio is not None:
        return False
    return bool(record.iscrowd if record.ignore is None else record.ignore)


def _to_float_array(values: Sequence[float]) -> Floats:
    return np.array(values, np.float64)


def _normalize_id(value: CocoId) -> CocoId:
    """An id as MATLAB's writers mean it: 1.0 is 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(ground_truth: CocoGroundTruth, detections: DetectionTable) -> dict[str, float]:
    """The twelve figures, fractions; -1 where nobody of that size was to be found."""
    with contextlib.redirect_stdout(io.StringIO()):  # it talks to the terminal at every step
        people = _build_coco_index(ground_truth)
        if not len(detections):
            return {name: 0.0 if (~ground_truth.table.ignore).any() else -1.0 for name in METRIC_NAMES}
        columns = (detections.image_index + 1, *detections.boxes_xywh.T, detections.scores, np.ones(len(detections)))
        judged = COCOeval(people, people.loadRes(np.stack(columns, axis=1)), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return dict(zip(METRIC_NAMES, judged.stats.tolist(), strict=True))


def evaluate_average_precision(samples: Sequence[Sample], detections: Sequence[Detections]) -> dict[str, float]:
    """Compute COCO's metrics of detections in memory.

    Args:
        samples: Annotated images.
        detections: Detections of each sample, in the same order.

    Returns:
        The twelve metrics of `METRIC_NAMES`, as fractions.
    """
    table = GroundTruthTable.from_samples([sample.ground_truth for sample in samples])
    area = table.boxes_xywh[:, 2] * table.boxes_xywh[:, 3]
    ground_truth = CocoGroundTruth(Path(), tuple(range(len(samples))), 1, table, area, np.zeros(len(area), bool))
    return evaluate(ground_truth, DetectionTable.from_detections(detections))


def _build_coco_index(ground_truth: CocoGroundTruth) -> COCO:
    """Pictures and records counted from 1: a record of id 0 is never found by pycocotools."""
    table = ground_truth.table
    ignored = ground_truth.iscrowd | table.ignore
    people = COCO()
    people.dataset = {
        "images": [{"id": number + 1} for number in range(table.num_images)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": number + 1,
                "image_id": picture + 1,
                "category_id": 1,
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (picture, box, area, crowd) in enumerate(
                zip(
                    table.image_index.tolist(),
                    table.boxes_xywh.tolist(),
                    ground_truth.area.tolist(),
                    ignored,
                    strict=True,
                )
            )
        ],
    }
    people.createIndex()
    return people
