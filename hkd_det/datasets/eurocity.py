"""EuroCity Persons (Braun et al., TPAMI 2019): one JSON file per image, day and night.

The reader follows the official evaluation of pedestrians, in its setting that ignores riders:

* Pedestrians are persons to detect, except if they sit, lie or are behind glass.
* Those, riders and distant groups are ignore regions. The official program omits distant groups of riders; this
  reader ignores them, because they contain persons.
* Vehicles, and depictions of groups, are omitted.
* Boxes are clipped to the image.

The annotations contain the visible part only as a level: more than 10, 40 or 80 percent are occluded or truncated.
The visible box is the upper part of the full box, because legs are hidden most often. The worse of the two levels sets
its height relative to the full box: 0.75 (range 0.6 to 0.9), 0.4 (0.2 to 0.6) or 0.1 (0 to 0.2). The limits 0.2, 0.65
and 0.9 of the CityPersons setups then separate the levels as the limits of the benchmark do. `>10` is in the setup
Reasonable and `>40` is not.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hkd_det.datasets.base import (
    MAX_COORDINATE_PX,
    ErrorHandler,
    JsonLocations,
    filter_missing_images,
    is_pixel_value,
    make_coordinate_error,
    make_outside_error,
    make_size_error,
    raise_error,
    show_progress,
)
from hkd_det.errors import DataError, UsageError
from hkd_det.files import read_json
from hkd_det.structures import GroundTruth, Sample, box_area, clip_boxes

PEDESTRIAN, DISTANT_GROUP = "pedestrian", "person-group-far-away"
IGNORED_IDENTITIES = ("rider", "co-rider", DISTANT_GROUP, "rider+vehicle-group-far-away")
VEHICLES = ("bicycle", "buggy", "motorbike", "scooter", "tricycle", "wheelchair")
SKIPPED_IDENTITIES = (None, *VEHICLES, *(f"{name}-group" for name in VEHICLES))  # None: not annotated
IGNORED_TAGS = {"sitting-lying", "behind-glass"}
VISIBLE_RATIO_BY_LEVEL = {10: 0.75, 40: 0.4, 80: 0.1}
VISIBLE_RATIO_BY_TAG = {
    f"{tag}>{level}": ratio for tag in ("occluded", "truncated") for level, ratio in VISIBLE_RATIO_BY_LEVEL.items()
}
TIMES_OF_DAY = ("day", "night")
EuroCityRecord = tuple[list[float], float, bool, str]  # box xyxy, visible ratio of its height, ignore, identity


def read_eurocity(
    root: Path, split: str, time: str = "day", skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Read a EuroCity Persons split: `TIME/labels/SPLIT/CITY/*.json` and `TIME/img/SPLIT/CITY/*.png`.

    Args:
        root: Directory of the dataset.
        split: "train" or "val".
        time: "day" or "night".
        skip_missing: Omit images that do not exist.
        on_error: Receives the errors of invalid records.

    Returns:
        One sample per image. An image id is "rome/rome_00012", for example.

    Raises:
        UsageError: `time` is invalid.
        DataError: Files are missing or invalid. The message names file and line.
    """
    if time not in TIMES_OF_DAY:
        raise UsageError(f"{root}: time: expected {' or '.join(TIMES_OF_DAY)}, got {time!r}.")
    label_dir, image_dir = root / time / "labels" / split, root / time / "img" / split
    files = sorted(label_dir.glob("*/*.json"))
    if not files:
        raise DataError(f"{label_dir}: expected files CITY/*.json, got none.")
    samples = []
    for path in show_progress(files, "read .json", "file"):
        try:
            samples.append(_read_sample(path, image_dir / path.parent.name / f"{path.stem}.png", on_error))
        except DataError as error:
            on_error(error)
    return filter_missing_images(samples, skip_missing, str(image_dir), on_error)


def _read_sample(path: Path, image_path: Path, on_error: ErrorHandler) -> Sample:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("children"), list):
        raise DataError(f"{path}: expected an annotation of EuroCity Persons with a list 'children'.")
    height, width = (content.get(key) for key in ("imageheight", "imagewidth"))
    if (
        type(height) is not int
        or type(width) is not int
        or not (0 < height < MAX_COORDINATE_PX and 0 < width < MAX_COORDINATE_PX)
    ):
        raise DataError(f"{path}: expected imagewidth and imageheight in pixels, got {width!r} and {height!r}.")
    records: list[EuroCityRecord] = []
    locations = JsonLocations(path)
    for index, child in enumerate(content["children"]):
        try:
            record = _parse_record(child, (height, width), f"{path}: child {index + 1}")
            records += [record] if record else []
        except DataError as error:
            on_error(locations.annotate(error, "children", index))
    return Sample(f"{path.parent.name}/{path.stem}", image_path, _build_ground_truth(records), (height, width))


def _build_ground_truth(records: list[EuroCityRecord]) -> GroundTruth:
    boxes = np.array([record[0] for record in records], np.float64).reshape(-1, 4)
    visible_ratio = np.array([record[1] for record in records], np.float64)
    ignore = np.array([record[2] for record in records], bool) | (box_area(boxes) <= 0)
    visible = boxes.copy()
    visible[:, 3] = boxes[:, 1] + visible_ratio * (boxes[:, 3] - boxes[:, 1])
    labels = tuple(record[3] for record in records)
    return GroundTruth(boxes.astype(np.float32), ignore, visible.astype(np.float32), labels)


def _parse_record(child: Any, size_hw: tuple[int, int], where: str) -> EuroCityRecord | None:
    """Return a record, or None if it is neither a person nor an ignore region."""
    if not isinstance(child, dict) or "identity" not in child:
        raise DataError(f"{where}: expected an object with an identity.")
    identity, tags = child["identity"], _parse_tags(child, where)
    if identity in SKIPPED_IDENTITIES or (identity == DISTANT_GROUP and "depiction" in tags):
        return None
    if identity != PEDESTRIAN and identity not in IGNORED_IDENTITIES:
        known = ", ".join([PEDESTRIAN, *IGNORED_IDENTITIES, *VEHICLES])
        raise DataError(f"{where}: identity: expected one of {known}, got {str(identity)[:40]!r}.")
    visible_ratio = min((VISIBLE_RATIO_BY_TAG[tag] for tag in tags if tag in VISIBLE_RATIO_BY_TAG), default=1.0)
    ignore = identity != PEDESTRIAN or not IGNORED_TAGS.isdisjoint(tags)
    return _parse_box(child, size_hw, where), visible_ratio, ignore, identity


def _parse_tags(child: dict[str, Any], where: str) -> list[str]:
    tags = child.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise DataError(f"{where}: tags: expected a list of strings.")
    for tag in tags:
        if tag.startswith(("occluded", "truncated")) and tag not in VISIBLE_RATIO_BY_TAG:
            raise DataError(f"{where}: expected one of the tags {', '.join(VISIBLE_RATIO_BY_TAG)}, got {tag[:40]!r}.")
    return tags


def _parse_box(child: dict[str, Any], size_hw: tuple[int, int], where: str) -> list[float]:
    """Return a box as xyxy, clipped to the image."""
    box: list[Any] = [child.get(key) for key in ("x0", "y0", "x1", "y1")]
    if not all(map(is_pixel_value, box)):
        raise make_coordinate_error(f"{where}: x0, y0, x1, y1", box)
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        raise make_size_error(where, box)
    if x0 >= size_hw[1] or y0 >= size_hw[0] or x1 <= 0 or y1 <= 0:
        raise make_outside_error(where, box, size_hw)
    clipped: list[float] = clip_boxes(np.array([box], np.float64), size_hw)[0].tolist()
    return clipped
