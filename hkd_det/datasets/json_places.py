"""Where in a JSON file an element of a list stands: looked up only when something is wrong with it."""

import json
import re
from functools import cached_property
from pathlib import Path

from hkd_det.errors import DataError

SPACE = re.compile(r"[\s,:]*")


class JsonPlaces:
    """Places of the elements of the lists at the top of a JSON object."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def told(self, fault: DataError, key: str, index: int) -> DataError:
        """The fault of element `index` of the list `key`, which begins with the path, with line and column put in."""
        text, starts = self._starts
        at = starts.get(key, [])[index]
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        place = f"line {line}" if line > 1 or "\n" in text else f"line 1, column {column}"
        return DataError(str(fault).replace(str(self.path), f"{self.path}, {place}", 1))

    @cached_property
    def _starts(self) -> tuple[str, dict[str, list[int]]]:
        """The text, and by key the positions in it."""
        text = self.path.read_text(encoding="utf-8-sig")
        read = json.JSONDecoder().raw_decode
        starts: dict[str, list[int]] = {}
        at = _skip(text, text.index("{") + 1)
        while text[at] != "}":
            key, at = read(text, at)
            at = _skip(text, at)
            if text[at] == "[":
                starts[key] = []
                at = _skip(text, at + 1)
                while text[at] != "]":
                    starts[key].append(at)
                    at = _skip(text, read(text, at)[1])
                at = _skip(text, at + 1)
            else:
                at = _skip(text, read(text, at)[1])
        return text, starts


def _skip(text: str, at: int) -> int:
    """Behind blanks, commas and colons."""
    found = SPACE.match(text, at)
    return found.end() if found else at
