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
from hkd_det.datasets.bbgt import read_bbgt
from hkd_det.datasets.faults import OnFault, stop
from hkd_det.datasets.frame_boxes import FrameBoxes
from hkd_det.datasets.present import present
from hkd_det.datasets.sample import Sample, Truth
from hkd_det.datasets.vbb import read_vbb
from hkd_det.errors import DataError, UsageError

SETS = tuple(f"set{number:02}" for number in range(11))
TEST_SETS = SETS[6:]
TEST_EVERY = 30
OLD, NEW = "old", "new"
FOLDERS = {OLD: "annotations", NEW: "annotations_new"}
PERSON, FALSE_ALARM = "person", "person-fa"
LABELS = (PERSON, "people", "person?", "ignore", FALSE_ALARM)
# set06/V000/I00029.txt, or flat as the new annotations are handed out: set06_V000_I00029.jpg.txt
TEXT_FILE = re.compile(r"(?:^|/)(set\d\d)[_/](V\d{3})[_/]I(\d{5})(?:\.jpg)?\.txt$", re.ASCII)


@dataclass(frozen=True, eq=False)
class Frame:
    """An annotated frame. video: "set06/V000"; index: 0-based; file: what says so."""

    video: str
    index: int
    boxes: FrameBoxes
    file: Path

    @property
    def name(self) -> str:
        """ "set06/V000/I00029"."""
        return f"{self.video}/I{self.index:05}"


def read_caltech(
    root: Path,
    sets: str,
    annotations: str = OLD,
    every: int = 30,
    present_only: bool = False,
    on_fault: OnFault = stop,
) -> list[Sample]:
    """The pictures of some sets ("set00-set05"), in their films' order, with ids such as "set06/V000/I00029".

    annotations: OLD (`annotations/set06/V000.vbb`) or NEW (text files anywhere in `annotations_new/`). every: of the
    training sets, which frames; of the test sets it is always every 30th, as everyone measures. present_only: leave
    out pictures that are not on disk. Pictures lie in `images/set06/V000/I00029.jpg`, or flat, as
    `images/set06_V000_I00029.jpg`.
    Raises UsageError for sets, annotations or every that cannot be, DataError for files that are missing or wrong.
    """
    if annotations not in FOLDERS:
        raise UsageError(f"annotations: {annotations!r} is none of {', '.join(FOLDERS)}")
    read = old_frames if annotations == OLD else new_frames
    chosen = parse_sets(sets)
    parts = (
        ([name for name in chosen if name not in TEST_SETS], every),
        ([name for name in chosen if name in TEST_SETS], TEST_EVERY),
    )
    frames = [
        frame for part, step in parts if part for frame in read(root / FOLDERS[annotations], part, step, on_fault)
    ]
    pictures = root / "images"
    samples = [Sample(frame.name, _picture(pictures, frame), _truth(frame, annotations, on_fault)) for frame in frames]
    return present(samples, present_only, str(pictures), on_fault)


def parse_sets(text: str) -> list[str]:
    """ "set00-set05", or one set's name, as names."""
    ends = text.split("-")
    if len(ends) > 2 or any(end not in SETS for end in ends) or ends[0] > ends[-1]:
        raise UsageError(f"{text!r}: no sets of Caltech; say set06, or set00-set05 ({SETS[0]} to {SETS[-1]})")
    return list(SETS[SETS.index(ends[0]) : SETS.index(ends[-1]) + 1])


def old_frames(folder: Path, sets: list[str], every: int, on_fault: OnFault = stop) -> Iterator[Frame]:
    """Every so many frames of the films that have a `set06/V000.vbb` in the folder: every-1, 2*every-1, ..."""
    _check_every(every)
    films = [(name, path) for name in sets for path in _films(folder / name, "V*.vbb")]
    for name, path in tqdm(films, desc="read .vbb", unit="film", leave=False, delay=2):
        for index, boxes in enumerate(read_vbb(path, on_fault)):
            if index % every == every - 1:
                yield Frame(f"{name}/{path.stem}", index, boxes, path)


def new_frames(folder: Path, sets: list[str], every: int, on_fault: OnFault = stop) -> Iterator[Frame]:
    """Every so many frames of the text files in the folder; a gap in them is a fault."""
    _check_every(every)
    files: dict[tuple[str, int], Path] = {}
    for path in sorted(folder.rglob("*.txt")):
        found = TEXT_FILE.search(path.relative_to(folder).as_posix())
        if found and found[1] in sets and int(found[3]) % every == every - 1:
            key = f"{found[1]}/{found[2]}", int(found[3])
            if key in files:
                raise DataError(f"{path}: the same frame as {files[key]}; keep one of the two folders")
            files[key] = path
    for name in sets:
        if not any(video.startswith(name) for video, _ in files):
            raise DataError(
                f"{folder}: no text files of every {every}th frame of {name}, as {name}_V000_I00029.jpg.txt"
            )
    before = ("", -1)
    for (video, index), path in tqdm(sorted(files.items()), desc="read boxes", unit="frame", leave=False, delay=2):
        wanted = every - 1 if video != before[0] else before[1] + every
        if index != wanted:
            on_fault(DataError(f"{path}: the frame before it, {video}/I{wanted:05}, has no file"))
        before = (video, index)
        yield Frame(video, index, read_bbgt(path, on_fault), path)


def _check_every(every: int) -> None:
    if every < 1:
        raise UsageError(f"every: {every} must be 1 or more")


def _films(folder: Path, pattern: str) -> list[Path]:
    films = sorted(folder.glob(pattern))
    if not films:
        raise DataError(f"{folder}: holds no {pattern}")
    return films


def _picture(pictures: Path, frame: Frame) -> Path:
    names = [f"{name}{suffix}" for name in (frame.name, frame.name.replace("/", "_")) for suffix in (".jpg", ".png")]
    return next((pictures / name for name in names if (pictures / name).is_file()), pictures / names[0])


def _truth(frame: Frame, annotations: str, on_fault: OnFault) -> Truth:
    boxes, keep = frame.boxes, []
    for row, label in enumerate(boxes.labels):
        if label not in LABELS:
            place = f", line {boxes.lines[row]}" if boxes.lines else f": object {boxes.objects[row]}"
            on_fault(DataError(f"{frame.file}{place}: {frame.name}: label {label!r} is none of {', '.join(LABELS)}"))
        elif label != FALSE_ALARM:
            keep.append(row)
    labels = tuple(boxes.labels[row] for row in keep)
    # A visible box that is all zero was not marked; the new annotations go by their flag besides.
    marked = boxes.visible_xywh.any(axis=1) & (boxes.occluded | (annotations == OLD))
    seen = np.where(marked[:, None], boxes.visible_xywh, boxes.boxes_xywh)
    # MATLAB's first pixel is 1.
    whole, visible = (box_math.xyxy_from_xywh(one[keep]) - 1 for one in (boxes.boxes_xywh, seen))
    ignore = boxes.ignore[keep] | np.array([label != PERSON for label in labels], bool) | (box_math.area(whole) <= 0)
    return Truth(whole.astype(np.float32), ignore, visible.astype(np.float32), labels)
