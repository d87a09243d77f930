"""Which of a data set's classes is the person to find."""

from collections.abc import Mapping
from typing import TypeVar

from hkd_det.errors import DataError

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
