"""Which classes of a dataset are persons, which are ignore regions, and which are not used."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from hkd_det.datasets.base import DatasetError, ErrorHandler, ImageBox
from hkd_det.errors import DataError

Key = TypeVar("Key")
Names = str | Sequence[str]

# Riders, cyclists and other persons with a vehicle are not included: `category` or `ignore_category` selects them.
STANDARD_NAMES = frozenset(
    {
        *("person", "persons", "people", "pedestrian", "pedestrians", "human", "humans", "ped", "peds"),
        *("man", "men", "woman", "women", "adult", "adults", "male", "female"),
        *("child", "children", "boy", "boys", "girl", "girls", "kid", "kids"),
    }
)
MAX_LISTED_NAMES = 50


@dataclass(frozen=True)
class ClassRoles(Generic[Key]):
    """Use of the classes of a dataset. Classes in neither set are not used.

    Attributes:
        persons: Ids of the classes whose boxes are persons to detect.
        ignored: Ids of the classes whose boxes are ignore regions.
    """

    persons: frozenset[Key]
    ignored: frozenset[Key]

    def is_used(self, key: Key) -> bool:
        """Return whether boxes of a class are read.

        Args:
            key: Id of the class.
        """
        return key in self.persons or key in self.ignored


def assign_class_roles(
    names: Mapping[Key, str], category: Names, ignore_category: Names, where: str
) -> ClassRoles[Key]:
    """Select the person classes and the ignored classes. Names are compared case-insensitively.

    Args:
        names: Class names by class id.
        category: Names of the person classes. If empty, all of `STANDARD_NAMES` that exist, or the only class.
        ignore_category: Names of the classes whose boxes are ignore regions.
        where: Prefix of the error message.

    Returns:
        The roles.

    Raises:
        DataError: There is no such class, or a class has both roles.
    """
    ignored = _find_classes(names, ignore_category, "ignore_category", where)
    if _to_list(category):
        persons = _find_classes(names, category, "category", where)
    else:
        others = {key: name for key, name in names.items() if key not in ignored}
        persons = frozenset(key for key, name in others.items() if is_person_name(name))
        persons = persons or frozenset(others if len(others) == 1 else ())
    if persons & ignored:
        both = ", ".join(names[key] for key in persons & ignored)
        raise DataError(f"{where}: {both}: in `category` and in `ignore_category`. Remove it from one of them.")
    if not persons:
        raise DataError(
            f"{where}: expected a class such as person, pedestrian or people, got {_format_names(names.values())}. "
            "Set `category: NAME`."
        )
    return ClassRoles(persons, ignored)


def is_person_name(name: str) -> bool:
    """Return whether a class name is a standard name of persons.

    Args:
        name: Name in any case; blanks around it have no effect.
    """
    return re.sub(r"[\s_-]+", " ", name).strip().casefold() in STANDARD_NAMES


def report_unused_classes(
    boxes_by_class: Mapping[str, Sequence[ImageBox]], where: Path | str, on_error: ErrorHandler
) -> None:
    """Report the number of boxes of each class that is not used.

    Args:
        boxes_by_class: Boxes by class name.
        where: Annotation file or directory.
        on_error: Receives one warning per class, the most frequent class first.
    """
    for name, boxes in sorted(boxes_by_class.items(), key=lambda item: -len(item[1])):
        on_error(
            DatasetError(
                f"{where}: {len(boxes)} boxes of the class {name!r:.80} are not used. Set `category` to train on them.",
                "unused_class",
                where,
                len(boxes),
                is_error=False,
                class_name=name,
                boxes=boxes,
            )
        )


def _find_classes(names: Mapping[Key, str], selected: Names, option: str, where: str) -> frozenset[Key]:
    found: set[Key] = set()
    for wanted in _to_list(selected):
        keys = {key for key, name in names.items() if _fold(name) == _fold(wanted)}
        if not keys:
            raise DataError(
                f"{where}: expected the class {wanted!r:.80} of `{option}`, got {_format_names(names.values())}. "
                f"Correct `{option}`, for example `{option}: NAME`."
            )
        found |= keys
    return frozenset(found)


def _to_list(names: Names) -> list[str]:
    if isinstance(names, str):
        return [names] if names else []
    return list(names)


def _fold(name: str) -> str:
    return name.strip().casefold()


def _format_names(names: Iterable[str]) -> str:
    listed = [f"{name!s:.60}" for name in names]
    more = f" and {len(listed) - MAX_LISTED_NAMES} others" if len(listed) > MAX_LISTED_NAMES else ""
    return ", ".join(listed[:MAX_LISTED_NAMES]) + more if listed else "none"
