"""The text form of Piotr's toolbox (bbGt.m), one file a frame: Caltech's new annotations (Zhang et al. 2016).

`% bbGt version=3`, then a line an object: label x y w h occluded vx vy vw vh ignore angle. Version 2 has no angle,
version 1 no ignore flag either. The angle, always 0 in Caltech, is not used.
"""

import math
import re
from pathlib import Path

import numpy as np

from hkd_det.datasets.faults import ErrorHandler, raise_error
from hkd_det.datasets.frame_boxes import FrameAnnotations, check_box
from hkd_det.errors import DataError

BBGT_FIELDS = "label x y w h occluded vx vy vw vh ignore angle"
NUM_FIELDS_BY_VERSION = {1: 10, 2: 11, 3: 12}


def read_bbgt(path: Path, on_error: ErrorHandler = raise_error) -> FrameAnnotations:
    """The frame's boxes; raises DataError, naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, expected an annotation file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file") from None
    width = _parse_bbgt_header(lines[0] if lines else "", path)
    labels, rows, lines_of = [], [], []
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            try:
                label, row = _parse_bbgt_line(line, width, f"{path}, line {number}")
            except DataError as fault:
                on_error(fault)
                continue
            labels.append(label)
            rows.append(row)
            lines_of.append(number)
    values = np.array(rows, np.float64).reshape(-1, 11)
    return FrameAnnotations(
        tuple(labels),
        values[:, :4],
        values[:, 5:9],
        values[:, 4] != 0,
        values[:, 9] != 0,
        np.full(len(labels), -1, np.int64),
        tuple(lines_of),
    )


def _parse_bbgt_header(header: str, path: Path) -> int:
    """How many fields a line has."""
    found = re.fullmatch(r"%\s*bbGt version=(\d{1,3})\s*", header)
    if not found:
        raise DataError(f"{path}, line 1: {header[:60]!r} where `% bbGt version=3` should be")
    version = int(found[1])
    if version not in NUM_FIELDS_BY_VERSION:
        raise DataError(f"{path}, line 1: bbGt version {version}; versions 1 to 3 are read")
    return NUM_FIELDS_BY_VERSION[version]


def _parse_bbgt_line(line: str, num_fields: int, where: str) -> tuple[str, list[float]]:
    """Label, and the numbers of version 3."""
    label, *words = line.split()
    try:
        row = [float(word) for word in words]
    except ValueError:
        row = []
    if len(row) != num_fields - 1:
        raise DataError(f"{where}: {line.strip()[:80]!r} is not `{' '.join(BBGT_FIELDS.split()[:num_fields])}`")
    row += [0.0] * (11 - len(row))
    if not math.isfinite(row[4]) or not math.isfinite(row[9]):
        raise DataError(f"{where}: occluded {row[4]:g} and ignore {row[9]:g} must be 0 or 1")
    if fault := check_box(row[:4], row[5:9]):
        raise DataError(f"{where}: {fault}")
    return label, row
