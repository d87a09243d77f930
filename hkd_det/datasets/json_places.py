"""Where in a JSON file an element of a list stands: looked up only when something is wrong with it."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from hkd_det.errors import DataError

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
