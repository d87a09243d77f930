"""CrowdHuman (Shao et al. 2018): `.odgt`, a JSON object a line.

`fbox` is the whole person and may reach beyond the picture: kept as annotated. `vbox` is the part that can be seen.
`mask` (crowds, reflections, statues) and `extra.ignore` are ignore regions.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from hkd_det import boxes as box_math
from hkd_det.datasets.faults import OnFault, stop
from hkd_det.datasets.present import present
from hkd_det.datasets.sample import Sample, Truth
from hkd_det.errors import DataError

LARGEST_PX = 2.0**24  # whole pixels beyond it are not exact in float32
IDENTITY = re.compile(r"[\w,.\-]{1,200}", re.ASCII)


def read_crowdhuman(root: Path, split: str, present_only: bool = False, on_fault: OnFault = stop) -> list[Sample]:
    """`annotation_SPLIT.odgt` (train or val) and `Images/ID.jpg`.

    Raises DataError, naming file and line, for what is missing or wrong.
    """
    path = root / f"annotation_{split}.odgt"
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such annotation file") from None
    samples: dict[str, Sample] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                sample = _sample(line, root, f"{path}, line {number}", on_fault)
                if sample.image_id in samples:
                    raise DataError(f"{path}, line {number}: picture {sample.image_id} stands twice")
                samples[str(sample.image_id)] = sample
            except DataError as fault:
                on_fault(fault)
    return present(list(samples.values()), present_only, str(root / "Images"), on_fault)


def _sample(line: str, root: Path, where: str, on_fault: OnFault) -> Sample:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object ({str(error)[:80]})") from None
    if not isinstance(content, dict) or not isinstance(content.get("gtboxes", []), list):
        raise DataError(f"{where}: not an object with ID and gtboxes")
    name = content.get("ID")
    if not isinstance(name, str) or not IDENTITY.fullmatch(name):
        raise DataError(f"{where}: its ID {str(name)[:40]!r} names no picture")
    rows = []
    for number, record in enumerate(content.get("gtboxes", []), 1):
        try:
            rows.append(_record(record, f"{where}, box {number}"))
        except DataError as fault:
            on_fault(fault)
    whole = np.array([row[0] for row in rows], np.float64).reshape(-1, 4)
    seen = np.array([row[1] for row in rows], np.float64).reshape(-1, 4)
    truth = Truth(
        box_math.xyxy_from_xywh(whole).astype(np.float32),
        np.array([row[2] for row in rows], bool) | (whole[:, 2:] <= 0).any(1),
        box_math.xyxy_from_xywh(seen).astype(np.float32),
        tuple(row[3] for row in rows),
    )
    return Sample(name, root / "Images" / f"{name}.jpg", truth)


def _record(record: Any, where: str) -> tuple[list[float], list[float], bool, str]:
    """Whole box xywh, visible box xywh, ignore, tag."""
    if not isinstance(record, dict) or record.get("tag") not in ("person", "mask"):
        raise DataError(f"{where}: its tag is neither person nor mask")
    extra = record.get("extra")
    ignore = record["tag"] == "mask" or bool(isinstance(extra, dict) and extra.get("ignore"))
    whole = _box(record.get("fbox"), "fbox", where)
    return whole, _box(record["vbox"], "vbox", where) if "vbox" in record else whole, ignore, record["tag"]


def _box(box: Any, key: str, where: str) -> list[float]:
    numbers = isinstance(box, list) and len(box) == 4 and all(type(one) in (int, float) for one in box)
    if not numbers or not all(abs(one) <= LARGEST_PX for one in box):
        raise DataError(f"{where}: {key} {str(box)[:60]} is not [x, y, width, height] in pixels")
    if box[2] < 0 or box[3] < 0:
        raise DataError(f"{where}: {key} {box} has a negative width or height")
    return [float(one) for one in box]
