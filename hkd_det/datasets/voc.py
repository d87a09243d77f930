"""Pascal VOC (Everingham et al., IJCV 2010): one XML file per image, boxes of inclusive 1-based pixels.

`difficult` objects are ignore regions, as in the VOC evaluation. `occluded` and `truncated` do not state the visible
part, so the visible box equals the full box.
"""

import xml.etree.ElementTree as ET
from pathlib import Path
from xml.parsers import expat

import numpy as np

from hkd_det.datasets.base import (
    MAX_COORDINATE_PX,
    PERSON_NAMES,
    ErrorHandler,
    filter_missing_images,
    raise_error,
    show_progress,
    xyxy_from_inclusive,
)
from hkd_det.errors import DataError
from hkd_det.files import read_content
from hkd_det.structures import GroundTruth, Sample

IMAGE_DIR = "JPEGImages"
VOC_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def read_voc(
    root: Path, split: str, category: str = "", skip_missing: bool = False, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Read a split of a Pascal VOC dataset.

    Args:
        root: Directory with `Annotations/`, `JPEGImages/` and `ImageSets/`.
        split: The images of `ImageSets/Main/SPLIT.txt`. Without `ImageSets/`, all files of `Annotations/`.
        category: Name of the person class (default: any of `PERSON_NAMES`).
        skip_missing: Omit images that do not exist.
        on_error: Receives the errors of invalid records.

    Returns:
        One sample per image. The image id is the file name without suffix.

    Raises:
        DataError: Files are missing or invalid, or all objects are of other classes. The message names file
            and line.
    """
    class_names = (category.lower(),) if category else PERSON_NAMES
    samples, found_classes = [], set()
    for name in show_progress(_list_names(root, split), "read .xml", "file"):
        try:
            sample, classes = _read_sample(root, name, class_names, on_error)
        except DataError as error:
            on_error(error)
            continue
        samples.append(sample)
        found_classes |= classes
    if found_classes and found_classes.isdisjoint(class_names):
        raise DataError(
            f"{root / 'Annotations'}: expected the class {' or '.join(class_names)}, got "
            f"{', '.join(sorted(found_classes))[:200]}. Set `category: NAME`."
        )
    return filter_missing_images(samples, skip_missing, str(root / IMAGE_DIR), on_error)


def _list_names(root: Path, split: str) -> list[str]:
    list_path = root / "ImageSets" / "Main" / f"{split}.txt"
    if list_path.is_file():
        text = list_path.read_text(encoding="utf-8-sig", errors="replace")
        if "\0" in text:
            raise DataError(f"{list_path}: not a text file. Expected a list of images.")
        return list(dict.fromkeys(line.split()[0] for line in text.splitlines() if line.strip()))
    if (root / "ImageSets").is_dir() or not (root / "Annotations").is_dir():
        raise DataError(
            f"{list_path}: no such image list. Expected ImageSets/, Annotations/ and {IMAGE_DIR}/ in {root}."
        )
    return sorted(path.stem for path in (root / "Annotations").glob("*.xml"))


def _read_sample(
    root: Path, name: str, class_names: tuple[str, ...], on_error: ErrorHandler
) -> tuple[Sample, set[str]]:
    """Return the sample of an image and the classes of all its objects."""
    path = root / "Annotations" / f"{name}.xml"
    image_paths = [root / IMAGE_DIR / f"{name}{suffix}" for suffix in VOC_IMAGE_SUFFIXES]
    image_path = next((candidate for candidate in image_paths if candidate.is_file()), image_paths[0])
    text = _read_text(path)
    document = _parse_document(text, path)
    size_hw = _parse_size_hw(document)
    box_list, ignore, classes = [], [], set()
    for index, element in enumerate(document.iter("object")):
        label = (element.findtext("name") or "").strip().lower()
        classes.add(label)
        if label in class_names:
            try:
                box_list.append(_parse_box(element, size_hw, f"{path}: object {index + 1}"))
                ignore.append((element.findtext("difficult") or "0").strip() == "1")
            except DataError as error:
                on_error(DataError(str(error).replace(str(path), f"{path}, line {_find_line(text, index)}", 1)))
    boxes = np.array(box_list, np.float32).reshape(-1, 4)
    ground_truth = GroundTruth(boxes, np.array(ignore, bool), boxes, ("person",) * len(boxes))
    return Sample(name, image_path, ground_truth, size_hw), classes


def _read_text(path: Path) -> str:
    """Decode an XML file as UTF-8 or Latin-1. Other encodings could hide a document type declaration."""
    raw = read_content(path, "an annotation file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _parse_document(text: str, path: Path) -> ET.Element:
    # Only a document type can declare entities, which can expand to gigabytes. VOC files do not have one.
    if "<!DOCTYPE" in text:
        raise DataError(f"{path}: contains a document type declaration. Remove it.")
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise DataError(f"{path}: not XML: {error}. Correct the file.") from None


def _find_line(text: str, index: int) -> int:
    """Return the line of an object. ElementTree does not store line numbers, so parse the text again."""
    lines: list[int] = []
    parser = expat.ParserCreate(namespace_separator="}")  # as in ElementTree

    def record_line(tag: str, _: object) -> None:
        if tag == "object":
            lines.append(parser.CurrentLineNumber)

    parser.StartElementHandler = record_line
    parser.Parse(text, True)
    return lines[index]


def _parse_size_hw(document: ET.Element) -> tuple[int, int] | None:
    """Return height and width, or None for the size 0 that some tools write."""
    height, width = (_parse_float(document.findtext(f"size/{side}")) for side in ("height", "width"))
    return (int(height), int(width)) if 1 <= height < MAX_COORDINATE_PX and 1 <= width < MAX_COORDINATE_PX else None


def _parse_box(element: ET.Element, size_hw: tuple[int, int] | None, where: str) -> list[float]:
    left, top, right, bottom = (
        _parse_float(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")
    )
    if not all(abs(value) <= MAX_COORDINATE_PX for value in (left, top, right, bottom)):
        raise DataError(f"{where}: bndbox: expected xmin, ymin, xmax and ymax in pixels.")
    return xyxy_from_inclusive((left, top, right, bottom), 1, size_hw, where)


def _parse_float(text: str | None) -> float:
    """Return a number, or NaN for other text."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")
