"""PASCAL Annotation Version 1.00, a text file a picture: INRIA Person and Penn-Fudan.

    Image size (X x Y x C) : 594 x 720 x 3
    Objects with ground truth : 1 { "PASperson" }
    # Top left pixel co-ordinates : (0, 0)
    Bounding box for object 1 "PASperson" (Xmin, Ymin) - (Xmax, Ymax) : (194, 127) - (413, 647)

Boxes go from first to last pixel. Each file says whether it counts from 0, as INRIA's do, or from 1, as Penn-Fudan's.
People are the objects whose label begins with PASperson; nothing is said of who is hidden.
"""

import re
from pathlib import Path

import numpy as np

from hkd_det.datasets.base import ErrorHandler, filter_missing_images, raise_error, xyxy_from_inclusive
from hkd_det.errors import DataError, UsageError
from hkd_det.image import IMAGE_SUFFIXES
from hkd_det.structures import GroundTruth, Sample

FORMAT_LINE = "PASCAL Annotation Version 1.00"


PERSON_LABEL = "PASperson"  # PASpersonWalking and PASpersonStanding too


SIZE_PATTERN = re.compile(r"Image size[^:]*:\s*(\d{1,7}) x (\d{1,7})", re.ASCII)


OBJECTS_PATTERN = re.compile(r"Objects with ground truth[^:]*:[^{]*\{([^}]*)\}")


ORIGIN_PATTERN = re.compile(r"#\s*Top left pixel co-ordinates\s*:\s*\(([01])\s*,\s*\1\)")


BOX_PATTERN = re.compile(
    r'Bounding box for object \d+ "([^"]*)"[^:]*:\s*\(\s*(-?\d{1,7})\s*,\s*(-?\d{1,7})\s*\)\s*-\s*'
    r"\(\s*(-?\d{1,7})\s*,\s*(-?\d{1,7})\s*\)",
    re.ASCII,
)


VAL_STEP = 5  # Penn-Fudan has no split of its own: every fifth picture is val, the others train


def read_inria(
    root: Path, split: str, skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """INRIA Person (`Train` or `Test`): the pictures of `pos/`, and those of `neg/`, in which nobody is.

    A picture is called as its annotation file; its id is its path below `root`. Of those in `neg/` no size is known.
    Raises DataError, naming file and line, for what is missing or wrong.
    """
    folder = root / split / "pos"
    there = {path.stem: path for path in _list_images(folder)}
    samples = []
    for path in _list_annotations(root / split / "annotations"):
        picture = there.get(path.stem, folder / f"{path.stem}.png")
        try:
            samples.append(_read_sample(path, picture.relative_to(root).as_posix(), picture, on_error))
        except DataError as fault:
            on_error(fault)
    samples += [Sample(path.relative_to(root).as_posix(), path) for path in _list_images(root / split / "neg")]
    return filter_missing_images(samples, skip_missing, str(root / split), on_error)


def read_pennfudan(
    root: Path, split: str, skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Penn-Fudan: `Annotation/*.txt` and `PNGImages/*.png`. split: train or val, see VAL_EVERY.

    A picture's id is its name without `.png`.
    Raises UsageError for another split, DataError, naming file and line, for what is missing or wrong.
    """
    if split not in ("train", "val"):
        raise UsageError(f"{root}: Penn-Fudan has the splits train and val, not {split!r}")
    samples = []
    for number, path in enumerate(_list_annotations(root / "Annotation"), 1):
        if (number % VAL_STEP == 0) == (split == "val"):
            try:
                samples.append(_read_sample(path, path.stem, root / "PNGImages" / f"{path.stem}.png", on_error))
            except DataError as fault:
                on_error(fault)
    return filter_missing_images(samples, skip_missing, str(root / "PNGImages"), on_error)


def _list_annotations(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*.txt") if path.is_file())
    if not files:
        raise DataError(f"{folder}: no such folder, or no .txt annotations in it")
    return files


def _list_images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_sample(path: Path, image_id: str, image_path: Path, on_error: ErrorHandler) -> Sample:
    text = path.read_text(encoding="latin-1")  # INRIA's own files name "Rhône-Alpes" so
    if FORMAT_LINE not in text:
        raise DataError(f"{path}: not a {FORMAT_LINE}")
    lines = text.split("\n")
    origin = _find_match(ORIGIN_PATTERN, lines)
    if origin is None:
        raise DataError(f"{path}: has no line `# Top left pixel co-ordinates : (0, 0)`, or (1, 1)")
    size = _find_match(SIZE_PATTERN, lines)
    size_hw = (int(size[2]), int(size[1])) if size and int(size[1]) and int(size[2]) else None
    whole = np.array(_parse_boxes(path, lines, int(origin[1]), size_hw, on_error), np.float32).reshape(-1, 4)
    truth = GroundTruth(whole, np.zeros(len(whole), bool), whole, ("person",) * len(whole))
    return Sample(image_id, image_path, truth, size_hw)


def _find_match(pattern: re.Pattern[str], lines: list[str]) -> re.Match[str] | None:
    """The first line that says it."""
    return next((found for line in lines if (found := pattern.match(line))), None)


def _parse_boxes(
    path: Path, lines: list[str], first_pixel: int, size_hw: tuple[int, int] | None, on_error: ErrorHandler
) -> list[list[float]]:
    """N boxes xyxy."""
    marked = [(number, line) for number, line in enumerate(lines, 1) if line.startswith("Bounding box")]
    listed = _find_match(OBJECTS_PATTERN, lines)
    # Not by the number before the braces: in copies of Penn-Fudan it is wrong.
    count = listed[1].count('"') // 2 if listed else 0
    if len(marked) < count:
        on_error(DataError(f"{path}: lists {count} objects and has {len(marked)} boxes; is its end missing?"))
    boxes = []
    for number, line in marked:
        where = f"{path}, line {number}"
        try:
            label, pixels = _parse_box(line, where)
            if label.startswith(PERSON_LABEL):
                boxes.append(xyxy_from_inclusive(pixels, first_pixel, size_hw, where))
        except DataError as fault:
            on_error(fault)
    return boxes


def _parse_box(line: str, where: str) -> tuple[str, tuple[float, float, float, float]]:
    """Label, and the first and last pixels."""
    found = BOX_PATTERN.match(line)
    if not found:
        raise DataError(f"{where}: {line[:60]!r} has no `: (Xmin, Ymin) - (Xmax, Ymax)` in pixels")
    left, top, right, bottom = (float(value) for value in found.groups()[1:])
    return found[1], (left, top, right, bottom)
