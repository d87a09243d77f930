"""PASCAL Annotation Version 1.00, a text file a picture: INRIA Person and Penn-Fudan.

    Image filename : "Train/pos/crop_000010.png"
    Image size (X x Y x C) : 594 x 720 x 3
    Bounding box for object 1 "PASperson" (Xmin, Ymin) - (Xmax, Ymax) : (194, 127) - (413, 647)

Boxes go from first to last pixel, counted from 1. Nothing is said of who is hidden.
"""

import re
from pathlib import Path

import numpy as np

from hkd_det.datasets.faults import OnFault, stop
from hkd_det.datasets.present import present
from hkd_det.datasets.sample import Sample, Truth
from hkd_det.errors import DataError

BOX = re.compile(
    r'Bounding box for object (\d+) "([^"]*)".*:\s*\(\s*(-?\d{1,7})\s*,\s*(-?\d{1,7})\s*\)\s*-\s*'
    r"\(\s*(-?\d{1,7})\s*,\s*(-?\d{1,7})\s*\)",
    re.ASCII,
)
SIZE = re.compile(r"Image size[^:]*:\s*(\d{1,7}) x (\d{1,7})", re.ASCII)
FILE_NAME = re.compile(r'Image filename\s*:\s*"([^"]+)"')
VAL_EVERY = 5  # Penn-Fudan has no split of its own: every fifth picture is val, the others train


def read_inria(root: Path, split: str, present_only: bool = False, on_fault: OnFault = stop) -> list[Sample]:
    """INRIA Person (`Train` or `Test`): pictures with people, and those of `neg/`, in which nobody is.

    Raises DataError, naming the file, for what is missing or wrong.
    """
    folder = root / split / "annotations"
    samples = []
    for path in _files(folder):
        name, truth, size_hw = _read(path, on_fault)
        samples.append(
            Sample(f"{split}/pos/{path.stem}", root / (name or f"{split}/pos/{path.stem}.png"), truth, size_hw)
        )
    nobody = sorted((root / split / "neg").glob("*.*"))
    samples += [Sample(f"{split}/neg/{path.stem}", path) for path in nobody]
    return present(samples, present_only, str(root / split), on_fault)


def read_pennfudan(root: Path, split: str, present_only: bool = False, on_fault: OnFault = stop) -> list[Sample]:
    """Penn-Fudan: `Annotation/*.txt` and `PNGImages/*.png`. split: train or val, see VAL_EVERY.

    Raises DataError, naming the file, for what is missing or wrong.
    """
    if split not in ("train", "val"):
        raise DataError(f"{root}: Penn-Fudan is split into train and val here, not {split!r}")
    samples = []
    for number, path in enumerate(_files(root / "Annotation"), 1):
        if (number % VAL_EVERY == 0) == (split == "val"):
            _, truth, size_hw = _read(path, on_fault)
            samples.append(Sample(path.stem, root / "PNGImages" / f"{path.stem}.png", truth, size_hw))
    return present(samples, present_only, str(root / "PNGImages"), on_fault)


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(f"{folder}: no such folder, or no .txt annotations in it")
    return files


def _read(path: Path, on_fault: OnFault) -> tuple[str, Truth, tuple[int, int] | None]:
    """File name as written, people, size."""
    text = path.read_text(encoding="latin-1")  # INRIA's own files hold letters beyond ASCII in it
    boxes = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("Bounding box"):
            try:
                boxes.append(_box(line, f"{path}, line {number}"))
            except DataError as fault:
                on_fault(fault)
    if "PASCAL Annotation" not in text:
        on_fault(DataError(f"{path}: not a PASCAL Annotation Version 1.00"))
    whole = np.array(boxes, np.float32).reshape(-1, 4)
    size, name = SIZE.search(text), FILE_NAME.search(text)
    truth = Truth(whole, np.zeros(len(whole), bool), whole, ("person",) * len(whole))
    written = name[1].replace("\\", "/") if name else ""
    inside = written and not written.startswith("/") and ".." not in written and written.isprintable()
    return written if inside else "", truth, (int(size[2]), int(size[1])) if size else None


def _box(line: str, where: str) -> list[float]:
    """xyxy from 0, its right and bottom edges behind the last pixel."""
    found = BOX.match(line)
    if not found:
        raise DataError(f"{where}: {line[:60]!r} has no `: (Xmin, Ymin) - (Xmax, Ymax)` in pixels")
    left, top, right, bottom = (float(value) for value in found.groups()[2:])
    if right < left or bottom < top:
        raise DataError(f"{where}: the box {[left, top, right, bottom]} has a negative width or height")
    return [left - 1, top - 1, right, bottom]
