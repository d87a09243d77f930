"""YOLO directories: `images/` and `labels/`, one text file per image, `class cx cy w h` relative to the image size.

Rows of segmentation, oriented boxes and pose are read as boxes. A box is clipped to its image. A box without area is an
ignore region.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hkd_det.datasets.base import (
    DatasetError,
    ErrorHandler,
    ImageBox,
    drop_repeated_boxes,
    make_size_error,
    raise_error,
    set_image,
)
from hkd_det.datasets.image_files import find_repeated_files, list_files, locate_path
from hkd_det.datasets.person_classes import ClassRoles, Names, assign_class_roles, report_unused_classes
from hkd_det.datasets.yolo_labels import LabelSearch
from hkd_det.errors import DataError
from hkd_det.image import IMAGE_SUFFIXES, read_image_header
from hkd_det.structures import GroundTruth, Sample, box_area

MAX_COORDINATE_RATIO = 2.0  # a person can be partly outside the image; larger values are probably pixels
MIN_FORM_ROWS, MAX_BEYOND = 3, 0.02  # rows that decide on the form of the boxes; tolerance outside the image
ROW_FORM = "`class cx cy w h`, or a polygon `class x1 y1 x2 y2 x3 y3 ...`"


def read_yolo(
    source: Path | Sequence[Path],
    names: Mapping[int, str],
    category: Names = "",
    on_error: ErrorHandler = raise_error,
    ignore_category: Names = (),
    num_keypoint_values: int = 0,
    root: Path | None = None,
) -> list[Sample]:
    """Read directories or lists of images with YOLO labels.

    Args:
        source: Image directory, read recursively, or a text file with one image path per line; or several of those.
        names: Class names by class id, as in the data yaml.
        category: Names of the person classes (default: all standard names of persons, or the only class).
        on_error: Receives the errors of invalid records.
        ignore_category: Names of the classes whose boxes are ignore regions.
        num_keypoint_values: Number of values after the box in rows of pose labels; 0 if unknown.
        root: Directory that listed images can be relative to, besides the directory of the list.

    Returns:
        One sample per image. The image id is the path relative to `source`, or as listed; with several sources it has
        the index of the source in front. A repeated image is read once.

    Raises:
        DataError: Files are missing or invalid. The message names file and line.
    """
    sources = [source] if isinstance(source, Path) else list(source)
    where = ", ".join(str(path) for path in sources[:3]) + (", ..." if len(sources) > 3 else "")
    reader = _LabelReader(
        names,
        assign_class_roles(names, category, ignore_category, f"{where}: `names`"),
        num_keypoint_values,
        on_error,
    )
    paths: dict[str, Path] = {}
    files: list[Path] = []
    for index, one in enumerate(sources):
        found, others = _list_images(one, root, on_error)
        paths |= {f"{index}/{name}" if len(sources) > 1 else name: path for name, path in found}
        files += others
    paths = _drop_repeated_images(paths, where, on_error)
    if not paths:
        raise DataError(f"{where}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none.")
    missing = [path for path in paths.values() if not path.is_file()]
    for index, path in enumerate(missing):
        counts = f", and {len(missing) - 1} others of the {len(paths)} that {where} lists" if index == 0 else ""
        on_error(DataError(f"{path}: no such image{counts}. Add it, or remove it from the list."))
    search = LabelSearch([path for path in paths.values() if path.is_file()], [one for one in sources if one.is_dir()])
    if search.image_paths:
        search.report_problems(where, on_error)
        search.report_unsupported(files, on_error)
    samples = []
    for image_id, path in paths.items():
        if path.is_file():
            try:
                samples.append(reader.read_sample(image_id, path, search.labels.get(path)))
            except DataError as error:
                on_error(set_image(error, path))
    reader.report_form(where)
    report_unused_classes(reader.unused, where, on_error)
    return samples


def _list_images(source: Path, root: Path | None, on_error: ErrorHandler) -> tuple[list[tuple[str, Path]], list[Path]]:
    """Return image ids with paths, and the other files of a directory."""
    if source.is_dir():
        files = list_files(source, on_error)
        images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        return [(path.relative_to(source).as_posix(), path) for path in images], files
    if not source.is_file():
        raise DataError(f"{source}: no such image directory or image list. Check the path.")
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        lines = ["\0"]
    if any("\0" in line for line in lines):
        raise DataError(f"{source}: not a text file. Expected an image directory or a list of images.")
    roots = [source.parent, *([root] if root else []), Path()]
    return [(line, locate_path(line, roots)) for line in lines if line], []


def _drop_repeated_images(paths: dict[str, Path], where: str, on_error: ErrorHandler) -> dict[str, Path]:
    indices = find_repeated_files(list(paths.values()))
    kept = {name: path for index, (name, path) in enumerate(paths.items()) if indices[index] == index}
    if repeated := [name for name in paths if name not in kept]:
        on_error(
            DatasetError(
                f"{where}: {len(repeated)} entries repeat an image, the first is {repeated[0]}. Each image is used "
                "once. Remove the repetitions.",
                "repeated_image",
                where,
                len(repeated),
                is_error=False,
            )
        )
    return kept


@dataclass
class _LabelReader:
    """Reader of label files that counts the boxes of unused classes, and boxes that could be corners."""

    names: Mapping[int, str]
    roles: ClassRoles[int]
    num_keypoint_values: int
    on_error: ErrorHandler
    unused: dict[str, list[ImageBox]] = field(default_factory=lambda: defaultdict(list))
    num_rows: int = 0
    num_corner_rows: int = 0
    num_beyond: int = 0

    def read_sample(self, image_id: str, path: Path, label_path: Path | None) -> Sample:
        height, width = size_hw = read_image_header(path).size_hw
        boxes, ignore = self._read_boxes(label_path, path, size_hw) if label_path else ([], [])
        scaled = np.array(boxes, np.float64).reshape(-1, 4) * [width, height, width, height]
        xyxy = scaled.astype(np.float32)
        flags = np.array(ignore, bool) | (box_area(xyxy) <= 0)
        ground_truth, num_repeated = drop_repeated_boxes(GroundTruth(xyxy, flags, xyxy, ("person",) * len(xyxy)))
        if num_repeated:
            self.on_error(
                DatasetError(
                    f"{label_path}: {num_repeated} repeated boxes. Each box is used once. Remove the repetitions.",
                    "repeated_box",
                    label_path or "",
                    num_repeated,
                    is_error=False,
                    images=[path],
                )
            )
        return Sample(image_id, path, ground_truth, size_hw)

    def report_form(self, where: str) -> None:
        """Report boxes that reach beyond their image: an error if they look like corners, not like center and size."""
        if self.num_rows < MIN_FORM_ROWS or 2 * self.num_beyond < self.num_rows:
            return
        are_corners = self.num_corner_rows == self.num_rows
        hint = "The values look like corners x1 y1 x2 y2. Convert" if are_corners else "Check whether to convert"
        self.on_error(
            DatasetError(
                f"{where}: {self.num_beyond} of {self.num_rows} boxes reach beyond their image. {hint} them to "
                "cx cy w h.",
                "boxes_xyxy" if are_corners else "boxes_beyond_image",
                where,
                self.num_beyond,
                is_error=are_corners,
            )
        )

    def _read_boxes(self, path: Path, image: Path, size_hw: tuple[int, int]) -> tuple[list[list[float]], list[bool]]:
        """Return the boxes of persons and ignore regions, xyxy, 0 to 1, and the ignore flags."""
        boxes, ignore = [], []
        for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            try:
                class_id, box = self._parse_line(line, f"{path}, line {number}")
            except DataError as error:
                self.on_error(set_image(error, image))
                continue
            if self.roles.is_used(class_id):
                boxes.append(box)
                ignore.append(class_id in self.roles.ignored)
            else:
                box_px = tuple(value * size_hw[1 - index % 2] for index, value in enumerate(box))
                self.unused[self.names[class_id]].append((image, box_px))
        return boxes, ignore

    def _parse_line(self, line: str, where: str) -> tuple[int, list[float]]:
        """Return class id and xyxy."""
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            row = [math.nan]
        if not all(math.isfinite(value) for value in row):
            raise DataError(f"{where}: expected {ROW_FORM}, all finite numbers, got {line.strip()[:60]!r}.")
        class_id, values = row[0], row[1:]
        if class_id not in self.names:
            raise DataError(f"{where}: class: expected one of the {len(self.names)} `names`, got {class_id:g}.")
        if self._is_pose_row(values):
            values = values[:4]
        is_polygon = len(values) >= 6 and len(values) % 2 == 0
        if len(values) != 4 and not is_polygon:
            hint = " Remove the confidence or the track id." if len(values) == 5 else ""
            raise DataError(f"{where}: expected {ROW_FORM}, got {len(row)} values: {line.strip()[:60]!r}.{hint}")
        if max(map(abs, values)) > MAX_COORDINATE_RATIO:
            raise DataError(
                f"{where}: expected values relative to the image size (0 to 1), got {values[:8]}. "
                "Divide pixels by the image size."
            )
        if is_polygon:
            box = [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
        else:
            box = self._convert_box(values, where)
        if box[0] >= 1 or box[1] >= 1 or box[2] <= 0 or box[3] <= 0:
            raise DataError(f"{where}: expected a box inside its image, got {values[:8]}.")
        return int(class_id), [min(max(value, 0.0), 1.0) for value in box]

    def _convert_box(self, values: Sequence[float], where: str) -> list[float]:
        x, y, width, height = values
        if width < 0 or height < 0:
            raise make_size_error(where, values)
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        self.num_rows += 1
        self.num_corner_rows += width > x and height > y and max(values) <= 1
        self.num_beyond += min(box) < -MAX_BEYOND or max(box) > 1 + MAX_BEYOND
        return box

    def _is_pose_row(self, values: Sequence[float]) -> bool:
        """Return whether keypoints follow a box: as many as the data YAML states, or triples with a visibility."""
        if self.num_keypoint_values:
            return len(values) == 4 + self.num_keypoint_values
        if len(values) < 10 or (len(values) - 4) % 3:
            return False
        x, y, width, height = values[:4]
        return all(
            visibility in (0, 1, 2)
            and (not visibility or (abs(key_x - x) <= 0.6 * width and abs(key_y - y) <= 0.6 * height))
            for key_x, key_y, visibility in zip(values[4::3], values[5::3], values[6::3], strict=True)
        )
