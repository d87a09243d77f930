"""Caltech Pedestrian (Dollár et al., TPAMI 2012): video frames with the original or the corrected annotations.

set00 to set05 are for training, set06 to set10 for testing. The protocol uses every 30th frame of the test sets:
I00029, I00059 and so on. `python -m hkd_det.datasets.caltech_extract` extracts the frames from the videos. `person`
is a person to detect; `people`, `person?` and `ignore` are ignore regions; `person-fa`, a false alarm of the
annotators, is omitted. The corrected annotations are those of Zhang et al. (CVPR 2016).

The annotation files contain 1-based pixels in double precision. The official miss rate is computed from these numbers.
Two formats exist:

* Text files of Piotr's toolbox (bbGt.m), one per frame, in the corrected annotations. After the line
  `% bbGt version=3` each line is an object: label x y w h occluded vx vy vw vh ignore angle. Version 2 has no angle,
  version 1 also no ignore flag. The angle is always 0 in Caltech and is not used.
* `.vbb` files, one per video: a MATLAB struct `A` and its version, as `vbbLoad` and `frameAnn` of vbb.m 3.2.1 read
  them. An object is in a frame if the list of the frame contains it; its fields `init` and `hide` have no effect.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.config import check_range
from hkd_det.datasets.base import (
    MAX_COORDINATE_PX,
    ErrorHandler,
    filter_missing_images,
    make_coordinate_error,
    make_size_error,
    raise_error,
    show_progress,
)
from hkd_det.datasets.mat_file import read_mat, to_float_array, to_text
from hkd_det.errors import DataError, UsageError
from hkd_det.files import read_content
from hkd_det.structures import GroundTruth, Sample, box_area, xyxy_from_xywh

SETS = tuple(f"set{number:02}" for number in range(11))
TEST_SETS = SETS[6:]
TEST_FRAME_STEP = 30
ORIGINAL, CORRECTED = "original", "corrected"
ANNOTATION_DIRS = {ORIGINAL: "annotations", CORRECTED: "annotations_new"}  # names of the published archives
PERSON, FALSE_ALARM = "person", "person-fa"
LABELS = (PERSON, "people", "person?", "ignore", FALSE_ALARM)
# set06/V000/I00029.txt, or the flat names of the published corrected annotations: set06_V000_I00029.jpg.txt
TEXT_FILE_PATTERN = re.compile(r"(?:^|/)(set\d\d)[_/](V\d{3})[_/]I(\d{5})(?:\.jpg)?\.txt$", re.ASCII)
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


@dataclass(frozen=True, eq=False)
class CaltechFrame:
    """An annotated video frame.

    Attributes:
        video: Set and video, such as "set06/V000".
        index: 0-based frame number.
        annotations: Objects of the frame.
        annotation_path: File of the annotations.
    """

    video: str
    index: int
    annotations: FrameAnnotations
    annotation_path: Path

    @property
    def name(self) -> str:
        """Image id, such as "set06/V000/I00029"."""
        return f"{self.video}/I{self.index:05}"


def read_caltech(
    root: Path,
    sets: str,
    annotations: str = ORIGINAL,
    frame_step: int = 30,
    skip_missing: bool = False,
    on_error: ErrorHandler = raise_error,
) -> list[Sample]:
    """Read frames of Caltech Pedestrian.

    The images are `images/set06/V000/I00029.jpg`, or flat, `images/set06_V000_I00029.jpg`.

    Args:
        root: Directory of the dataset.
        sets: Range of sets such as "set00-set05", or one set.
        annotations: "original" (`annotations/set06/V000.vbb`) or "corrected" (text files anywhere in
            `annotations_new/`).
        frame_step: Use every n-th frame of the training sets. For the test sets it is always 30.
        skip_missing: Omit images that do not exist.
        on_error: Receives the errors of invalid records.

    Returns:
        Samples in the order of the videos. An image id is "set06/V000/I00029", for example.

    Raises:
        UsageError: `sets`, `annotations` or `frame_step` is invalid.
        DataError: Files are missing or invalid.
    """
    if annotations not in ANNOTATION_DIRS:
        raise UsageError(f"annotations: expected {' or '.join(ANNOTATION_DIRS)}, got {annotations!r}.")
    read = read_original_annotations if annotations == ORIGINAL else read_corrected_annotations
    names = parse_sets(sets)
    parts = (
        ([name for name in names if name not in TEST_SETS], frame_step),
        ([name for name in names if name in TEST_SETS], TEST_FRAME_STEP),
    )
    frames = [
        frame
        for part, step in parts
        if part
        for frame in read(root / ANNOTATION_DIRS[annotations], part, step, on_error)
    ]
    image_dir = root / "images"
    samples = [
        Sample(frame.name, _find_image(image_dir, frame), _build_ground_truth(frame, annotations, on_error))
        for frame in frames
    ]
    return filter_missing_images(samples, skip_missing, str(image_dir), on_error)


def parse_sets(text: str) -> list[str]:
    """Return the set names of a range.

    Args:
        text: Range such as "set00-set05", or one set.

    Raises:
        UsageError: The text is not a range of sets.
    """
    ends = text.split("-")
    if len(ends) > 2 or any(end not in SETS for end in ends) or ends[0] > ends[-1]:
        raise UsageError(f"{text!r}: expected a set or a range of sets, {SETS[0]} to {SETS[-1]}, such as set00-set05.")
    return list(SETS[SETS.index(ends[0]) : SETS.index(ends[-1]) + 1])


def read_original_annotations(
    folder: Path, sets: list[str], frame_step: int, on_error: ErrorHandler = raise_error
) -> Iterator[CaltechFrame]:
    """Read frames from `.vbb` files.

    Args:
        folder: Directory with `set06/V000.vbb` and so on.
        sets: Names of the sets.
        frame_step: Yield the frames with the indices frame_step - 1, 2 * frame_step - 1 and so on.
        on_error: Receives the errors of invalid records.

    Yields:
        Frames in the order of sets and videos.

    Raises:
        UsageError: `frame_step` is below 1.
        DataError: A set has no files, or a file is invalid.
    """
    _check_frame_step(frame_step)
    videos = [(name, path) for name in sets for path in _list_videos(folder / name, "V*.vbb")]
    for name, path in show_progress(videos, "read .vbb", "video"):
        for index, annotations in enumerate(read_vbb(path, on_error)):
            if index % frame_step == frame_step - 1:
                yield CaltechFrame(f"{name}/{path.stem}", index, annotations, path)


def read_corrected_annotations(
    folder: Path, sets: list[str], frame_step: int, on_error: ErrorHandler = raise_error
) -> Iterator[CaltechFrame]:
    """Read frames from text files, one per frame.

    Args:
        folder: Directory that contains the files at any depth.
        sets: Names of the sets.
        frame_step: Yield the frames with the indices frame_step - 1, 2 * frame_step - 1 and so on.
        on_error: Receives the errors of invalid records. A missing frame is an error.

    Yields:
        Frames in the order of sets and videos.

    Raises:
        UsageError: `frame_step` is below 1.
        DataError: A set has no files, a frame has two files, or a file is invalid.
    """
    _check_frame_step(frame_step)
    files: dict[tuple[str, int], Path] = {}
    for path in sorted(folder.rglob("*.txt")):
        match = TEXT_FILE_PATTERN.search(path.relative_to(folder).as_posix())
        if match and match[1] in sets and int(match[3]) % frame_step == frame_step - 1:
            key = f"{match[1]}/{match[2]}", int(match[3])
            if key in files:
                raise DataError(f"{path}: the same frame as {files[key]}. Keep one of the two directories.")
            files[key] = path
    for name in sets:
        if not any(video.startswith(name) for video, _ in files):
            raise DataError(
                f"{folder}: expected a text file of every {frame_step}th frame of {name}, such as "
                f"{name}_V000_I00029.jpg.txt, got none."
            )
    previous = ("", -1)
    for (video, index), path in show_progress(sorted(files.items()), "read boxes", "frame"):
        expected = frame_step - 1 if video != previous[0] else previous[1] + frame_step
        if index != expected:
            on_error(DataError(f"{path}: the frame before it, {video}/I{expected:05}, has no file. Add it."))
        previous = (video, index)
        yield CaltechFrame(video, index, read_bbgt(path, on_error), path)


def _check_frame_step(frame_step: int) -> None:
    check_range("frame_step", frame_step, 1)


def _list_videos(folder: Path, pattern: str) -> list[Path]:
    videos = sorted(folder.glob(pattern))
    if not videos:
        raise DataError(f"{folder}: expected files {pattern}, got none.")
    return videos


def _find_image(image_dir: Path, frame: CaltechFrame) -> Path:
    names = [f"{name}{suffix}" for name in (frame.name, frame.name.replace("/", "_")) for suffix in (".jpg", ".png")]
    return next((image_dir / name for name in names if (image_dir / name).is_file()), image_dir / names[0])


def _build_ground_truth(frame: CaltechFrame, annotations: str, on_error: ErrorHandler) -> GroundTruth:
    objects = frame.annotations
    rows = []
    for row, label in enumerate(objects.labels):
        if label not in LABELS:
            location = (
                f", line {objects.line_numbers[row]}" if objects.line_numbers else f": object {objects.object_ids[row]}"
            )
            where = f"{frame.annotation_path}{location}: {frame.name}: label"
            on_error(DataError(f"{where}: expected one of {', '.join(LABELS)}, got {label!r}."))
        elif label != FALSE_ALARM:
            rows.append(row)
    labels = tuple(objects.labels[row] for row in rows)
    # A visible box of zeros is not annotated. In the corrected annotations it counts only with the occlusion flag.
    has_visible = objects.visible_xywh.any(axis=1) & (objects.occluded | (annotations == ORIGINAL))
    visible_xywh = np.where(has_visible[:, None], objects.visible_xywh, objects.boxes_xywh)
    # The files count pixels from 1, as MATLAB does.
    boxes, visible = (xyxy_from_xywh(box_xywh[rows]) - 1 for box_xywh in (objects.boxes_xywh, visible_xywh))
    is_other = np.array([label != PERSON for label in labels], bool)
    ignore = objects.ignore[rows] | is_other | (box_area(boxes) <= 0)
    return GroundTruth(boxes.astype(np.float32), ignore, visible.astype(np.float32), labels)


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
