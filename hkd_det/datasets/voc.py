"""Pascal VOC: an XML file a picture, boxes from first to last pixel, counted from 1.

`difficult` is an ignore region, as the VOC evaluation has it; `occluded` and `truncated` say nothing of how much is
seen, so the visible box is the whole one.
"""

import xml.etree.ElementTree as ET
from pathlib import Path
from xml.parsers import expat

import numpy as np
from tqdm import tqdm

from hkd_det.datasets.base import PERSON_NAMES, ErrorHandler, raise_error, xyxy_from_inclusive
from hkd_det.errors import DataError
from hkd_det.structures import GroundTruth, Sample

IMAGE_DIR = "JPEGImages"
VOC_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_COORDINATE_PX = 2.0**24  # whole pixels beyond it are not exact in float32


def read_voc(root: Path, split: str, category: str = "", on_error: ErrorHandler = raise_error) -> list[Sample]:
    """The pictures that `ImageSets/Main/SPLIT.txt` lists, or, if there is no such folder, all of `Annotations/`.

    category: the person class's name; by default any of person, pedestrian, people, human. A picture's id is its name
    without suffix.
    Raises DataError, naming file and line, for what is missing or wrong, and if all objects are of other classes.
    """
    wanted = (category.lower(),) if category else PERSON_NAMES
    samples, classes = [], set()
    for name in tqdm(_list_names(root, split), desc="read .xml", unit="file", leave=False, delay=2):
        try:
            sample, found = _read_sample(root, name, wanted, on_error)
        except DataError as fault:
            on_error(fault)
            continue
        samples.append(sample)
        classes |= found
    if classes and classes.isdisjoint(wanted):
        raise DataError(
            f"{root / 'Annotations'}: no {' or '.join(wanted)} among {', '.join(sorted(classes))[:200]}; "
            "say `category: NAME`"
        )
    return samples


def _list_names(root: Path, split: str) -> list[str]:
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    if listed.is_file():
        text = listed.read_text(encoding="utf-8-sig", errors="replace")
        if "\0" in text:
            raise DataError(f"{listed}: not a text file; expected a list of pictures")
        return list(dict.fromkeys(line.split()[0] for line in text.splitlines() if line.strip()))
    if (root / "ImageSets").is_dir() or not (root / "Annotations").is_dir():
        raise DataError(f"{listed}: no such list of pictures; expected it beside Annotations/ and {IMAGE_DIR}/")
    return sorted(path.stem for path in (root / "Annotations").glob("*.xml"))


def _read_sample(
    root: Path, name: str, class_names: tuple[str, ...], on_error: ErrorHandler
) -> tuple[Sample, set[str]]:
    """The picture's people, and all classes of its objects."""
    path = root / "Annotations" / f"{name}.xml"
    pictures = [root / IMAGE_DIR / f"{name}{suffix}" for suffix in VOC_IMAGE_SUFFIXES]
    picture = next((one for one in pictures if one.is_file()), pictures[0])
    text = _read_text(path)
    document = _parse_document(text, path)
    size_hw = _parse_size_hw(document)
    boxes, ignore, classes = [], [], set()
    for number, found in enumerate(document.iter("object")):
        label = (found.findtext("name") or "").strip().lower()
        classes.add(label)
        if label in class_names:
            try:
                boxes.append(_parse_box(found, size_hw, f"{path}: object {number + 1}"))
                ignore.append((found.findtext("difficult") or "0").strip() == "1")
            except DataError as fault:
                on_error(DataError(str(fault).replace(str(path), f"{path}, line {_find_line(text, number)}", 1)))
    whole = np.array(boxes, np.float32).reshape(-1, 4)
    truth = GroundTruth(whole, np.array(ignore, bool), whole, ("person",) * len(whole))
    return Sample(name, picture, truth, size_hw), classes


def _read_text(path: Path) -> str:
    """Decoded here, as UTF-8 or else Latin-1, so that no encoding hides a document type."""
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DataError(f"{path}: no such annotation file") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _parse_document(text: str, path: Path) -> ET.Element:
    if "<!DOCTYPE" in text:  # no VOC file has one; only it can declare entities, which can blow up to gigabytes
        raise DataError(f"{path}: declares a document type; an annotation needs none")
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise DataError(f"{path}: not XML ({error})") from None


def _find_line(text: str, number: int) -> int:
    """The line where an object begins: ElementTree does not keep it, so it is looked up where one is wrong."""
    lines: list[int] = []
    parser = expat.ParserCreate(namespace_separator="}")  # as ElementTree has it

    def note(tag: str, _: object) -> None:
        if tag == "object":
            lines.append(parser.CurrentLineNumber)

    parser.StartElementHandler = note
    parser.Parse(text, True)
    return lines[number]


def _parse_size_hw(document: ET.Element) -> tuple[int, int] | None:
    """None where the file says 0, as some tools write it."""
    height, width = (_parse_float(document.findtext(f"size/{side}")) for side in ("height", "width"))
    return (int(height), int(width)) if 1 <= height < MAX_COORDINATE_PX and 1 <= width < MAX_COORDINATE_PX else None


def _parse_box(element: ET.Element, size_hw: tuple[int, int] | None, where: str) -> list[float]:
    left, top, right, bottom = (
        _parse_float(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")
    )
    if not all(abs(value) <= MAX_COORDINATE_PX for value in (left, top, right, bottom)):
        raise DataError(f"{where}: its bndbox has no xmin, ymin, xmax, ymax in pixels")
    return xyxy_from_inclusive((left, top, right, bottom), 1, size_hw, where)


def _parse_float(text: str | None) -> float:
    """NaN for what is no number."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")
