"""EuroCity Persons (Braun et al. 2019): a JSON file a picture, day and night.

Pedestrians are to be found; riders, groups and all else are ignore regions, as in the benchmark's own evaluation of
pedestrians. Of occlusion only a level is known (`occluded>10`, `>40`, `>80` per cent): the visible box is the upper
part of the whole one, of the largest share the level allows (0.9, 0.6, 0.2), since it is mostly legs that are hidden.
So someone at a limit of a protocol is rather taken for too well seen than lost.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hkd_det.datasets.faults import OnFault, stop
from hkd_det.datasets.json_file import read_json
from hkd_det.datasets.present import present
from hkd_det.datasets.sample import Sample, Truth
from hkd_det.errors import DataError

PEDESTRIAN = "pedestrian"
MOST_SEEN = {"occluded>10": 0.9, "occluded>40": 0.6, "occluded>80": 0.2}
TIMES = ("day", "night")
LARGEST_PX = 2.0**24  # whole pixels beyond it are not exact in float32


def read_eurocity(
    root: Path, split: str, time: str = "day", present_only: bool = False, on_fault: OnFault = stop
) -> list[Sample]:
    """`TIME/labels/SPLIT/CITY/*.json` and `TIME/img/SPLIT/CITY/*.png`; time: day or night, split: train or val.

    Raises DataError, naming the file, for what is missing or wrong.
    """
    labels, pictures = root / time / "labels" / split, root / time / "img" / split
    files = sorted(labels.glob("*/*.json"))
    if not files:
        raise DataError(f"{labels}: no such folder, or no CITY/*.json in it")
    samples = []
    for path in files:
        try:
            samples.append(_sample(path, pictures / path.parent.name / f"{path.stem}.png", on_fault))
        except DataError as fault:
            on_fault(fault)
    return present(samples, present_only, str(pictures), on_fault)


def _sample(path: Path, picture: Path, on_fault: OnFault) -> Sample:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("children"), list):
        raise DataError(f"{path}: not an annotation of EuroCity Persons: it has no list 'children'")
    height, width = (content.get(key) for key in ("imageheight", "imagewidth"))
    if type(height) is not int or type(width) is not int or not 0 < min(height, width) <= max(height, width) < 2**24:
        raise DataError(f"{path}: imagewidth {width!r} and imageheight {height!r} are no size in pixels")
    boxes, seen, labels = [], [], []
    for number, record in enumerate(content["children"], 1):
        try:
            box, share, label = _record(record, f"{path}: child {number}")
        except DataError as fault:
            on_fault(fault)
            continue
        boxes.append(box)
        seen.append([*box[:3], box[1] + share * (box[3] - box[1])])
        labels.append(label)
    whole = np.array(boxes, np.float32).reshape(-1, 4)
    ignore = np.array([label != PEDESTRIAN for label in labels], bool)
    truth = Truth(whole, ignore, np.array(seen, np.float32).reshape(-1, 4), tuple(labels))
    return Sample(f"{path.parent.name}/{path.stem}", picture, truth, (height, width))


def _record(record: Any, where: str) -> tuple[list[float], float, str]:
    """Box xyxy, the share that can be seen, identity."""
    if not isinstance(record, dict) or not isinstance(record.get("identity"), str):
        raise DataError(f"{where}: has no identity")
    box: list[Any] = [record.get(key) for key in ("x0", "y0", "x1", "y1")]
    if not all(type(value) in (int, float) and abs(value) <= LARGEST_PX for value in box):
        raise DataError(f"{where}: x0, y0, x1, y1 {box} are not pixels")
    if box[2] < box[0] or box[3] < box[1]:
        raise DataError(f"{where}: the box {box} has a negative width or height")
    tags = record.get("tags", [])
    if not isinstance(tags, list):
        raise DataError(f"{where}: its tags are no list")
    share = min((MOST_SEEN[tag] for tag in tags if isinstance(tag, str) and tag in MOST_SEEN), default=1.0)
    return [float(value) for value in box], share, record["identity"]
