"""Caltech's `.vbb` files: the boxes of a whole film, a MATLAB struct `A` and its version.

As vbb.m 3.2.1 of the Caltech Pedestrian code reads them (`vbbLoad`, `frameAnn`): an object is in a frame if it stands
in the frame's list, whatever its marks `init` and `hide` say; its label stands in the list of labels.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hkd_det.datasets.faults import OnFault, stop
from hkd_det.datasets.frame_boxes import FrameBoxes, box_fault
from hkd_det.datasets.mat_file import numbers, read_mat, text
from hkd_det.errors import DataError

VERSION = 1.4

Row = tuple[str, list[float], list[float], bool, int]  # label, whole, visible, occluded, object


def read_vbb(path: Path, on_fault: OnFault = stop) -> tuple[FrameBoxes, ...]:
    """The boxes of each frame; frame 0 is the film's first (MATLAB's frame 1).

    Raises DataError, naming file, frame (0-based) and object.
    """
    annotation = _annotation(path)
    try:
        lists = annotation["objLists"]
        labels = [text(label) if len(label) else "" for label in annotation["objLbl"].ravel().tolist()]
        frames = int(_number(annotation["nFrame"]))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: no .vbb annotation ({type(error).__name__}: {error})") from None
    cells = lists.ravel() if isinstance(lists, np.ndarray) else ()
    if len(cells) != frames:
        raise DataError(f"{path}: boxes of {len(cells)} frames, but nFrame is {frames}")
    return tuple(_frame(cell, labels, f"{path}: frame {index}", on_fault) for index, cell in enumerate(cells))


def _annotation(path: Path) -> dict[str, Any]:
    content = read_mat(path)
    try:
        found, annotation = _number(content["vers"]), content["A"]
        if found != VERSION:
            raise DataError(f"{path}: .vbb version {found:g}; version {VERSION} is read (vbbLoad and vbbSave convert)")
        if not isinstance(annotation, np.ndarray) or annotation.size != 1 or not isinstance(annotation.item(), dict):
            raise ValueError("A is not a struct")
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: no .vbb annotation ({type(error).__name__}: {error})") from None
    return annotation.item()


def _frame(cell: Any, labels: list[str], where: str, on_fault: OnFault) -> FrameBoxes:
    rows = []
    for record in cell.ravel().tolist() if isinstance(cell, np.ndarray) else [cell]:
        try:
            rows.append(_row(record, labels, where))
        except DataError as fault:
            on_fault(fault)
    return FrameBoxes(
        tuple(row[0] for row in rows),
        np.array([row[1] for row in rows], np.float64).reshape(-1, 4),
        np.array([row[2] for row in rows], np.float64).reshape(-1, 4),
        np.array([row[3] for row in rows], bool),
        np.zeros(len(rows), bool),
        np.array([row[4] for row in rows], np.int64),
    )


def _row(record: Any, labels: list[str], where: str) -> Row:
    try:
        number = _number(record["id"])
        whole, visible = (numbers(record[name]).ravel().tolist() for name in ("pos", "posv"))
        occluded = _number(record["occl"]) != 0
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DataError(f"{where}: no object of a .vbb ({type(error).__name__}: {error})") from None
    if number not in range(1, len(labels) + 1) or not labels[int(number) - 1]:
        raise DataError(f"{where}: object {number:g} has no label")
    if len(whole) != 4 or len(visible) != 4:
        raise DataError(f"{where}: object {number:g}: boxes of {len(whole)} and {len(visible)} numbers, expected 4")
    if fault := box_fault(whole, visible):
        raise DataError(f"{where}: object {number:g}: {fault}")
    return labels[int(number) - 1], whole, visible, occluded, int(number)


def _number(value: Any) -> float:
    found = numbers(value)
    if found.size != 1:
        raise ValueError(f"{found.size} numbers where one should be")
    return float(found.item())
