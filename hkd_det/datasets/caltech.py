"""Caltech Pedestrian (Dollár et al., TPAMI 2012): video frames with the original or the corrected annotations.

set00 to set05 are for training, set06 to set10 for testing. The protocol uses every 30th frame of the test sets:
I00029, I00059 and so on. `python -m hkd_det.datasets.caltech_extract` extracts the frames from the videos. `person`
is a person to detect; `people`, `person?` and `ignore` are ignore regions; `person-fa`, a false alarm of the
annotators, is omitted. The corrected annotations are those of Zhang et al. (CVPR 2016).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hkd_det.config import check_range
from hkd_det.datasets.base import ErrorHandler, filter_missing_images, raise_error, show_progress
from hkd_det.datasets.caltech_annotations import FrameAnnotations, read_bbgt, read_vbb
from hkd_det.errors import DataError, UsageError
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
