"""CrowdHuman (Shao et al. 2018): `.odgt`, a JSON object a line.

`fbox` is the whole person and may reach beyond the picture: kept as annotated. `vbox` is the part that can be seen.
`mask` (crowds, reflections, statues) and `extra.ignore` are ignore regions, as in the evaluation of the set's authors.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hkd_det import boxes as box_math
from hkd_det.datasets.base import ErrorHandler, filter_missing_images, raise_error
from hkd_det.errors import DataError
from hkd_det.structures import GroundTruth, Sample

MAX_COORDINATE_PX = 2.0**24  # whole pixels beyond it are not exact in float32
ID_PATTERN = re.compile(r"[\w,.\-]{1,200}", re.ASCII)  # 273271,1a0d6000b9e1f5b7
CrowdHumanRecord = tuple[list[float], list[float], bool, str]  # whole box xywh, visible box xywh, ignore, tag


def read_crowdhuman(
    root: Path, split: str, skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """`annotation_SPLIT.odgt` (train or val) and `Images/ID.jpg`; the ID is the picture's id. Sizes are not known.

    Raises DataError, naming file and line, for what is missing or wrong.
    """
    path = root / f"annotation_{split}.odgt"
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such annotation file") from None
    samples: dict[str, Sample] = {}
    for number, line in enumerate(tqdm(lines, desc="read .odgt", unit="picture", leave=False, delay=2), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                name, truth = _parse_line(line, where, on_error)
                if name in samples:
                    raise DataError(f"{where}: picture {name} stands twice")
                samples[name] = Sample(name, root / "Images" / f"{name}.jpg", truth)
            except DataError as fault:
                on_error(fault)
    return filter_missing_images(list(samples.values()), skip_missing, str(root / "Images"), on_error)


def _parse_line(line: str, where: str, on_error: ErrorHandler) -> tuple[str, GroundTruth]:
    """ID, and its people."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object ({str(error)[:80]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("gtboxes"), list):
        raise DataError(f"{where}: not an object with an ID and a list of gtboxes")
    name = content.get("ID")
    if not isinstance(name, str) or not ID_PATTERN.fullmatch(name):
        raise DataError(f"{where}: its ID {str(name)[:40]!r} names no picture")
    people: list[CrowdHumanRecord] = []
    for number, record in enumerate(content["gtboxes"], 1):
        try:
            people.append(_parse_record(record, f"{where}, box {number}"))
        except DataError as fault:
            on_error(fault)
    return name, _build_ground_truth(people)


def _build_ground_truth(records: list[CrowdHumanRecord]) -> GroundTruth:
    whole, seen = (np.array([one[part] for one in records], np.float64).reshape(-1, 4) for part in (0, 1))
    marked = np.array([one[2] for one in records], bool)
    return GroundTruth(
        box_math.xyxy_from_xywh(whole).astype(np.float32),
        marked | (whole[:, 2:] <= 0).any(axis=1),
        box_math.xyxy_from_xywh(seen).astype(np.float32),
        tuple(one[3] for one in records),
    )


def _parse_record(record: Any, where: str) -> CrowdHumanRecord:
    if not isinstance(record, dict) or record.get("tag") not in ("person", "mask"):
        raise DataError(f"{where}: its tag is neither person nor mask")
    extra = record.get("extra")
    ignore = record["tag"] == "mask" or bool(isinstance(extra, dict) and extra.get("ignore"))
    whole = _parse_box(record.get("fbox"), "fbox", where)
    return whole, _parse_box(record["vbox"], "vbox", where) if "vbox" in record else whole, ignore, record["tag"]


def _parse_box(box: Any, key: str, where: str) -> list[float]:
    numbers = isinstance(box, list) and len(box) == 4 and all(type(one) in (int, float) for one in box)
    if not numbers or not all(abs(one) <= MAX_COORDINATE_PX for one in box):
        raise DataError(f"{where}: {key} {str(box)[:60]} is not [x, y, width, height] in pixels")
    if box[2] < 0 or box[3] < 0:
        raise DataError(f"{where}: {key} {box} has a negative width or height")
    return [float(one) for one in box]
