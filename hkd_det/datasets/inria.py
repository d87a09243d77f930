"""INRIA Person and Penn-Fudan: PASCAL Annotation Version 1.00, one text file per image.

    Image size (X x Y x C) : 594 x 720 x 3
    Objects with ground truth : 1 { "PASperson" }
    # Top left pixel co-ordinates : (0, 0)
    Bounding box for object 1 "PASperson" (Xmin, Ymin) - (Xmax, Ymax) : (194, 127) - (413, 647)

Boxes are inclusive pixel indices. The file states the index of the first pixel: 0 in INRIA, 1 in Penn-Fudan.
Objects whose label begins with PASperson are persons. The format does not contain visibility.
"""

import re
from pathlib import Path

import numpy as np

from hkd_det.datasets.base import ErrorHandler, filter_missing_images, raise_error, xyxy_from_inclusive
from hkd_det.errors import DataError, UsageError
from hkd_det.image import IMAGE_SUFFIXES
from hkd_det.structures import GroundTruth, Sample

FORMAT_LINE = "PASCAL Annotation Version 1.00"
PERSON_LABEL = "PASperson"  # a prefix: also PASpersonWalking and PASpersonStanding
VAL_STEP = 5  # Penn-Fudan has no official split: every fifth image is val, the others are train

SIZE_PATTERN = re.compile(r"Image size[^:]*:\s*(\d{1,7}) x (\d{1,7})", re.ASCII)
OBJECTS_PATTERN = re.compile(r"Objects with ground truth[^:]*:[^{]*\{([^}]*)\}")
ORIGIN_PATTERN = re.compile(r"#\s*Top left pixel co-ordinates\s*:\s*\(([01])\s*,\s*\1\)")
BOX_PATTERN = re.compile(
    r'Bounding box for object \d+ "([^"]*)"[^:]*:\s*\(\s*(-?\d{1,7})\s*,\s*(-?\d{1,7})\s*\)\s*-\s*'
    r"\(\s*(-?\d{1,7})\s*,\s*(-?\d{1,7})\s*\)",
    re.ASCII,
)


def read_inria(
    root: Path, split: str, skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Read an INRIA Person split: the annotated images in `pos/` and the images without persons in `neg/`.

    Args:
        root: Directory of the dataset.
        split: "Train" or "Test".
        skip_missing: Omit images that do not exist.
        on_error: Receives the errors of invalid records.

    Returns:
        One sample per image. The image id is the path relative to `root`. Images in `neg/` have no image size.

    Raises:
        DataError: Files are missing or invalid. The message names file and line.
    """
    image_dir = root / split / "pos"
    images = {path.stem: path for path in _list_images(image_dir)}
    samples = []
    for path in _list_annotations(root / split / "annotations"):
        image_path = images.get(path.stem, image_dir / f"{path.stem}.png")
        try:
            samples.append(_read_sample(path, image_path.relative_to(root).as_posix(), image_path, on_error))
        except DataError as error:
            on_error(error)
    samples += [Sample(path.relative_to(root).as_posix(), path) for path in _list_images(root / split / "neg")]
    return filter_missing_images(samples, skip_missing, str(root / split), on_error)


def read_pennfudan(
    root: Path, split: str, skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Read a Penn-Fudan split: `Annotation/*.txt` and `PNGImages/*.png`.

    Args:
        root: Directory of the dataset.
        split: "train" or "val". Every fifth image is val.
        skip_missing: Omit images that do not exist.
        on_error: Receives the errors of invalid records.

    Returns:
        One sample per image. The image id is the file name without suffix.

    Raises:
        UsageError: There is no such split.
        DataError: Files are missing or invalid. The message names file and line.
    """
    if split not in ("train", "val"):
        raise UsageError(f"{root}: split: expected train or val, got {split!r}.")
    samples = []
    for number, path in enumerate(_list_annotations(root / "Annotation"), 1):
        if (number % VAL_STEP == 0) == (split == "val"):
            try:
                samples.append(_read_sample(path, path.stem, root / "PNGImages" / f"{path.stem}.png", on_error))
            except DataError as error:
                on_error(error)
    return filter_missing_images(samples, skip_missing, str(root / "PNGImages"), on_error)


def _list_annotations(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*.txt") if path.is_file())
    if not files:
        raise DataError(f"{folder}: expected .txt annotations, got none.")
    return files


def _list_images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _read_sample(path: Path, image_id: str, image_path: Path, on_error: ErrorHandler) -> Sample:
    text = path.read_text(encoding="latin-1")  # INRIA files contain "Rhône-Alpes" in this encoding
    if FORMAT_LINE not in text:
        raise DataError(f"{path}: expected the line {FORMAT_LINE!r}.")
    lines = text.split("\n")
    origin = _find_match(ORIGIN_PATTERN, lines)
    if origin is None:
        raise DataError(f"{path}: expected the line `# Top left pixel co-ordinates : (0, 0)`, or (1, 1).")
    size = _find_match(SIZE_PATTERN, lines)
    size_hw = (int(size[2]), int(size[1])) if size and int(size[1]) and int(size[2]) else None
    boxes = np.array(_parse_boxes(path, lines, int(origin[1]), size_hw, on_error), np.float32).reshape(-1, 4)
    ground_truth = GroundTruth(boxes, np.zeros(len(boxes), bool), boxes, ("person",) * len(boxes))
    return Sample(image_id, image_path, ground_truth, size_hw)


def _find_match(pattern: re.Pattern[str], lines: list[str]) -> re.Match[str] | None:
    return next((match for line in lines if (match := pattern.match(line))), None)


def _parse_boxes(
    path: Path, lines: list[str], first_pixel: int, size_hw: tuple[int, int] | None, on_error: ErrorHandler
) -> list[list[float]]:
    """Return the person boxes as xyxy."""
    box_lines = [(number, line) for number, line in enumerate(lines, 1) if line.startswith("Bounding box")]
    objects = _find_match(OBJECTS_PATTERN, lines)
    # Count the names in braces: the number before them is wrong in some copies of Penn-Fudan.
    num_objects = objects[1].count('"') // 2 if objects else 0
    if len(box_lines) < num_objects:
        on_error(DataError(f"{path}: expected boxes of {num_objects} objects, got {len(box_lines)}. Is it truncated?"))
    boxes = []
    for number, line in box_lines:
        where = f"{path}, line {number}"
        try:
            label, pixels = _parse_box(line, where)
            if label.startswith(PERSON_LABEL):
                boxes.append(xyxy_from_inclusive(pixels, first_pixel, size_hw, where))
        except DataError as error:
            on_error(error)
    return boxes


def _parse_box(line: str, where: str) -> tuple[str, tuple[float, float, float, float]]:
    """Return the label and the indices of the left, top, right and bottom pixel."""
    match = BOX_PATTERN.match(line)
    if not match:
        raise DataError(f"{where}: expected `: (Xmin, Ymin) - (Xmax, Ymax)` in pixels, got {line[:60]!r}.")
    left, top, right, bottom = (float(value) for value in match.groups()[1:])
    return match[1], (left, top, right, bottom)
