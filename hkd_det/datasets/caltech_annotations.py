"""Annotation files of Caltech Pedestrian, with the numbers as stored: 1-based pixels in double precision.

The official miss rate is computed from these numbers. Two formats exist:

* Text files of Piotr's toolbox (bbGt.m), one per frame, in the corrected annotations. After the line
  `% bbGt version=3` each line is an object: label x y w h occluded vx vy vw vh ignore angle. Version 2 has no angle,
  version 1 also no ignore flag. The angle is always 0 in Caltech and is not used.
* `.vbb` files, one per video: a MATLAB struct `A` and its version, as `vbbLoad` and `frameAnn` of vbb.m 3.2.1 read
  them. An object is in a frame if the list of the frame contains it; its fields `init` and `hide` have no effect.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.base import MAX_COORDINATE_PX, ErrorHandler, make_coordinate_error, make_size_error, raise_error
from hkd_det.datasets.mat_file import read_mat, to_float_array, to_text
from hkd_det.errors import DataError
from hkd_det.files import read_content

BBGT_FIELDS = "label x y w h occluded vx vy vw vh ignore angle"
NUM_FIELDS_BY_VERSION = {1: 10, 2: 11, 3: 12}
VBB_VERSION = 1.4

VbbRow = tuple[str, list[float], list[float], bool, int]  # label, full box, visible box, occluded, object id


@dataclass(frozen=True, eq=False)
class FrameAnnotations:
    """Objects of one frame, in the order of the file.

    Attributes:
        labels: N labels ("person", "people", "person?", "person-fa", "ignore").
        boxes_xywh (array[N, 4], float64): Full-body boxes, 1-based pixels.
        visible_xywh (array[N, 4], float64): Boxes of the visible parts, 1-based pixels; zeros if not annotated.
        occluded (array[N], bool): Occlusion flag of the file.
        ignore (array[N], bool): Ignore flag of the file.
        object_ids (array[N], int64): Identity of the object within the video; -1 if the file does not contain it.
        line_numbers: N 1-based line numbers of a text file; empty for a `.vbb` file.
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
        if any(array.shape != (count, 4) for array in boxes) or any(array.shape != (count,) for array in flags):
            shapes = [array.shape for array in (*boxes, *flags)]
            raise ValueError(f"expected arrays of the same length, got {shapes} and {count} labels")

    def __len__(self) -> int:
        return len(self.labels)


def check_box(box_xywh: Sequence[float], visible_xywh: Sequence[float], where: str) -> None:
    """Check the full box and the visible box of an object.

    Args:
        box_xywh: Full box, 1-based pixels.
        visible_xywh: Visible box, 1-based pixels; zeros if not annotated.
        where: Prefix of the error message.

    Raises:
        DataError: A box is not finite or has a negative size.
    """
    for box in (box_xywh, visible_xywh):
        if not all(abs(value) <= MAX_COORDINATE_PX for value in box):  # also True for NaN
            raise make_coordinate_error(where, list(box))
        if box[2] < 0 or box[3] < 0:
            raise make_size_error(where, list(box))


def read_bbgt(path: Path, on_error: ErrorHandler = raise_error) -> FrameAnnotations:
    """Read a text file of one frame.

    Args:
        path: Text file.
        on_error: Receives the errors of invalid lines.

    Returns:
        Objects of the frame.

    Raises:
        DataError: The file is missing or invalid. The message names file and line.
    """
    try:
        lines = read_content(path, "a text file").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected a text file, got other bytes.") from None
    num_fields = _parse_bbgt_header(lines[0] if lines else "", path)
    labels, rows, line_numbers = [], [], []
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            try:
                label, row = _parse_bbgt_line(line, num_fields, f"{path}, line {number}")
            except DataError as error:
                on_error(error)
                continue
            labels.append(label)
            rows.append(row)
            line_numbers.append(number)
    values = np.array(rows, np.float64).reshape(-1, 11)
    return FrameAnnotations(
        tuple(labels),
        values[:, :4],
        values[:, 5:9],
        values[:, 4] != 0,
        values[:, 9] != 0,
        np.full(len(labels), -1, np.int64),
        tuple(line_numbers),
    )


def read_vbb(path: Path, on_error: ErrorHandler = raise_error) -> tuple[FrameAnnotations, ...]:
    """Read the annotations of all frames of a video.

    Args:
        path: `.vbb` file.
        on_error: Receives the errors of invalid objects.

    Returns:
        Annotations per frame. Index 0 is the first frame of the video, frame 1 in MATLAB.

    Raises:
        DataError: The file is missing or invalid. The message names file, 0-based frame and object.
    """
    annotation = _read_vbb_struct(path)
    try:
        object_lists = annotation["objLists"]
        labels = [to_text(label) if len(label) else "" for label in annotation["objLbl"].ravel().tolist()]
        num_frames = int(_to_scalar(annotation["nFrame"]))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: expected a .vbb annotation ({type(error).__name__}: {error}).") from None
    cells = object_lists.ravel() if isinstance(object_lists, np.ndarray) else ()
    if len(cells) != num_frames:
        raise DataError(f"{path}: expected objects of {num_frames} frames (nFrame), got {len(cells)}.")
    return tuple(_parse_vbb_frame(cell, labels, f"{path}: frame {index}", on_error) for index, cell in enumerate(cells))


def _parse_bbgt_header(header: str, path: Path) -> int:
    """Return the number of fields per line."""
    match = re.fullmatch(r"%\s*bbGt version=(\d{1,3})\s*", header)
    if not match:
        raise DataError(f"{path}, line 1: expected `% bbGt version=3`, got {header[:60]!r}.")
    version = int(match[1])
    if version not in NUM_FIELDS_BY_VERSION:
        raise DataError(f"{path}, line 1: bbGt version {version} is not supported. Expected 1, 2 or 3.")
    return NUM_FIELDS_BY_VERSION[version]


def _parse_bbgt_line(line: str, num_fields: int, where: str) -> tuple[str, list[float]]:
    """Return the label and the 11 numbers of version 3."""
    label, *words = line.split()
    try:
        row = [float(word) for word in words]
    except ValueError:
        row = []
    if len(row) != num_fields - 1:
        expected = " ".join(BBGT_FIELDS.split()[:num_fields])
        raise DataError(f"{where}: expected `{expected}`, got {line.strip()[:80]!r}.")
    row += [0.0] * (11 - len(row))
    if not math.isfinite(row[4]) or not math.isfinite(row[9]):
        raise DataError(f"{where}: expected 0 or 1 for occluded and ignore, got {row[4]:g} and {row[9]:g}.")
    check_box(row[:4], row[5:9], where)
    return label, row


def _read_vbb_struct(path: Path) -> dict[str, Any]:
    content = read_mat(path)
    try:
        version, annotation = _to_scalar(content["vers"]), content["A"]
        if version != VBB_VERSION:
            raise DataError(
                f"{path}: .vbb version {version:g} is not supported, only {VBB_VERSION}. "
                "Convert it with vbbLoad and vbbSave."
            )
        if not isinstance(annotation, np.ndarray) or annotation.size != 1 or not isinstance(annotation.item(), dict):
            raise ValueError("A is not a struct")
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: expected a .vbb annotation ({type(error).__name__}: {error}).") from None
    return annotation.item()


def _parse_vbb_frame(cell: Any, labels: list[str], where: str, on_error: ErrorHandler) -> FrameAnnotations:
    rows = []
    for record in cell.ravel().tolist() if isinstance(cell, np.ndarray) else [cell]:
        try:
            rows.append(_parse_vbb_object(record, labels, where))
        except DataError as error:
            on_error(error)
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
        box, visible = (to_float_array(record[name]).ravel().tolist() for name in ("pos", "posv"))
        occluded = _to_scalar(record["occl"]) != 0
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DataError(f"{where}: expected an object of a .vbb ({type(error).__name__}: {error}).") from None
    if number not in range(1, len(labels) + 1) or not labels[int(number) - 1]:
        raise DataError(f"{where}: object {number:g} has no label. Add it to objLbl.")
    if len(box) != 4 or len(visible) != 4:
        raise DataError(f"{where}: object {number:g}: expected boxes of 4 numbers, got {len(box)} and {len(visible)}.")
    check_box(box, visible, f"{where}: object {number:g}")
    return labels[int(number) - 1], box, visible, occluded, int(number)


def _to_scalar(value: Any) -> float:
    array = to_float_array(value)
    if array.size != 1:
        raise ValueError(f"expected one number, got {array.size}")
    return float(array.item())
