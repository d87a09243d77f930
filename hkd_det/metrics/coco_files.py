"""Truth and detections in COCO's JSON, and in the forms that CityPersons' programs write of it.

Truth: `images`, `annotations`, `categories`; CityPersons adds `height`, `vis_ratio`, `vis_bbox` and `ignore` to a
record.
Detections: a list of {"image_id", "category_id", "bbox" xywh, "score"}. MATLAB's writers (dt_mat2json.m) make ids
fractions (1.0) and a single detection a bare object: taken too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.person_class import choose_person
from hkd_det.errors import DataError
from hkd_det.metrics.tables import DetectionTable, Floats, TruthTable, are_boxes

Id = int | float | str
Box = tuple[float, float, float, float]
PEDESTRIAN = 1  # the category that the official CityPersons program evaluates

Content = TypeVar("Content")


class _Image(msgspec.Struct, gc=False):
    id: Id


class _Category(msgspec.Struct, gc=False):
    id: Id
    name: str


class _Record(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: Box
    height: float | None = None
    vis_ratio: float | None = None
    vis_bbox: Box | None = None
    ignore: float | bool | None = None
    iscrowd: float | bool = 0
    area: float | None = None


class _Truth(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Record]
    categories: list[_Category] = []


class _Detection(msgspec.Struct, gc=False):
    image_id: Id
    bbox: Box
    score: float
    category_id: Id | None = None
    id: Id | None = None


@dataclass(frozen=True, eq=False)
class CocoTruth:
    """A truth file. ids: of the pictures, sorted, as the official programs go through them; category: the person's.

    area_px: [N] float64 and crowd: [N] bool, of the records in `table`, for COCO's own measure.
    """

    path: Path
    ids: tuple[Id, ...]
    category: Id
    table: TruthTable
    area_px: Floats
    crowd: NDArray[np.bool_]


def read_truth(path: Path) -> CocoTruth:
    """The people of a truth file. Raises DataError, naming the file and the record."""
    content = _decode(path, _Truth)
    ids = _sorted_ids([image.id for image in content.images], path)
    index = {one: number for number, one in enumerate(ids)}
    category = _category(content.categories, path)
    records = []
    for number, record in enumerate(content.annotations):
        if _whole(record.image_id) not in index:
            raise DataError(f"{path}: annotation {number}: image_id {record.image_id!r} is not among its images")
        if _whole(record.category_id) == category:
            records.append(record)
    boxes = _boxes([record.bbox for record in records], path, "annotation")
    table = TruthTable(
        len(ids),
        np.array([index[_whole(record.image_id)] for record in records], np.intp),
        boxes,
        _column([record.bbox[3] if record.height is None else record.height for record in records]),
        _column([_visibility(record) for record in records]),
        np.array([_ignored(record) for record in records], bool),
    )
    area = _column([one.bbox[2] * one.bbox[3] if one.area is None else one.area for one in records])
    crowd = np.array([bool(record.iscrowd) for record in records], bool)
    return CocoTruth(path, ids, category, table, area, crowd)


def read_detections(path: Path, truth: CocoTruth) -> DetectionTable:
    """The people found in the truth's pictures; a detection without category_id is one.

    Raises DataError, naming the file and the detection, for unknown pictures, an id that stands twice, wrong numbers.
    """
    content = _decode(path, list[_Detection] | _Detection)
    every = content if isinstance(content, list) else [content]
    _check_ids(every, path)
    found = [one for one in every if one.category_id is None or _whole(one.category_id) == truth.category]
    if every and not found:
        raise DataError(
            f"{path}: no detection is of category_id {truth.category!r}, the person of {truth.path}; "
            f"the first is of {every[0].category_id!r}"
        )
    index = {one: number for number, one in enumerate(truth.ids)}
    pictures = np.array([index.get(_whole(one.image_id), -1) for one in found], np.intp)
    if (pictures < 0).any():
        unknown = found[int(np.argmax(pictures < 0))].image_id
        raise DataError(f"{path}: image_id {unknown!r} is not among the {len(truth.ids)} pictures of {truth.path}")
    scores = _column([one.score for one in found])
    if not np.isfinite(scores).all():
        raise DataError(f"{path}: a score is {scores[~np.isfinite(scores)][0]}")
    return DetectionTable.sort(pictures, _boxes([one.bbox for one in found], path, "detection"), scores)


def _decode(path: Path, kind: Any) -> Any:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, expected a COCO JSON file") from None
    try:
        return msgspec.json.decode(raw.removeprefix(b"\xef\xbb\xbf"), type=kind)
    except RecursionError:
        raise DataError(f"{path}: not a COCO file: nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not as COCO JSON should be ({error})") from None


def _sorted_ids(found: Sequence[Id], path: Path) -> tuple[Id, ...]:
    ids = [_whole(one) for one in found]
    if not ids:
        raise DataError(f"{path}: lists no pictures")
    if len({isinstance(one, str) for one in ids}) > 1:
        raise DataError(f"{path}: its picture ids are texts and numbers; make them one kind")
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise DataError(f"{path}: picture id {twice!r} stands twice")
    return tuple(sorted(ids))  # one kind, as just checked


def _category(categories: Sequence[_Category], path: Path) -> Id:
    names = {_whole(one.id): one.name for one in categories}
    return choose_person(names, "", f"{path}: its categories") if names else PEDESTRIAN


def _check_ids(found: Sequence[_Detection], path: Path) -> None:
    ids = [_whole(one.id) for one in found if one.id is not None]
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise DataError(f"{path}: detection id {twice!r} stands twice; give each its own, or none")


def _boxes(found: Sequence[Box], path: Path, what: str) -> Floats:
    boxes = np.array(found, np.float64).reshape(-1, 4)
    wrong = ~are_boxes(boxes)
    if wrong.any():
        box = boxes[int(np.argmax(wrong))].tolist()
        raise DataError(f"{path}: {what} with bbox {box}: not [x, y, width, height] of finite sizes from 0")
    return boxes


def _visibility(record: _Record) -> float:
    if record.vis_ratio is not None:
        return record.vis_ratio
    if record.vis_bbox is None or not record.bbox[2] * record.bbox[3]:
        return 1.0
    return record.vis_bbox[2] * record.vis_bbox[3] / (record.bbox[2] * record.bbox[3])


def _ignored(record: _Record) -> bool:
    """In a file of CityPersons' own form a record without `ignore` is a person, as for the official program."""
    if record.ignore is None and record.height is not None and record.vis_ratio is not None:
        return False
    return bool(record.iscrowd if record.ignore is None else record.ignore)


def _column(values: Sequence[float]) -> Floats:
    return np.array(values, np.float64)


def _whole(value: Id) -> Id:
    """An id as MATLAB's writers mean it: 1.0 is 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
