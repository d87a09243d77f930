"""Helpers that all dataset readers share: error handling, coordinate checks, class selection, JSON line numbers."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from hkd_det.errors import DataError, import_package
from hkd_det.image import IMAGE_SUFFIXES
from hkd_det.structures import Sample, unlabeled_ground_truth

Item = TypeVar("Item")
Key = TypeVar("Key")
ErrorHandler = Callable[[DataError], None]

MAX_COORDINATE_PX = 2.0**24  # float32 cannot represent all larger integers
PERSON_NAMES = ("person", "pedestrian", "people", "human")
SEPARATOR_PATTERN = re.compile(r"[\s,:]*")


def raise_error(error: DataError) -> None:
    """Raise the error. This is the default error handler of the readers: an invalid record stops the reading.

    Another handler, such as `errors.append`, lets a reader skip the record and continue.

    Args:
        error: Error of one record. The message names file and record.
    """
    raise error


def show_progress(items: Sequence[Item], description: str, unit: str) -> Iterable[Item]:
    """Iterate over items with a progress bar that appears after two seconds.

    Args:
        items: Items to iterate over.
        description: Label of the progress bar.
        unit: Unit of the items, singular.

    Returns:
        The items.

    Raises:
        UnavailableError: tqdm is not installed.
    """
    tqdm = import_package("tqdm").tqdm
    bar: Iterable[Item] = tqdm(items, desc=description, unit=unit, leave=False, delay=2)
    return bar


def filter_missing_images(
    samples: Sequence[Sample], skip_missing: bool, where: str, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """Return the samples whose image files exist, and report missing files before the training starts.

    Args:
        samples: Samples of one split.
        skip_missing: Omit missing images without an error, unless all images are missing.
        where: Prefix of the error message, such as the image directory.
        on_error: Receives the errors.

    Raises:
        DataError: An image is missing (with the default `on_error`).
    """
    existing = [sample for sample in samples if sample.path.is_file()]
    num_missing = len(samples) - len(existing)
    if num_missing and (not existing or not skip_missing):
        first = next(sample.path for sample in samples if not sample.path.is_file())
        hint = "Add them." if skip_missing else "Add them, or set `skip_missing: true` to omit them."
        on_error(
            DataError(f"{where}: {num_missing} of {len(samples)} images are missing, the first is {first}. {hint}")
        )
        for sample in samples:
            if sample.path != first and not sample.path.is_file():
                on_error(DataError(f"{sample.path}: no such image. Add it."))
    return existing


def select_person_class(names: Mapping[Key, str], category: str, where: str) -> Key:
    """Select the person class of a dataset. Names are compared case-insensitively.

    Args:
        names: Class names by class id.
        category: Name of the class. If empty, the first of `PERSON_NAMES` that exists, or the only class.
        where: Prefix of the error message.

    Returns:
        The class id.

    Raises:
        DataError: There is no such class.
    """
    ids = {name.lower(): key for key, name in names.items()}
    for name in (category,) if category else PERSON_NAMES:
        if name.lower() in ids:
            return ids[name.lower()]
    if len(names) == 1 and not category:
        return next(iter(names))
    expected = f"the class {category}" if category else f"one of the classes {', '.join(PERSON_NAMES)}"
    raise DataError(f"{where}: expected {expected}, got {', '.join(names.values()) or 'none'}. Set `category: NAME`.")


def is_pixel_value(value: Any) -> bool:
    """Return whether a JSON value is a finite number in the range of pixel coordinates.

    Args:
        value: Decoded JSON value.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= MAX_COORDINATE_PX  # False for NaN and infinity


def xyxy_from_inclusive(
    box: tuple[float, float, float, float], first_pixel: int, size_hw: tuple[int, int] | None, where: str
) -> list[float]:
    """Convert a box of inclusive pixel indices, as in the PASCAL formats, to xyxy.

    Args:
        box: Indices of the left, top, right and bottom pixel.
        first_pixel: Index of the first pixel of the image, 0 or 1.
        size_hw: Image height and width in pixels, or None if unknown.
        where: Prefix of the error message.

    Returns:
        x1, y1, x2, y2 in pixels, the right and bottom edges exclusive.

    Raises:
        DataError: The box is inverted or completely outside the image.
    """
    left, top, right, bottom = box
    if right < left or bottom < top:
        raise make_size_error(where, list(box))
    x1, y1, x2, y2 = left - first_pixel, top - first_pixel, right - first_pixel + 1, bottom - first_pixel + 1
    if size_hw and (x1 >= size_hw[1] or y1 >= size_hw[0] or x2 <= 0 or y2 <= 0):
        raise make_outside_error(where, list(box), size_hw)
    return [x1, y1, x2, y2]


def make_size_error(where: str, box: object) -> DataError:
    """Create the error about a box with a negative width or height.

    Args:
        where: Prefix of the error message.
        box: Box as it is annotated.

    Returns:
        The error, for the caller to raise.
    """
    return DataError(f"{where}: expected a box with a width and height of at least 0, got {box}.")


def make_outside_error(where: str, box: object, size_hw: tuple[int, int]) -> DataError:
    """Create the error about a box that does not overlap its image.

    Args:
        where: Prefix of the error message.
        box: Box as it is annotated.
        size_hw: Image height and width in pixels.

    Returns:
        The error, for the caller to raise.
    """
    return DataError(f"{where}: expected a box inside its image of {size_hw[1]} x {size_hw[0]} pixels, got {box}.")


def make_coordinate_error(where: str, box: object) -> DataError:
    """Create the error about a box with NaN, infinite or huge coordinates, or with other values than numbers.

    Args:
        where: Prefix of the error message.
        box: Box as it is annotated.

    Returns:
        The error, for the caller to raise.
    """
    return DataError(f"{where}: expected four pixel coordinates, got {str(box)[:80]}.")


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
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if not paths:
            raise DataError(f"--unlabeled {folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none.")
        samples += [Sample(str(path), path, unlabeled_ground_truth()) for path in paths]
    return samples


class JsonLocations:
    """Line numbers of list elements in a JSON file, computed only when an error needs them.

    Args:
        path: File with a JSON object at the top level.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def annotate(self, error: DataError, key: str, index: int) -> DataError:
        """Insert the location of a list element into an error message.

        Args:
            error: Error whose message begins with the path.
            key: Key of the list in the top-level object.
            index: Index of the element.

        Returns:
            The error with the line of the element, and its column if the file has a single line.
        """
        return DataError(str(error).replace(str(self.path), f"{self.path}, {self._locations[key][index]}", 1))

    @cached_property
    def _locations(self) -> dict[str, list[str]]:
        text = self.path.read_text(encoding="utf-8-sig")
        offsets = _find_element_offsets(text)
        if "\n" not in text.rstrip():
            return {key: [f"line 1, column {offset + 1}" for offset in starts] for key, starts in offsets.items()}
        return {key: [f"line {line}" for line in _iterate_lines(text, starts)] for key, starts in offsets.items()}


def _find_element_offsets(text: str) -> dict[str, list[int]]:
    """Return the offsets of the elements of each top-level list."""
    decode = json.JSONDecoder().raw_decode
    offsets: dict[str, list[int]] = {}
    position = _skip_separators(text, text.index("{") + 1)
    while text[position] != "}":
        key, position = decode(text, position)
        position = _skip_separators(text, position)
        if text[position] == "[":
            offsets[key] = []
            position = _skip_separators(text, position + 1)
            while text[position] != "]":
                offsets[key].append(position)
                position = _skip_separators(text, decode(text, position)[1])
            position = _skip_separators(text, position + 1)
        else:
            position = _skip_separators(text, decode(text, position)[1])
    return offsets


def _iterate_lines(text: str, offsets: list[int]) -> Iterator[int]:
    """Yield the line numbers of ascending offsets in one pass."""
    line, previous = 1, 0
    for offset in offsets:
        line += text.count("\n", previous, offset)
        previous = offset
        yield line


def _skip_separators(text: str, position: int) -> int:
    """Return the position after whitespace, commas and colons."""
    match = SEPARATOR_PATTERN.match(text, position)
    return match.end() if match else position
