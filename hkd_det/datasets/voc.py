"""Pascal VOC: an XML file a picture, boxes from first to last pixel, counted from 1.

`difficult` is an ignore region, as the VOC evaluation has it; `occluded` and `truncated` say nothing of how much is
seen, so the visible box is the whole one.
"""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hkd_det.datasets.faults import OnFault, stop
from hkd_det.datasets.person_class import PERSON_NAMES
from hkd_det.datasets.sample import Sample, Truth
from hkd_det.errors import DataError

PICTURES = "JPEGImages"
SUFFIXES = (".jpg", ".jpeg", ".png")
LARGEST_PX = 2.0**24  # whole pixels beyond it are not exact in float32


def read_voc(root: Path, split: str, category: str = "", on_fault: OnFault = stop) -> list[Sample]:
    """The pictures that `ImageSets/Main/SPLIT.txt` lists, or, if there is no such folder, all of `Annotations/`.

    category: the person class's name; by default any of person, pedestrian, people, human.
    Raises DataError, naming the file, for what is missing or wrong.
    """
    wanted = (category.lower(),) if category else PERSON_NAMES
    return [
        _sample(root, name, wanted, on_fault)
        for name in tqdm(_names(root, split), desc="read .xml", unit="file", leave=False, delay=2)
    ]


def _names(root: Path, split: str) -> list[str]:
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    if listed.is_file():
        lines = listed.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
    if (root / "ImageSets").is_dir() or not (root / "Annotations").is_dir():
        raise DataError(f"{listed}: no such list of pictures; expected it beside Annotations/ and {PICTURES}/")
    return sorted(path.stem for path in (root / "Annotations").glob("*.xml"))


def _sample(root: Path, name: str, wanted: tuple[str, ...], on_fault: OnFault) -> Sample:
    path = root / "Annotations" / f"{name}.xml"
    pictures = [root / PICTURES / f"{name}{suffix}" for suffix in SUFFIXES]
    picture = next((one for one in pictures if one.is_file()), pictures[0])
    boxes, ignore, size_hw = [], [], None
    try:
        document = _document(path)
        size_hw = _size(document)
        for number, found in enumerate(document.iter("object"), 1):
            if (found.findtext("name") or "").strip().lower() in wanted:
                try:
                    boxes.append(_box(found, f"{path}: object {number}"))
                    ignore.append((found.findtext("difficult") or "0").strip() == "1")
                except DataError as fault:
                    on_fault(fault)
    except DataError as fault:
        on_fault(fault)
    whole = np.array(boxes, np.float32).reshape(-1, 4)
    return Sample(name, picture, Truth(whole, np.array(ignore, bool), whole, ("person",) * len(whole)), size_hw)


def _document(path: Path) -> ET.Element:
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such annotation file") from None
    if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw:  # no VOC file has one, and entities can blow up to gigabytes
        raise DataError(f"{path}: declares a document type; an annotation needs none")
    try:
        return ET.fromstring(raw)
    except (ET.ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that does not exist
        raise DataError(f"{path}: not XML ({error})") from None


def _size(document: ET.Element) -> tuple[int, int] | None:
    height, width = (_number(document.findtext(f"size/{side}")) for side in ("height", "width"))
    return (int(height), int(width)) if 0 < height < LARGEST_PX and 0 < width < LARGEST_PX else None


def _box(found: ET.Element, where: str) -> list[float]:
    """xyxy from 0, its right and bottom edges behind the last pixel."""
    left, top, right, bottom = (_number(found.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    if not all(abs(value) <= LARGEST_PX for value in (left, top, right, bottom)):
        raise DataError(f"{where}: its bndbox has no xmin, ymin, xmax, ymax in pixels")
    if right < left or bottom < top:
        raise DataError(f"{where}: the box {[left, top, right, bottom]} has a negative width or height")
    return [left - 1, top - 1, right, bottom]


def _number(text: str | None) -> float:
    """NaN for what is no number."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")
