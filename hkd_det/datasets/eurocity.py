"""EuroCity Persons (Braun et al. 2019): a JSON file a picture, day and night.

After the benchmark's own evaluation of pedestrians: pedestrians are to be found, but for those who sit, lie or are
behind glass; they, riders and groups far away are ignore regions; vehicles, and posters of groups, are nothing. Boxes
are cut at the picture's border. That program has two settings for riders: this is the one that ignores them. A group
of riders far away, which it leaves out, is ignored here: there are people in it.

How much of someone is seen is known as a level only: over 10, 40 or 80 per cent are occluded or truncated. The visible
box is the upper part of the whole one, as it is mostly legs that are hidden. Its height is the middle of what the worse
of the two levels leaves: 0.75 (0.6 to 0.9), 0.4 (0.2 to 0.6) or 0.1 (0 to 0.2). So the limits 0.2, 0.65 and 0.9 of
CityPersons' setups fall between the levels, as the benchmark's own do: `>10` is reasonable, `>40` is not.
"""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hkd_det import boxes as box_math
from hkd_det.datasets.base import ErrorHandler, JsonLocations, filter_missing_images, raise_error
from hkd_det.errors import DataError
from hkd_det.files import read_json
from hkd_det.structures import GroundTruth, Sample

PEDESTRIAN, DISTANT_GROUP = "pedestrian", "person-group-far-away"
IGNORED_IDENTITIES = ("rider", "co-rider", DISTANT_GROUP, "rider+vehicle-group-far-away")
VEHICLES = ("bicycle", "buggy", "motorbike", "scooter", "tricycle", "wheelchair")
SKIPPED_IDENTITIES = (None, *VEHICLES, *(f"{name}-group" for name in VEHICLES))  # None: the annotators left it open
IGNORED_TAGS = {"sitting-lying", "behind-glass"}
VISIBLE_RATIO_BY_LEVEL = {10: 0.75, 40: 0.4, 80: 0.1}
VISIBLE_RATIO_BY_TAG = {
    f"{what}>{level}": share for what in ("occluded", "truncated") for level, share in VISIBLE_RATIO_BY_LEVEL.items()
}
TIMES_OF_DAY = ("day", "night")
MAX_COORDINATE_PX = 2**24  # whole pixels beyond it are not exact in float32
EuroCityRecord = tuple[
    list[float], float, bool, str
]  # box xyxy, the share of its height that is seen, ignore, identity


def read_eurocity(
    root: Path, split: str, time: str = "day", skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """`TIME/labels/SPLIT/CITY/*.json` and `TIME/img/SPLIT/CITY/*.png`; time: day or night, split: train or val.

    A picture's id is such as "rome/rome_00012". Raises DataError, naming file and line, for what is missing or wrong.
    """
    labels, pictures = root / time / "labels" / split, root / time / "img" / split
    files = sorted(labels.glob("*/*.json"))
    if not files:
        raise DataError(f"{labels}: no such folder, or no CITY/*.json in it")
    samples = []
    for path in tqdm(files, desc="read .json", unit="file", leave=False, delay=2):
        try:
            samples.append(_read_sample(path, pictures / path.parent.name / f"{path.stem}.png", on_error))
        except DataError as fault:
            on_error(fault)
    return filter_missing_images(samples, skip_missing, str(pictures), on_error)


def _read_sample(path: Path, image_path: Path, on_error: ErrorHandler) -> Sample:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("children"), list):
        raise DataError(f"{path}: not an annotation of EuroCity Persons: it has no list 'children'")
    height, width = (content.get(key) for key in ("imageheight", "imagewidth"))
    if (
        type(height) is not int
        or type(width) is not int
        or not (0 < height < MAX_COORDINATE_PX and 0 < width < MAX_COORDINATE_PX)
    ):
        raise DataError(f"{path}: imagewidth {width!r} and imageheight {height!r} are no size in pixels")
    people: list[EuroCityRecord] = []
    places = JsonLocations(path)
    for number, child in enumerate(content["children"]):
        try:
            found = _parse_record(child, (height, width), f"{path}: child {number + 1}")
            people += [found] if found else []
        except DataError as fault:
            on_error(places.annotate(fault, "children", number))
    return Sample(f"{path.parent.name}/{path.stem}", image_path, _build_ground_truth(people), (height, width))


def _build_ground_truth(records: list[EuroCityRecord]) -> GroundTruth:
    whole = np.array([one[0] for one in records], np.float64).reshape(-1, 4)
    shares, marked = np.array([one[1] for one in records], np.float64), np.array([one[2] for one in records], bool)
    seen = whole.copy()
    seen[:, 3] = whole[:, 1] + shares * (whole[:, 3] - whole[:, 1])
    ignore = marked | (box_math.box_area(whole) <= 0)
    return GroundTruth(whole.astype(np.float32), ignore, seen.astype(np.float32), tuple(one[3] for one in records))


def _parse_record(child: Any, size_hw: tuple[int, int], where: str) -> EuroCityRecord | None:
    """None for what is neither a person nor to be ignored."""
    if not isinstance(child, dict) or "identity" not in child:
        raise DataError(f"{where}: has no identity")
    identity, tags = child["identity"], _parse_tags(child, where)
    if identity in SKIPPED_IDENTITIES or (identity == DISTANT_GROUP and "depiction" in tags):
        return None
    if identity != PEDESTRIAN and identity not in IGNORED_IDENTITIES:
        raise DataError(f"{where}: identity {str(identity)[:40]!r} is none of EuroCity Persons'")
    share = min((VISIBLE_RATIO_BY_TAG[tag] for tag in tags if tag in VISIBLE_RATIO_BY_TAG), default=1.0)
    return (
        _parse_box(child, size_hw, where),
        share,
        identity != PEDESTRIAN or not IGNORED_TAGS.isdisjoint(tags),
        identity,
    )


def _parse_tags(child: dict[str, Any], where: str) -> list[str]:
    tags = child.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise DataError(f"{where}: its tags are no list of texts")
    for tag in tags:
        if tag.startswith(("occluded", "truncated")) and tag not in VISIBLE_RATIO_BY_TAG:
            raise DataError(f"{where}: tag {tag[:40]!r} is none of {', '.join(VISIBLE_RATIO_BY_TAG)}")
    return tags


def _parse_box(child: dict[str, Any], size_hw: tuple[int, int], where: str) -> list[float]:
    """xyxy, cut at the picture's border."""
    box: list[Any] = [child.get(key) for key in ("x0", "y0", "x1", "y1")]
    if not all(type(value) in (int, float) and abs(value) <= MAX_COORDINATE_PX for value in box):
        raise DataError(f"{where}: x0, y0, x1, y1 {str(box)[:80]} are not pixels")
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0:
        raise DataError(f"{where}: the box {box} has a negative width or height")
    if x0 >= size_hw[1] or y0 >= size_hw[0] or x1 <= 0 or y1 <= 0:
        raise DataError(f"{where}: the box {box} is outside its picture of {size_hw[1]} x {size_hw[0]} pixels")
    cut: list[float] = box_math.clip_boxes(np.array([box], np.float64), size_hw)[0].tolist()
    return cut
