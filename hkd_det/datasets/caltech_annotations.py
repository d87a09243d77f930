"""`FrameBoxes`: what Caltech's annotations say about one frame, in the numbers of the file.

The official miss rate is reckoned from just these numbers: 1-based pixels, in double precision.

The text form of Piotr's toolbox (bbGt.m), one file a frame: Caltech's new annotations (Zhang et al. 2016).

`% bbGt version=3`, then a line an object: label x y w h occluded vx vy vw vh ignore angle. Version 2 has no angle,
version 1 no ignore flag either. The angle, always 0 in Caltech, is not used.

Caltech's `.vbb` files: the boxes of a whole film, a MATLAB struct `A` and its version.

As vbb.m 3.2.1 of the Caltech Pedestrian code reads them (`vbbLoad`, `frameAnn`): an object is in a frame if it stands
in the frame's list, whatever its marks `init` and `hide` say; its label stands in the list of labels.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.base import ErrorHandler, raise_error
from hkd_det.datasets.mat_file import read_mat, to_float_array, to_text
from hkd_det.errors import DataError

MAX_COORDINATE_PX = 2.0**24  # whole pixels beyond it are not exact in float32


@dataclass(frozen=True, eq=False)
class FrameAnnotations:
    """The objects of one frame, in the order of the file.

    labels: N names ("person", "people", "person?", "person-fa", "ignore").
    boxes_xywh: [N, 4] float64, 1-based pixels: the whole object, hidden parts included.
    visible_xywh: [N, 4] float64, 1-based pixels: what can be seen of it; all zero where nobody marked it.
    occluded, ignore: [N] bool: the file's own flags.
    objects: [N] int64: the same number is the same person in all frames of a film; -1 where the file does not say.
    lines: the N lines of a text file, counted from 1; none for another file.
    """

    labels: tuple[str, ...]
    boxes_xywh: NDArray[np.float64]
    visible_xywh: NDArray[np.float64]
    occluded: NDArray[np.bool_]
    ignore: NDArray[np.bool_]
    object_ids: NDArray[np.int64]
    line_numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.labels)
        boxes, flags = (self.boxes_xywh, self.visible_xywh), (self.occluded, self.ignore, self.object_ids)
        if any(one.shape != (count, 4) for one in boxes) or any(one.shape != (count,) for one in flags):
            raise ValueError(f"{[one.shape for one in (*boxes, *flags)]} and {count} labels do not belong together")

    def __len__(self) -> int:
        return len(self.labels)


def check_box(box_xywh: Sequence[float], visible_xywh: Sequence[float]) -> str:
    """What is wrong with an object's numbers; empty if nothing is."""
    for box in (box_xywh, visible_xywh):
        if not all(abs(value) <= MAX_COORDINATE_PX for value in box):  # as a comparison with NaN is false, so told too
            return f"the box {list(box)} holds NaN, infinity or no pixels"
        if box[2] < 0 or box[3] < 0:
            return f"the box {list(box)} has a negative width or height"
    return ""


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


VBB_VERSION = 1.4


VbbRow = tuple[str, list[float], list[float], bool, int]  # label, whole, visible, occluded, object


def read_vbb(path: Path, on_error: ErrorHandler = raise_error) -> tuple[FrameAnnotations, ...]:
    """The boxes of each frame; frame 0 is the film's first (MATLAB's frame 1).

    Raises DataError, naming file, frame (0-based) and object.
    """
    annotation = _read_vbb(path)
    try:
        lists = annotation["objLists"]
        labels = [to_text(label) if len(label) else "" for label in annotation["objLbl"].ravel().tolist()]
        frames = int(_to_scalar(annotation["nFrame"]))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: no .vbb annotation ({type(error).__name__}: {error})") from None
    cells = lists.ravel() if isinstance(lists, np.ndarray) else ()
    if len(cells) != frames:
        raise DataError(f"{path}: boxes of {len(cells)} frames, but nFrame is {frames}")
    return tuple(_parse_vbb_frame(cell, labels, f"{path}: frame {index}", on_error) for index, cell in enumerate(cells))


def _read_vbb(path: Path) -> dict[str, Any]:
    content = read_mat(path)
    try:
        found, annotation = _to_scalar(content["vers"]), content["A"]
        if found != VBB_VERSION:
            raise DataError(
                f"{path}: .vbb version {found:g}; version {VBB_VERSION} is read (vbbLoad and vbbSave convert)"
            )
        if not isinstance(annotation, np.ndarray) or annotation.size != 1 or not isinstance(annotation.item(), dict):
            raise ValueError("A is not a struct")
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: no .vbb annotation ({type(error).__name__}: {error})") from None
    return annotation.item()


def _parse_vbb_frame(cell: Any, labels: list[str], where: str, on_error: ErrorHandler) -> FrameAnnotations:
    rows = []
    for record in cell.ravel().tolist() if isinstance(cell, np.ndarray) else [cell]:
        try:
            rows.append(_parse_vbb_object(record, labels, where))
        except DataError as fault:
            on_error(fault)
    return FrameAnnotations(
        tuple(row[0] for row in rows),
        np.array([row[1] for row in rows], np.float64).reshape(-1, 4),
        np.array([row[2] for row in rows], np.float64).reshape(-1, 4),
        np.array([row[3] for row in rows], bool),
        np.zeros(len(rows), bool),
        np.array([row[4] for row in rows], np.int64),
    )


def _parse_vbb_object(record: Any, labels: list[str], where: str) -> VbbRow:
    try:
        number = _to_scalar(record["id"])
        whole, visible = (to_float_array(record[name]).ravel().tolist() for name in ("pos", "posv"))
        occluded = _to_scalar(record["occl"]) != 0
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DataError(f"{where}: no object of a .vbb ({type(error).__name__}: {error})") from None
    if number not in range(1, len(labels) + 1) or not labels[int(number) - 1]:
        raise DataError(f"{where}: object {number:g} has no label")
    if len(whole) != 4 or len(visible) != 4:
        raise DataError(f"{where}: object {number:g}: boxes of {len(whole)} and {len(visible)} numbers, expected 4")
    if fault := check_box(whole, visible):
        raise DataError(f"{where}: object {number:g}: {fault}")
    return labels[int(number) - 1], whole, visible, occluded, int(number)


def _to_scalar(value: Any) -> float:
    found = to_float_array(value)
    if found.size != 1:
        raise ValueError(f"{found.size} numbers where one should be")
    return float(found.item())
