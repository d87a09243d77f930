"""Image files of a dataset: search in directories, lists written on other machines, repeated files, and
checks that stated sizes and boxes fit the images.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_det.datasets.base import DatasetError, ErrorHandler, drop_repeated_boxes, is_pixel_value, raise_error
from hkd_det.errors import DataError
from hkd_det.image import IMAGE_SUFFIXES, read_image_header
from hkd_det.structures import GroundTruth, Sample, unlabeled_ground_truth

UNSUPPORTED_SUFFIXES = {".arw", ".cr2", ".cr3", ".dng", ".gif", ".nef", ".psd", ".svg", ".tga"}
DRIVE_PATTERN = re.compile(r"^([A-Za-z]:)?/+")
SKIPPED_DIRECTORIES = {"__macosx", "@eadir"}  # copies of file attributes by macOS, thumbnails by Synology
AREA_TOLERANCE = 0.02  # relative
MIN_PERCENT_BOXES, MIN_PERCENT_IMAGE_PX = 10, 300  # so many boxes in one corner of so large images are no chance
BEYOND_TOLERANCE_PX = 2.0
SizeHW = tuple[int, int]


def list_image_files(folder: Path, on_error: ErrorHandler = raise_error) -> list[Path]:
    """List the image files of a directory and its subdirectories, also through links.

    Hidden files and directories, such as the `._*` files of macOS, are left out. Each directory is read once.

    Args:
        folder: Directory to search.
        on_error: Receives a warning for a link to a directory that is already part of the search.

    Returns:
        Image files, sorted by path.
    """
    return [path for path in list_files(folder, on_error) if path.suffix.lower() in IMAGE_SUFFIXES]


def list_files(folder: Path, on_error: ErrorHandler = raise_error) -> list[Path]:
    """List all files like `list_image_files`, whatever their suffix.

    Args:
        folder: Directory to search.
        on_error: Receives a warning for a link to a directory that is already part of the search.

    Returns:
        Files, sorted by path.
    """
    root = os.path.realpath(folder)
    visited: set[str] = set()
    files: list[Path] = []
    directories, links = [folder], list[Path]()
    while directories or links:
        directory = directories.pop() if directories else links.pop(0)  # links last: a directory is listed by its name
        real = os.path.realpath(directory)
        if real in visited or (real != root and f"{root}{os.sep}".startswith(f"{real.rstrip(os.sep)}{os.sep}")):
            on_error(
                DatasetError(
                    f"{directory}: a link to a directory that is already read. It is skipped. Remove the link.",
                    "repeated_directory",
                    directory,
                    is_error=False,
                )
            )
            continue
        visited.add(real)
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = directory / entry.name
                if is_hidden(entry.name):
                    continue
                if not entry.is_dir():
                    files.append(path)
                elif entry.is_symlink():
                    links.append(path)
                else:
                    directories.append(path)
    return sorted(files)


def is_hidden(name: str) -> bool:
    """Return whether a file or directory is hidden, or is written by an operating system next to the data.

    Args:
        name: Name without directory.
    """
    return name.startswith(".") or name.casefold() in SKIPPED_DIRECTORIES


def locate_path(name: str, roots: Sequence[Path]) -> Path:
    r"""Find a file or directory that a dataset names, perhaps for another machine.

    Accepted are paths relative to any of `roots`, backslashes, the prefix `data/` of Darknet, and paths that are
    absolute, or begin with `../`, and whose last parts exist in one of `roots`.

    Args:
        name: Path in an annotation file, a list of images or a data YAML.
        roots: Directories to search, in this order.

    Returns:
        The first path that exists; `roots[0] / name` if there is none.
    """
    slashed = name.replace("\\", "/")
    for text in dict.fromkeys((name, slashed)):
        for root in roots:
            if _exists(root / text):
                return root / text
    relative = DRIVE_PATTERN.sub("", slashed)
    parts = [part for part in relative.split("/") if part not in ("", ".")]
    if relative != slashed or ".." in parts:
        while ".." in parts:
            parts = parts[parts.index("..") + 1 :]
        starts = range(len(parts))
    else:  # a copy of the dataset in another directory
        is_repeated = parts[:1] in (["data"], *([root.name] for root in roots))
        starts = range(1, 2 if is_repeated or len(parts) > 2 else 1)
    for start in starts:
        for root in roots:
            candidate = root.joinpath(*parts[start:])
            if parts[start:] not in ([], ["images"]) and _exists(candidate):
                return candidate
    return roots[0] / name


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or with a null byte
        return False


def find_repeated_files(paths: Sequence[Path]) -> list[int]:
    """Return for each path the index of the first path of the same file.

    Args:
        paths: Files, which need not exist.

    Returns:
        Indices; `result[i] == i` for a file that occurs the first time.
    """
    directories: dict[Path, str] = {}
    first: dict[str, int] = {}
    indices = []
    for index, path in enumerate(paths):
        if path.parent not in directories:
            directories[path.parent] = os.path.realpath(path.parent)
        real = os.path.realpath(path) if path.is_symlink() else f"{directories[path.parent]}{os.sep}{path.name}"
        indices.append(first.setdefault(real, index))
    return indices


def merge_repeated_images(
    samples: Sequence[Sample], where: str, on_error: ErrorHandler = raise_error, kind: str = "image records"
) -> list[Sample]:
    """Merge the samples of the same file, so that each image occurs once with all its boxes.

    Args:
        samples: Samples of one split.
        where: Prefix of the warning.
        on_error: Receives the warning.
        kind: What repeats the images, plural.

    Returns:
        Samples with different files.
    """
    indices = find_repeated_files([sample.path for sample in samples])
    repeated = [index for index, first in enumerate(indices) if index != first]
    if not repeated:
        return list(samples)
    on_error(
        DatasetError(
            f"{where}: {len(repeated)} {kind} repeat an image, the first is {samples[repeated[0]].path}. Each image is "
            "used once. Remove the repetitions.",
            "repeated_image",
            where,
            len(repeated),
            is_error=False,
            images=[samples[index].path for index in repeated],
        )
    )
    merged = {index: samples[index] for index, first in enumerate(indices) if index == first}
    for index in repeated:
        first = merged[indices[index]]
        ground_truth = _concatenate_ground_truths(first.ground_truth, samples[index].ground_truth)
        merged[indices[index]] = Sample(first.image_id, first.path, ground_truth, first.size_hw)
    return list(merged.values())


def _concatenate_ground_truths(one: GroundTruth, other: GroundTruth) -> GroundTruth:
    both = GroundTruth(
        np.concatenate([one.boxes_xyxy, other.boxes_xyxy]),
        np.concatenate([one.ignore, other.ignore]),
        np.concatenate([one.visible_xyxy, other.visible_xyxy]),
        one.labels + other.labels,
    )
    return drop_repeated_boxes(both)[0]


def check_stated_sizes(samples: Sequence[Sample], on_error: ErrorHandler = raise_error) -> None:
    """Compare the annotated image sizes with the headers of the image files.

    Args:
        samples: Samples whose `size_hw` is the annotated size. Unreadable images are left out.
        on_error: Receives one error per image.

    Raises:
        DataError: A size differs (with the default `on_error`).
    """
    for sample in samples:
        if sample.size_hw is None:
            continue
        try:
            size_hw = read_image_header(sample.path).size_hw
        except DataError:
            continue  # reported when the image is decoded
        if size_hw != sample.size_hw:
            on_error(make_stated_size_error(sample.path, sample.size_hw, size_hw))


def make_stated_size_error(path: Path, stated_hw: tuple[int, int], size_hw: tuple[int, int]) -> DatasetError:
    """Create the error about an image whose size is not the annotated one.

    Args:
        path: Image file.
        stated_hw: Annotated height and width, pixels.
        size_hw: Height and width of the image file, pixels.

    Returns:
        The error, for the caller to raise.
    """
    cause, hint = "", "Use the images that were annotated, or scale the boxes and the stated size"
    if read_image_header(path).stored_hw == stated_hw:
        cause = ": its EXIF orientation turns it"
        hint = "Annotate the upright image, or remove the orientation from the file"
    stated, actual = f"{stated_hw[1]} x {stated_hw[0]}", f"{size_hw[1]} x {size_hw[0]}"
    return DatasetError(
        f"{path}: expected {stated} pixels as annotated, got {actual}{cause}. {hint}.",
        "image_size",
        path,
    )


def find_form_error(
    records: Sequence[dict[str, Any]], sizes_hw: Sequence[SizeHW | None], where: str
) -> DatasetError | None:
    """Return an error if the boxes of a file are not [x, y, width, height] in pixels.

    Args:
        records: Records with a valid `bbox`.
        sizes_hw: Image height and width of each record in pixels, or None if unknown.
        where: Prefix of the error message, the annotation file.

    Returns:
        The error about corners, relative values, or boxes beyond their images; None if the boxes have the expected
        form.
    """
    pairs = [
        (record["bbox"], record.get("area"), size)
        for record, size in zip(records, sizes_hw, strict=True)
        if "vis_bbox" not in record and _has_bbox(record) and any(record["bbox"])
    ]
    if not pairs:
        return None
    boxes = np.array([box for box, _, _ in pairs], np.float64)
    areas = np.array([area if is_pixel_value(area) else np.nan for _, area, _ in pairs], np.float64)
    sides = np.array([(size[1], size[0]) if size else (np.inf, np.inf) for _, _, size in pairs], np.float64)
    num_boxes = len(boxes)
    if boxes.max() <= 1.01 and boxes.min() >= 0 and num_boxes > 1:
        return DatasetError(
            f"{where}: {num_boxes} of {num_boxes} boxes have values from 0 to 1. Expected pixels. Multiply them by the "
            "image size.",
            "boxes_normalized",
            where,
            num_boxes,
        )
    start, end = boxes[:, :2], boxes[:, 2:]
    if num_boxes >= MIN_PERCENT_BOXES and (start + end).max() <= 100.5 and sides.min() >= MIN_PERCENT_IMAGE_PX:
        return DatasetError(
            f"{where}: all {num_boxes} boxes end within 100 pixels of the top left corner, like percentages. "
            "Expected pixels. Multiply them by a hundredth of the image size.",
            "boxes_normalized",
            where,
            num_boxes,
        )
    num_beyond = int((start + end > sides + np.maximum(BEYOND_TOLERANCE_PX, 0.02 * sides)).any(axis=1).sum())
    are_corners = bool((end > start).all() and (end <= sides + BEYOND_TOLERANCE_PX).all())
    num_areas = int((_equals(areas, (end - start).prod(axis=1)) & ~_equals(areas, end.prod(axis=1))).sum())
    if are_corners and (2 * num_areas > num_boxes or (2 * num_beyond >= num_boxes > 1)):
        return DatasetError(
            f"{where}: the boxes look like corners [x1, y1, x2, y2]: {num_areas} of {num_boxes} areas are those of "
            f"corners, and {num_beyond} boxes reach beyond their image. Convert them to [x, y, width, height].",
            "boxes_xyxy",
            where,
            max(num_areas, num_beyond),
        )
    if 2 * num_beyond >= num_boxes > 2:
        return DatasetError(
            f"{where}: {num_beyond} of {num_boxes} boxes reach beyond their image. Expected [x, y, width, height] in "
            "pixels of the image files. Convert or scale the boxes.",
            "boxes_beyond_image",
            where,
            num_beyond,
        )
    return None


def _equals(values: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.abs(values - expected) <= AREA_TOLERANCE * np.abs(expected)


def _has_bbox(record: dict[str, Any]) -> bool:
    box = record.get("bbox")
    return isinstance(box, list) and len(box) == 4 and all(map(is_pixel_value, box))


def read_unlabeled(folders: Sequence[Path]) -> list[Sample]:
    """Read directories of unlabeled images, recursively and sorted by path.

    Args:
        folders: Image directories of `--unlabeled`.

    Returns:
        Samples whose ground truth is one ignore region over the complete image.

    Raises:
        DataError: A directory does not exist or contains no images.
    """
    samples = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"--unlabeled {folder}: no such directory. Set a directory of images.")
        paths = [path for path in list_image_files(folder) if path.is_file()]
        if not paths:
            raise DataError(f"--unlabeled {folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none.")
        samples += [Sample(str(path), path, unlabeled_ground_truth()) for path in paths]
    return samples
