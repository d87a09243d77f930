"""Caltech's `.vbb` files: the boxes of a whole film, a MATLAB struct `A` and its version.

As vbb.m 3.2.1 of the Caltech Pedestrian code reads them (`vbbLoad`, `frameAnn`): an object is in a frame if it stands
in the frame's list, whatever its marks `init` and `hide` say; its label stands in the list of labels.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hkd_det.datasets.faults import ErrorHandler, raise_error
from hkd_det.datasets.frame_boxes import FrameAnnotations, check_box
from hkd_det.datasets.mat_file import read_mat, to_float_array, to_text
from hkd_det.errors import DataError

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
