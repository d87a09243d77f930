"""Line numbers of list elements in a JSON file."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from hkd_det.datasets.base import replace_message
from hkd_det.errors import DataError

SEPARATOR_PATTERN = re.compile(r"[\s,:]*")


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
