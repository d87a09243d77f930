"""What a reader does with a faulty record: stop at it (the default), or report it and go on without it.

Are the pictures of a data set on disk?

Which of a data set's classes is the person to find.

Boxes from first to last pixel, as PASCAL's formats have them.

Where in a JSON file an element of a list stands: looked up only when something is wrong with it.

The user's own pictures without labels, for a teacher to speak of.

What such a picture's truth says is that nothing in it may be judged: one ignore region that covers whatever is cut
out of it, the grey beside it included. So no loss against the truth hears of it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from hkd_det.errors import DataError
from hkd_det.image import IMAGE_SUFFIXES
from hkd_det.structures import Sample, unlabeled_ground_truth

ErrorHandler = Callable[[DataError], None]


def raise_error(error: DataError) -> None:
    """For training and measuring: nothing is left out in silence."""
    raise error


def filter_missing_images(
    samples: Sequence[Sample], skip_missing: bool, where: str, on_error: ErrorHandler = raise_error
) -> list[Sample]:
    """The samples whose pictures are there.

    Raises DataError that begins with `where` if one is missing, or, with present_only, if all are: better now
    than hours into a training.
    """
    there = [sample for sample in samples if sample.path.is_file()]
    lost = len(samples) - len(there)
    if lost and (not there or not skip_missing):
        first = next(sample.path for sample in samples if not sample.path.is_file())
        remedy = "put them there" if skip_missing else "put them there, or say `skip_missing: true` to go without them"
        on_error(DataError(f"{where}: {lost} of {len(samples)} pictures are missing, the first {first}; {remedy}"))
        for sample in samples:
            if sample.path != first and not sample.path.is_file():
                on_error(DataError(f"{sample.path}: the picture is missing"))
    return there


PERSON_NAMES = ("person", "pedestrian", "people", "human")


Key = TypeVar("Key")


def select_person_class(names: Mapping[Key, str], category: str, where: str) -> Key:
    """The key of the class called `category`; without one, the first of `PERSON_NAMES`, or the only class.

    Upper and lower case are alike. Raises DataError that begins with `where` and tells the names there are.
    """
    keys = {name.lower(): key for key, name in names.items()}
    for name in (category,) if category else PERSON_NAMES:
        if name.lower() in keys:
            return keys[name.lower()]
    if len(names) == 1 and not category:
        return next(iter(names))
    wanted = category or " or ".join(PERSON_NAMES)
    raise DataError(f"{where}: no {wanted} among {', '.join(names.values()) or 'none'}; say `category: NAME`")


def xyxy_from_inclusive(
    pixels: tuple[float, float, float, float], first_pixel: int, size_hw: tuple[int, int] | None, where: str
) -> list[float]:
    """Left, top, right and bottom pixel, the last two included, as xyxy from 0.

    size_hw: the picture's; None if the file does not say. Raises DataError, which begins with `where`, for a box that
    ends before it begins or is wholly outside its picture.
    """
    left, top, right, bottom = pixels
    if right < left or bottom < top:
        raise DataError(f"{where}: the box {list(pixels)} has a negative width or height")
    x1, y1, x2, y2 = left - first_pixel, top - first_pixel, right - first_pixel + 1, bottom - first_pixel + 1
    if size_hw and (x1 >= size_hw[1] or y1 >= size_hw[0] or x2 <= 0 or y2 <= 0):
        raise DataError(f"{where}: the box {list(pixels)} is outside its picture of {size_hw[1]} x {size_hw[0]} pixels")
    return [x1, y1, x2, y2]


SEPARATOR_PATTERN = re.compile(r"[\s,:]*")


class JsonLocations:
    """Places of the elements of the lists at the top of a JSON object."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def annotate(self, error: DataError, key: str, index: int) -> DataError:
        """The fault of element `index` of the list `key`, which begins with the path, with the place put in.

        Its line, and in a file of a single line its column.
        """
        return DataError(str(error).replace(str(self.path), f"{self.path}, {self._locations[key][index]}", 1))

    @cached_property
    def _locations(self) -> dict[str, list[str]]:
        text = self.path.read_text(encoding="utf-8-sig")
        if "\n" not in text.rstrip():
            return {
                key: [f"line 1, column {at + 1}" for at in starts] for key, starts in _find_element_starts(text).items()
            }
        return {
            key: [f"line {line}" for line in _count_lines(text, starts)]
            for key, starts in _find_element_starts(text).items()
        }


def _find_element_starts(text: str) -> dict[str, list[int]]:
    """By key, where the elements begin."""
    read = json.JSONDecoder().raw_decode
    starts: dict[str, list[int]] = {}
    at = _skip_separators(text, text.index("{") + 1)
    while text[at] != "}":
        key, at = read(text, at)
        at = _skip_separators(text, at)
        if text[at] == "[":
            starts[key] = []
            at = _skip_separators(text, at + 1)
            while text[at] != "]":
                starts[key].append(at)
                at = _skip_separators(text, read(text, at)[1])
            at = _skip_separators(text, at + 1)
        else:
            at = _skip_separators(text, read(text, at)[1])
    return starts


def _count_lines(text: str, starts: list[int]) -> Iterator[int]:
    """Line numbers of ascending positions, in one pass."""
    line, counted = 1, 0
    for at in starts:
        line += text.count("\n", counted, at)
        counted = at
        yield line


def _skip_separators(text: str, position: int) -> int:
    """Behind blanks, commas and colons."""
    found = SEPARATOR_PATTERN.match(text, position)
    return found.end() if found else position


def read_unlabeled(folders: Sequence[Path]) -> list[Sample]:
    """Every picture in the folders and below them, sorted by path; DataError for a folder that holds none."""
    samples = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"--unlabeled {folder}: no such folder")
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if not paths:
            raise DataError(f"--unlabeled {folder}: holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
        samples += [Sample(str(path), path, unlabeled_ground_truth()) for path in paths]
    return samples
