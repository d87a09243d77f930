"""Helpers that all dataset readers share: error handling, coordinate checks, line numbers in JSON files."""

import copy
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hkd_det.console import iterate_with_progress
from hkd_det.errors import DataError
from hkd_det.structures import GroundTruth, Sample

Item = TypeVar("Item")
Key = TypeVar("Key")
ErrorHandler = Callable[[DataError], None]
ImageBox = tuple[Path, tuple[float, ...]]  # image; xyxy in pixels, or empty

LOGGER = logging.getLogger("hkd_det.datasets")  # without a configuration, warnings go to stderr

MAX_COORDINATE_PX = 2.0**24  # float32 cannot represent all larger integers
SEPARATOR_PATTERN = re.compile(r"[\s,:]*")


class DatasetError(DataError):
    """A problem of a dataset, with the fields that `hkd-train --check --json` writes.

    Args:
        message: Text with file, problem and remedy.
        kind: Identifier of the kind of problem, such as `repeated_box`.
        file: File that contains the problem.
        count: Number of records, images or classes that the problem concerns.
        is_error: True if the problem changes what a model learns: `--check` returns exit code 1.
        is_fatal: True if training and evaluation stop (default: as `is_error`).
        class_name: Name of the class of a problem of the kind `unused_class`.
        images: Images that the problem is about, if the reader knows them.
        boxes: For the kind `unused_class`: image and box (xyxy, pixels) of each record; no box if it is invalid.
    """

    def __init__(
        self,
        message: str,
        kind: str = "annotation",
        file: Path | str = "",
        count: int = 1,
        is_error: bool = True,
        is_fatal: bool | None = None,
        class_name: str = "",
        images: Sequence[Path] = (),
        boxes: Sequence[ImageBox] = (),
    ) -> None:
        super().__init__(message)
        self.kind, self.file, self.count, self.class_name = kind, str(file), count, class_name
        self.images, self.boxes = images, boxes
        self.is_error, self.is_fatal = is_error, is_error if is_fatal is None else is_fatal


def raise_error(error: DataError) -> None:
    """Raise the error. This is the default error handler of the readers: an invalid record stops the reading.

    Another handler, such as `errors.append`, lets a reader skip the record and continue.

    Args:
        error: Error of one record. The message names file and record. A problem that is not fatal has no effect.
    """
    if not isinstance(error, DatasetError) or error.is_fatal:
        raise error


def replace_message(error: DataError, message: str) -> DataError:
    """Return a copy of an error with another message.

    Args:
        error: Error of a record.
        message: Text of the copy.

    Returns:
        The copy. It has the kind and the file of the error.
    """
    changed = copy.copy(error)
    changed.args = (message,)
    return changed


def set_image(error: DataError, image: Path) -> DataError:
    """Attach the image that an error is about, for the page of `hkd-train --check`.

    Args:
        error: Error of a record.
        image: Image file.

    Returns:
        The error.
    """
    error.images = (image,)
    return error


def log_notices(notices: Sequence[DatasetError]) -> None:
    """Log one line for each kind of notice, in the main process only.

    Args:
        notices: Problems that are not fatal.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    unused: dict[str, int] = {}
    first: dict[str, DatasetError] = {}
    num_others: dict[str, int] = {}
    for notice in notices:
        if notice.class_name:
            unused[notice.class_name] = unused.get(notice.class_name, 0) + notice.count
        elif notice.kind in first:
            num_others[notice.kind] = num_others.get(notice.kind, 0) + 1
        else:
            first[notice.kind] = notice
    for kind, notice in first.items():
        others = f" Number of similar messages: {num_others[kind]:,}." if kind in num_others else ""
        LOGGER.warning("%s%s", notice, others)
    if unused:
        LOGGER.warning(
            "unused classes: %s. Set `category` to train on them.", ", ".join(f"{k} {v:,}" for k, v in unused.items())
        )


def show_progress(items: Sequence[Item], description: str, unit: str) -> Iterable[Item]:
    """Iterate over items with a progress bar that appears after two seconds, or with a line per minute.

    Args:
        items: Items to iterate over.
        description: Name of the operation.
        unit: Unit of the items, singular.

    Returns:
        The items.
    """
    return iterate_with_progress(items, len(items), description, unit, delay_s=2)


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


def parse_flag(value: Any, where: str) -> bool:
    """Convert a flag of an annotation, which some tools write as text.

    Args:
        value: Decoded value: a boolean, 0 or 1, the text of one of these, yes or no, or None for false.
        where: Prefix of the error message: file, record and key.

    Returns:
        The flag.

    Raises:
        DataError: The value is not a flag.
    """
    text = str(value).strip().casefold() if isinstance(value, (str, bool, int, float)) else None
    if value is None or text in ("", "0", "0.0", "false", "no", "none"):
        return False
    if text in ("1", "1.0", "true", "yes"):
        return True
    raise DataError(f"{where}: expected 0 or 1, got {value!r:.40}.")


def drop_repeated_boxes(ground_truth: GroundTruth) -> tuple[GroundTruth, int]:
    """Remove boxes that are exact repetitions of an earlier box of the image.

    Args:
        ground_truth: Annotations of one image.

    Returns:
        ground_truth: The annotations without repetitions.
        num_repeated: Number of removed boxes.
    """
    columns = (ground_truth.boxes_xyxy, ground_truth.visible_xyxy, ground_truth.ignore[:, None])
    rows = np.concatenate(columns, axis=1, dtype=np.float32)
    if len(rows) < 2:
        return ground_truth, 0
    keep = np.sort(np.unique(rows, axis=0, return_index=True)[1])
    if len(keep) == len(rows):
        return ground_truth, 0
    kept = GroundTruth(
        ground_truth.boxes_xyxy[keep],
        ground_truth.ignore[keep],
        ground_truth.visible_xyxy[keep],
        tuple(ground_truth.labels[index] for index in keep),
    )
    return kept, len(rows) - len(keep)


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
        return replace_message(
            error, str(error).replace(str(self.path), f"{self.path}, {self._locations[key][index]}", 1)
        )

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
