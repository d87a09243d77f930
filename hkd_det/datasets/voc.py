"""Pascal VOC (Everingham et al., IJCV 2010): one XML file per image, boxes of inclusive 1-based pixels.

`difficult` objects are ignore regions, as in the VOC evaluation. `occluded` and `truncated` do not state the visible
part, so the visible box equals the full box.
"""

import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

import numpy as np

from hkd_det.datasets.base import (
    MAX_COORDINATE_PX,
    DatasetError,
    ErrorHandler,
    ImageBox,
    drop_repeated_boxes,
    filter_missing_images,
    parse_flag,
    raise_error,
    replace_message,
    show_progress,
    xyxy_from_inclusive,
)
from hkd_det.datasets.image_files import find_form_error, is_hidden, list_image_files, merge_repeated_images
from hkd_det.datasets.person_classes import ClassRoles, Names, assign_class_roles, report_unused_classes
from hkd_det.errors import DataError
from hkd_det.files import read_content
from hkd_det.image import IMAGE_SUFFIXES
from hkd_det.structures import GroundTruth, Sample

ANNOTATIONS_DIR, IMAGE_DIRECTORIES = "Annotations", ("JPEGImages", "images", "Images")
ANNOTATION_DIRECTORIES = (ANNOTATIONS_DIR, "annotations")
CLASS_LIST_PATTERN = re.compile(r"(.*\S)\s+(-1|0|1)")  # a line of an image list of one class, such as person_train.txt
NAME_PATTERN = re.compile(r"<name>\s*([^<]*?)\s*</name>")


@dataclass(frozen=True)
class VocLayout:
    """Directories and image names of a split.

    Attributes:
        annotations: Directory of the XML files.
        images: Image files by path relative to the image directory, without suffix.
        image_dir: Directory of the images.
        names: Names of the annotation files without suffix.
    """

    annotations: Path
    images: dict[str, list[Path]]
    image_dir: Path
    names: list[str]


@dataclass(frozen=True)
class VocDocument:
    """Content of an annotation file.

    Attributes:
        file_name: Name of the image file; may be wrong after a renaming.
        size_hw: Height and width of the image, None if unknown.
        objects: Class name, left, top, right and bottom pixel, and the text of `difficult` of each object.
    """

    file_name: str
    size_hw: tuple[int, int] | None
    objects: list[tuple[str, tuple[float, ...], str | None]]


def read_voc(
    root: Path,
    split: str,
    category: Names = "",
    skip_missing: bool = False,
    on_error: ErrorHandler = raise_error,
    ignore_category: Names = (),
) -> list[Sample]:
    """Read a split of a Pascal VOC dataset.

    Args:
        root: Directory with `Annotations/`, `JPEGImages/` and `ImageSets/`.
        split: The images of `ImageSets/Main/SPLIT.txt`. Without `ImageSets/`, all files of `Annotations/`. Without
            both, a directory of images and XML files.
        category: Names of the person classes (default: all standard names of persons, or the only class).
        skip_missing: Omit images that do not exist.
        on_error: Receives the errors of invalid records.
        ignore_category: Names of the classes whose boxes are ignore regions.

    Returns:
        One sample per image. The image id is the file name without suffix.

    Raises:
        DataError: Files are missing or invalid, or all objects are of other classes. The message names file
            and line.
    """
    layout = _find_layout(root, split, on_error)
    documents: dict[str, VocDocument] = {}
    for name in show_progress(layout.names, "read .xml", "file"):
        path = layout.annotations / f"{name}.xml"
        try:
            documents[name] = _parse_document(_read_text(path), path)
        except DataError as error:
            on_error(error)
    counts = Counter(one[0] for document in documents.values() for one in document.objects)
    class_names = _complete_class_names(set(counts), layout, category, ignore_category)
    if not class_names and not category:
        roles: ClassRoles[str] = ClassRoles(frozenset(), frozenset())
    else:
        roles = assign_class_roles(
            {name: name for name in class_names}, category, ignore_category, str(layout.annotations)
        )
    _report_form(documents, layout.annotations, on_error)
    samples = []
    for name, document in documents.items():
        try:
            samples.append(_build_sample(name, document, layout, roles, on_error))
        except DataError as error:
            on_error(error)
    report_unused_classes(_list_unused_boxes(documents, samples, roles), layout.annotations, on_error)
    _report_difficult(samples, layout.annotations, on_error)
    samples = merge_repeated_images(samples, str(layout.annotations), on_error, "annotation files")
    return filter_missing_images(samples, skip_missing, str(layout.image_dir), on_error)


def _list_unused_boxes(
    documents: Mapping[str, VocDocument], samples: Sequence[Sample], roles: ClassRoles[str]
) -> dict[str, list[ImageBox]]:
    """Return image and box of the objects of each class that is not used. The values are not checked."""
    paths = {sample.image_id: sample.path for sample in samples}
    unused: dict[str, list[ImageBox]] = defaultdict(list)
    for name, document in documents.items():
        for label, (left, top, right, bottom), _ in document.objects:
            if not roles.is_used(label):
                box = (left - 1, top - 1, right, bottom)
                unused[label].append((paths.get(name, Path(name)), box))
    return unused


def find_annotations_dir(root: Path) -> Path | None:
    """Return the directory of the XML files: `Annotations/`, or `annotations/` if it contains such files.

    Args:
        root: Directory of the dataset.
    """
    directories = [root / name for name in ANNOTATION_DIRECTORIES if (root / name).is_dir()]
    return next(
        (one for one in directories if one.name == ANNOTATIONS_DIR or next(one.glob("*.xml"), None) is not None), None
    )


def _find_layout(root: Path, split: str, on_error: ErrorHandler) -> VocLayout:
    directory, found = root / split, find_annotations_dir(root)
    if not found and directory.is_dir():  # images and XML files in one directory
        annotations = image_dir = directory
    else:
        annotations = found or root / ANNOTATIONS_DIR
        image_dir = next((root / name for name in IMAGE_DIRECTORIES if (root / name).is_dir()), root / "JPEGImages")
    images: dict[str, list[Path]] = defaultdict(list)
    if image_dir.is_dir():
        for path in list_image_files(image_dir, on_error):
            images[path.relative_to(image_dir).with_suffix("").as_posix()].append(path)
    return VocLayout(annotations, images, image_dir, _list_names(root, split, annotations, on_error))


def _list_names(root: Path, split: str, annotations: Path, on_error: ErrorHandler) -> list[str]:
    list_path = root / "ImageSets" / "Main" / f"{split}.txt"
    if list_path.is_file():
        text = list_path.read_text(encoding="utf-8-sig", errors="replace")
        if "\0" in text:
            raise DataError(f"{list_path}: not a text file. Expected a list of images.")
        listed = [_parse_list_line(line.strip(), annotations) for line in text.splitlines() if line.strip()]
        names = list(dict.fromkeys(listed))
        if num_repeated := len(listed) - len(names):
            message = f"{list_path}: {num_repeated} lines repeat an image. Each image is used once. Remove the lines."
            on_error(DatasetError(message, "repeated_image", list_path, num_repeated, is_error=False))
        return names
    if (root / "ImageSets").is_dir() or not annotations.is_dir():
        raise DataError(
            f"{list_path}: no such image list. Expected ImageSets/, {ANNOTATIONS_DIR}/ and JPEGImages/ in {root}."
        )
    return sorted(path.stem for path in annotations.glob("*.xml") if not is_hidden(path.name))


def _parse_list_line(line: str, annotations: Path) -> str:
    """Return the name in a line of an image list. A line is a name, perhaps with a suffix or the flag of a class."""
    name = line.replace("\\", "/")
    candidates = [line, name]
    if match := CLASS_LIST_PATTERN.fullmatch(name):
        candidates.append(match[1])
    candidates += [candidate[: -len(suffix)] for candidate in candidates if (suffix := _get_image_suffix(candidate))]
    candidates += [Path(candidate).name for candidate in candidates]
    existing = (candidate for candidate in candidates if (annotations / f"{candidate}.xml").is_file())
    return next(existing, match[1] if match else name)


def _get_image_suffix(name: str) -> str:
    suffix = Path(name).suffix
    return suffix if suffix.lower() in IMAGE_SUFFIXES else ""


def _complete_class_names(found: set[str], layout: VocLayout, category: Names, ignore_category: Names) -> set[str]:
    """Return the class names of the split, and those of the dataset if the split lacks a name of the data YAML."""
    wanted = [category] if isinstance(category, str) else list(category)
    wanted += [ignore_category] if isinstance(ignore_category, str) else list(ignore_category)
    if {name.strip().casefold() for name in wanted if name} <= {name.casefold() for name in found}:
        return found
    names = set(found)
    for path in layout.annotations.glob("*.xml"):
        if not is_hidden(path.name):
            names.update(NAME_PATTERN.findall(_read_text(path)))
    return names


def _build_sample(
    name: str, document: VocDocument, layout: VocLayout, roles: ClassRoles[str], on_error: ErrorHandler
) -> Sample:
    path = layout.annotations / f"{name}.xml"
    image_path, size_hw = _select_image(name, document, layout, path), document.size_hw
    boxes, ignore = [], []
    for index, (label, corners, difficult) in enumerate(document.objects):
        if roles.is_used(label):
            where = f"{path}: object {index + 1}"
            try:
                box = _convert_box(corners, size_hw, where)
                is_difficult = parse_flag(difficult, f"{where}: difficult")
            except DataError as error:
                line = _find_line(_read_text(path), index)
                on_error(replace_message(error, str(error).replace(str(path), f"{path}, line {line}", 1)))
                continue
            boxes.append(box)
            ignore.append(is_difficult or label in roles.ignored)
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    ground_truth = GroundTruth(xyxy, np.array(ignore, bool), xyxy, ("person",) * len(xyxy))
    ground_truth, num_repeated = drop_repeated_boxes(ground_truth)
    if num_repeated:
        message = f"{path}: {num_repeated} repeated boxes. Each box is used once. Remove the repetitions."
        on_error(DatasetError(message, "repeated_box", path, num_repeated, is_error=False))
    return Sample(name, image_path, ground_truth, size_hw)


def _select_image(name: str, document: VocDocument, layout: VocLayout, path: Path) -> Path:
    """Return the image of an annotation file: that with its name, or that of the element `filename`."""
    file_name = Path(document.file_name.replace("\\", "/")).name
    images = layout.images.get(name) or layout.images.get(Path(file_name).stem, [])
    if len(images) > 1:
        stated = [image for image in images if image.name == file_name]
        if len(stated) != 1:
            listed = ", ".join(str(image) for image in images)
            raise DatasetError(
                f"{path}: annotation file of {len(images)} images: {listed}. Rename the images and give each one its "
                "own file.",
                "shared_label_file",
                path,
                len(images),
            )
        return stated[0]
    return images[0] if images else layout.image_dir / f"{name}.jpg"


def _report_form(documents: dict[str, VocDocument], where: Path, on_error: ErrorHandler) -> None:
    """Report boxes that are relative, or of images of another size."""
    boxes = [(corners, document.size_hw) for document in documents.values() for _, corners, _ in document.objects]
    records = [{"bbox": [x1, y1, x2 - x1, y2 - y1]} for (x1, y1, x2, y2), _ in boxes]
    if error := find_form_error(records, [size_hw for _, size_hw in boxes], str(where)):
        message = (
            f"{where}: {error.count} of {len(boxes)} boxes are relative or reach beyond their image. Expected xmin, "
            "ymin, xmax and ymax in pixels of the image files. Convert or scale the boxes."
        )
        kind = "boxes_normalized" if error.kind == "boxes_normalized" else "boxes_beyond_image"
        on_error(DatasetError(message, kind, where, error.count))


def _report_difficult(samples: list[Sample], where: Path, on_error: ErrorHandler) -> None:
    num_boxes = sum(len(sample.ground_truth) for sample in samples)
    if num_boxes and all(sample.ground_truth.ignore.all() for sample in samples):
        on_error(
            DatasetError(
                f"{where}: all {num_boxes} persons are difficult or of an ignored class, so there is no person to "
                "detect. Set difficult to 0 for persons that must be found.",
                "all_difficult",
                where,
                num_boxes,
            )
        )


def _read_text(path: Path) -> str:
    """Decode an XML file as UTF-8 or Latin-1. Other encodings could hide a document type declaration."""
    raw = read_content(path, "an annotation file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _parse_document(text: str, path: Path) -> VocDocument:
    # Only a document type can declare entities, which can expand to gigabytes. VOC files do not have one.
    if "<!DOCTYPE" in text:
        raise DataError(f"{path}: contains a document type declaration. Remove it.")
    try:
        document = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise DataError(f"{path}: not XML: {error}. Correct the file.") from None
    objects = [
        (
            (element.findtext("name") or "").strip(),
            tuple(_parse_float(element.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")),
            element.findtext("difficult"),
        )
        for element in document.iter("object")
    ]
    return VocDocument((document.findtext("filename") or "").strip(), _parse_size_hw(document), objects)


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


def _convert_box(corners: tuple[float, ...], size_hw: tuple[int, int] | None, where: str) -> list[float]:
    left, top, right, bottom = corners
    if not all(abs(value) <= MAX_COORDINATE_PX for value in corners):
        raise DataError(f"{where}: bndbox: expected xmin, ymin, xmax and ymax in pixels.")
    return xyxy_from_inclusive((left, top, right, bottom), 1, size_hw, where)


def _parse_float(text: str | None) -> float:
    """Return a number, or NaN for other text."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")
