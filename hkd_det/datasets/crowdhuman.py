"""CrowdHuman (Shao et al., arXiv:1805.00123): `.odgt` files with one JSON object per line.

`fbox` is the full-body box. It can extend beyond the image and is not clipped. `vbox` is the visible box. Records
with the tag `mask` (crowds, reflections, statues) or `extra.ignore` are ignore regions, as in the official evaluation.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from hkd_det.datasets.base import (
    ErrorHandler,
    filter_missing_images,
    is_pixel_value,
    make_size_error,
    parse_flag,
    raise_error,
    show_progress,
)
from hkd_det.errors import DataError
from hkd_det.files import read_content
from hkd_det.structures import GroundTruth, Sample, xyxy_from_xywh

ID_PATTERN = re.compile(r"[\w,.\-]{1,200}", re.ASCII)  # 273271,1a0d6000b9e1f5b7
CrowdHumanRecord = tuple[list[float], list[float], bool, str]  # full box xywh, visible box xywh, ignore, tag


def read_crowdhuman(
    root: Path, split: str, skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Read a CrowdHuman split: `annotation_SPLIT.odgt` and `Images/ID.jpg`.

    Args:
        root: Directory of the dataset.
        split: "train" or "val".
        skip_missing: Omit images that do not exist.
        on_error: Receives the errors of invalid records.

    Returns:
        One sample per image, without image size. The image id is the `ID` of the line.

    Raises:
        DataError: Files are missing or invalid. The message names file and line.
    """
    path = root / f"annotation_{split}.odgt"
    lines = read_content(path, "an annotation file").decode("utf-8-sig", errors="replace").split("\n")
    samples: dict[str, Sample] = {}
    for number, line in enumerate(show_progress(lines, "read .odgt", "image"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                image_id, ground_truth = _parse_line(line, where, on_error)
                if image_id in samples:
                    raise DataError(f"{where}: duplicate image {image_id}. Remove one of the lines.")
                samples[image_id] = Sample(image_id, root / "Images" / f"{image_id}.jpg", ground_truth)
            except DataError as error:
                on_error(error)
    return filter_missing_images(list(samples.values()), skip_missing, str(root / "Images"), on_error)


def _parse_line(line: str, where: str, on_error: ErrorHandler) -> tuple[str, GroundTruth]:
    """Return image id and ground truth."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected a JSON object ({str(error)[:80]}).") from None
    if not isinstance(content, dict) or not isinstance(content.get("gtboxes"), list):
        raise DataError(f"{where}: expected an object with an ID and a list of gtboxes.")
    image_id = content.get("ID")
    if not isinstance(image_id, str) or not ID_PATTERN.fullmatch(image_id):
        raise DataError(f"{where}: ID: expected the name of an image, got {str(image_id)[:40]!r}.")
    records: list[CrowdHumanRecord] = []
    for number, record in enumerate(content["gtboxes"], 1):
        try:
            records.append(_parse_record(record, f"{where}, box {number}"))
        except DataError as error:
            on_error(error)
    return image_id, _build_ground_truth(records)


def _build_ground_truth(records: list[CrowdHumanRecord]) -> GroundTruth:
    boxes, visible = (np.array([record[part] for record in records], np.float64).reshape(-1, 4) for part in (0, 1))
    ignore = np.array([record[2] for record in records], bool)
    return GroundTruth(
        xyxy_from_xywh(boxes).astype(np.float32),
        ignore | (boxes[:, 2:] <= 0).any(axis=1),
        xyxy_from_xywh(visible).astype(np.float32),
        tuple(record[3] for record in records),
    )


def _parse_record(record: Any, where: str) -> CrowdHumanRecord:
    if not isinstance(record, dict) or record.get("tag") not in ("person", "mask"):
        raise DataError(f"{where}: tag: expected person or mask.")
    extra = record.get("extra")
    ignore = record["tag"] == "mask" or (
        isinstance(extra, dict) and parse_flag(extra.get("ignore"), f"{where}: extra.ignore")
    )
    box = _parse_box(record.get("fbox"), "fbox", where)
    return box, _parse_box(record["vbox"], "vbox", where) if "vbox" in record else box, ignore, record["tag"]


def _parse_box(box: Any, key: str, where: str) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_pixel_value, box)):
        raise DataError(f"{where}: {key}: expected [x, y, width, height] in pixels, got {str(box)[:60]}.")
    if box[2] < 0 or box[3] < 0:
        raise make_size_error(f"{where}: {key}", box)
    return [float(value) for value in box]
