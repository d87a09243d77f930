"""Caltech Pedestrian (Dollár et al. 2012): pictures taken out of its films, with the old or the new annotations.

Six sets to train on (set00 to set05), five to test (set06 to set10), of which every 30th frame counts: I00029, I00059,
... `python -m hkd_det.datasets.caltech_extract` makes the pictures. `person` is to be found; `people`, `person?` and
`ignore` are ignore regions; `person-fa`, a false alarm of the annotators', is nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hkd_det import boxes as box_math
from hkd_det.datasets.base import ErrorHandler, filter_missing_images, raise_error
from hkd_det.datasets.caltech_annotations import FrameAnnotations, read_bbgt, read_vbb
from hkd_det.errors import DataError, UsageError
from hkd_det.structures import GroundTruth, Sample

SETS = tuple(f"set{number:02}" for number in range(11))
TEST_SETS = SETS[6:]
TEST_FRAME_STEP = 30
ORIGINAL, CORRECTED = "original", "corrected"
ANNOTATION_DIRS = {ORIGINAL: "annotations", CORRECTED: "annotations_new"}
PERSON, FALSE_ALARM = "person", "person-fa"
LABELS = (PERSON, "people", "person?", "ignore", FALSE_ALARM)
# set06/V000/I00029.txt, or flat as the new annotations are handed out: set06_V000_I00029.jpg.txt
TEXT_FILE_PATTERN = re.compile(r"(?:^|/)(set\d\d)[_/](V\d{3})[_/]I(\d{5})(?:\.jpg)?\.txt$", re.ASCII)


@dataclass(frozen=True, eq=False)
class CaltechFrame:
    """An annotated frame. video: "set06/V000"; index: 0-based; file: what says so."""

    video: str
    index: int
    annotations: FrameAnnotations
    annotation_path: Path

    @property
    def name(self) -> str:
        """ "set06/V000/I00029"."""
        return f"{self.video}/I{self.index:05}"


def read_caltech(
    root: Path,
    sets: str,
    annotations: str = ORIGINAL,
    frame_step: int = 30,
    skip_missing: bool = False,
    on_error: ErrorHandler = raise_error,
) -> list[Sample]:
    """The pictures of some sets ("set00-set05"), in their films' order, with ids such as "set06/V000/I00029".

    annotations: OLD (`annotations/set06/V000.vbb`) or NEW (text files anywhere in `annotations_new/`). every: of the
    training sets, which frames; of the test sets it is always every 30th, as everyone measures. present_only: leave
    out pictures that are not on disk. Pictures lie in `images/set06/V000/I00029.jpg`, or flat, as
    `images/set06_V000_I00029.jpg`.
    Raises UsageError for sets, annotations or every that cannot be, DataError for files that are missing or wrong.
    """
    if annotations not in ANNOTATION_DIRS:
        raise UsageError(f"annotations: {annotations!r} is none of {', '.join(ANNOTATION_DIRS)}")
    read = read_original_annotations if annotations == ORIGINAL else read_corrected_annotations
    chosen = parse_sets(sets)
    parts = (
        ([name for name in chosen if name not in TEST_SETS], frame_step),
        ([name for name in chosen if name in TEST_SETS], TEST_FRAME_STEP),
    )
    frames = [
        frame
        for part, step in parts
        if part
        for frame in read(root / ANNOTATION_DIRS[annotations], part, step, on_error)
    ]
    pictures = root / "images"
    samples = [
        Sample(frame.name, _find_image(pictures, frame), _build_ground_truth(frame, annotations, on_error))
        for frame in frames
    ]
    return filter_missing_images(samples, skip_missing, str(pictures), on_error)


def parse_sets(text: str) -> list[str]:
    """ "set00-set05", or one set's name, as names."""
    ends = text.split("-")
    if len(ends) > 2 or any(end not in SETS for end in ends) or ends[0] > ends[-1]:
        raise UsageError(f"{text!r}: no sets of Caltech; say set06, or set00-set05 ({SETS[0]} to {SETS[-1]})")
    return list(SETS[SETS.index(ends[0]) : SETS.index(ends[-1]) + 1])


def read_original_annotations(
    folder: Path, sets: list[str], frame_step: int, on_error: ErrorHandler = raise_error
) -> Iterator[CaltechFrame]:
    """Every so many frames of the films that have a `set06/V000.vbb` in the folder: every-1, 2*every-1, ..."""
    _check_frame_step(frame_step)
    films = [(name, path) for name in sets for path in _list_videos(folder / name, "V*.vbb")]
    for name, path in tqdm(films, desc="read .vbb", unit="film", leave=False, delay=2):
        for index, boxes in enumerate(read_vbb(path, on_error)):
            if index % frame_step == frame_step - 1:
                yield CaltechFrame(f"{name}/{path.stem}", index, boxes, path)


def read_corrected_annotations(
    folder: Path, sets: list[str], frame_step: int, on_error: ErrorHandler = raise_error
) -> Iterator[CaltechFrame]:
    """Every so many frames of the text files in the folder; a gap in them is a fault."""
    _check_frame_step(frame_step)
    files: dict[tuple[str, int], Path] = {}
    for path in sorted(folder.rglob("*.txt")):
        found = TEXT_FILE_PATTERN.search(path.relative_to(folder).as_posix())
        if found and found[1] in sets and int(found[3]) % frame_step == frame_step - 1:
            key = f"{found[1]}/{found[2]}", int(found[3])
            if key in files:
                raise DataError(f"{path}: the same frame as {files[key]}; keep one of the two folders")
            files[key] = path
    for name in sets:
        if not any(video.startswith(name) for video, _ in files):
            raise DataError(
                f"{folder}: no text files of every {frame_step}th frame of {name}, as {name}_V000_I00029.jpg.txt"
            )
    before = ("", -1)
    for (video, index), path in tqdm(sorted(files.items()), desc="read boxes", unit="frame", leave=False, delay=2):
        wanted = frame_step - 1 if video != before[0] else before[1] + frame_step
        if index != wanted:
            on_error(DataError(f"{path}: the frame before it, {video}/I{wanted:05}, has no file"))
        before = (video, index)
        yield CaltechFrame(video, index, read_bbgt(path, on_error), path)


def _check_frame_step(frame_step: int) -> None:
    if frame_step < 1:
        raise UsageError(f"frame_step: {frame_step} must be 1 or more")


def _list_videos(folder: Path, pattern: str) -> list[Path]:
    films = sorted(folder.glob(pattern))
    if not films:
        raise DataError(f"{folder}: holds no {pattern}")
    return films


def _find_image(image_dir: Path, frame: CaltechFrame) -> Path:
    names = [f"{name}{suffix}" for name in (frame.name, frame.name.replace("/", "_")) for suffix in (".jpg", ".png")]
    return next((image_dir / name for name in names if (image_dir / name).is_file()), image_dir / names[0])


def _build_ground_truth(frame: CaltechFrame, annotations: str, on_error: ErrorHandler) -> GroundTruth:
    boxes, keep = frame.annotations, []
    for row, label in enumerate(boxes.labels):
        if label not in LABELS:
            place = f", line {boxes.line_numbers[row]}" if boxes.line_numbers else f": object {boxes.object_ids[row]}"
            on_error(
                DataError(
                    f"{frame.annotation_path}{place}: {frame.name}: label {label!r} is none of {', '.join(LABELS)}"
                )
            )
        elif label != FALSE_ALARM:
            keep.append(row)
    labels = tuple(boxes.labels[row] for row in keep)
    # A visible box that is all zero was not marked; the new annotations go by their flag besides.
    marked = boxes.visible_xywh.any(axis=1) & (boxes.occluded | (annotations == ORIGINAL))
    seen = np.where(marked[:, None], boxes.visible_xywh, boxes.boxes_xywh)
    # MATLAB's first pixel is 1.
    whole, visible = (box_math.xyxy_from_xywh(one[keep]) - 1 for one in (boxes.boxes_xywh, seen))
    ignore = (
        boxes.ignore[keep] | np.array([label != PERSON for label in labels], bool) | (box_math.box_area(whole) <= 0)
    )
    return GroundTruth(whole.astype(np.float32), ignore, visible.astype(np.float32), labels)
