"""Settings from text: YAML mappings and `key=value` flags into nested frozen dataclasses, strictly."""

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from hkd_det.errors import UsageError

T = TypeVar("T")


def dataclass_from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """A dataclass from a mapping of its fields, nested ones included; fields left out keep their defaults.

    A number may be written as YAML takes for text (1e-3). Raises UsageError, which names the key, for an unknown one
    (with the nearest known), for one that is missing, and for a value of another kind.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{where or 'settings'}: expected a mapping of {', '.join(_get_field_types(cls))}")
    kinds = _get_field_types(cls)
    unknown = [str(key) for key in values if key not in kinds]
    if unknown:
        raise UsageError(
            f"{_join_key(where, unknown[0])}: no such setting{_format_suggestion(unknown[0], list(kinds))}"
        )
    given = {key: _convert_value(kinds[key], value, _join_key(where, key)) for key, value in values.items()}
    try:
        return cls(**given)
    except TypeError as error:
        raise UsageError(f"{where or 'settings'}: {str(error).partition('__init__() ')[2] or error}") from None


def apply_override(cls: type, values: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    """The mapping `values` of a dataclass's fields with one `key=value` applied; `hkd.pyramid=2` reaches inside.

    What the settings come to as a whole is judged by `from_mapping`, when all are there. Raises UsageError for a key
    that is none, a value of another kind, and a nested dataclass that is None.
    """
    key, equals, text = assignment.partition("=")
    if not equals:
        raise UsageError(f"--set {assignment}: expected key=value")
    return _apply_override_at(cls, values, key.split("."), text, assignment)


def _apply_override_at(
    cls: type, values: Mapping[str, Any], path: list[str], text: str, assignment: str
) -> dict[str, Any]:
    kinds = _get_field_types(cls)
    name, rest = path[0], path[1:]
    if name not in kinds:
        raise UsageError(f"--set {assignment}: no such setting{_format_suggestion(name, list(kinds))}")
    if not rest:
        return {**values, name: _convert_value(kinds[name], text, f"--set {assignment}")}
    inside, may_be_none = _unwrap_optional(kinds[name])
    inner = values.get(name)
    if not (isinstance(inside, type) and is_dataclass(inside)) or (inner is None and may_be_none):
        raise UsageError(f"--set {assignment}: {name} is not in use; name it in --distill or in the recipe first")
    if not isinstance(inner, Mapping | None):
        raise UsageError(f"{name}: expected a mapping of {', '.join(_get_field_types(inside))}")
    return {**values, name: _apply_override_at(inside, inner or {}, rest, text, assignment)}


def _unwrap_optional(cls: Any) -> tuple[Any, bool]:
    """Of `X | None` the X, and that it may be None."""
    if typing.get_origin(cls) in (types.UnionType, typing.Union):
        return next(one for one in typing.get_args(cls) if one is not type(None)), True
    return cls, False


def _get_field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _convert_value(cls: Any, value: Any, where: str) -> Any:
    cls, may_be_none = _unwrap_optional(cls)
    if may_be_none and (value is None or value == "none"):
        return None
    if is_dataclass(cls) and isinstance(cls, type):
        return dataclass_from_dict(cls, {} if value is None else value, where)
    if typing.get_origin(cls) is typing.Literal:
        if value not in typing.get_args(cls):
            raise UsageError(f"{where}: {value!r} is none of {', '.join(map(str, typing.get_args(cls)))}")
        return value
    if typing.get_origin(cls) is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{where}: {value!r} is not a mapping")
        return dict(value)
    if typing.get_origin(cls) is tuple:
        return _convert_tuple(typing.get_args(cls)[0], value, where)
    return _convert_scalar(cls, value, where)


def _convert_tuple(cls: Any, value: Any, where: str) -> tuple[Any, ...]:
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)):
        raise UsageError(f"{where}: {value!r} is not a list")
    return tuple(_convert_value(cls, one, where) for one in listed)


def _convert_scalar(cls: Any, value: Any, where: str) -> Any:
    if cls is bool:
        if isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
        raise UsageError(f"{where}: {value!r} is neither true nor false")
    if cls is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise UsageError(f"{where}: {value!r} is not a text")
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = cls(value)
            if cls is float and math.isnan(number):  # neither below nor above anything, it would pass every check
                number = None
        except (ValueError, OverflowError):
            number = None
        if number is not None and (not isinstance(value, float) or number == value):
            return number
    raise UsageError(f"{where}: {value!r} is not a {'whole number' if cls is int else 'number'}")


def _join_key(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _format_suggestion(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
