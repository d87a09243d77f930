"""Settings and flags: strict conversion of YAML mappings and `key=value` overrides to dataclasses, ranges, units."""

import difflib
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from hkd_det.errors import UsageError

T = TypeVar("T")

DURATION_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SIZE_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def dataclass_from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Create a dataclass from a mapping of its fields.

    Values are checked against the field types: bool, int, float, str, Literal, dict, tuple, nested dataclasses,
    `X | None`, and a number or a word, `float | Literal["auto"]`. Strings are converted to numbers, because YAML reads
    1e-3 as a string.

    Args:
        cls: Dataclass to create.
        values: Mapping of field names to values. Omitted fields keep their defaults.
        where: Prefix of error messages: the dotted key of the mapping, or its file with a colon (`recipe.yaml:`).

    Returns:
        The dataclass with the converted values.

    Raises:
        UsageError: A key is unknown or missing, or a value has the wrong type. The message names the key
            and suggests the most similar known key.
    """
    field_types = _get_field_types(cls)
    if not isinstance(values, Mapping):
        raise UsageError(f"{where.rstrip(':') or 'settings'}: expected a mapping of {', '.join(field_types)}.")
    for key in values:
        if key not in field_types:
            raise UsageError(f"{_join_key(where, str(key))}: no such setting{suggest_name(str(key), field_types)}")
    missing = [name for name in _list_required_fields(cls) if name not in values]
    if missing:
        raise UsageError(f"{where.rstrip(':') or 'settings'}: missing {', '.join(missing)}. Add the missing keys.")
    converted = {key: _convert_value(field_types[key], value, _join_key(where, key)) for key, value in values.items()}
    return cls(**converted)


def apply_override(cls: type, values: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    """Apply one `--set key=value` override to a mapping of dataclass fields.

    `dataclass_from_dict` checks the combination of all values afterwards.

    Args:
        cls: Dataclass that the mapping describes.
        values: Mapping of field names to values.
        assignment: "key=value". A dotted key such as `hkd.cls=2` addresses a nested dataclass.

    Returns:
        A copy of `values` with the override.

    Raises:
        UsageError: The key is unknown, the value has the wrong type, or the nested dataclass is None.
    """
    key, equals, text = assignment.partition("=")
    if not equals:
        raise UsageError(f"--set {assignment}: expected key=value, such as lr=1e-3.")
    return _apply_override_at(cls, values, key.split("."), text, assignment)


def check_range(name: str, value: float, low: float, high: float = math.inf, *, is_open: bool = False) -> None:
    """Check that a setting or a flag is in a range.

    Args:
        name: Key or flag, for the error message.
        value: Value to check.
        low: Minimum.
        high: Maximum; infinity for none.
        is_open: Whether `low` itself is not allowed.

    Raises:
        UsageError: The value is outside the range, infinite, NaN, or not a number.
    """
    if not isinstance(value, numbers.Real):
        raise UsageError(f"{name}: expected a number, got {value!r}.")
    if math.isfinite(value) and (low < value if is_open else low <= value) and value <= high:
        return
    if not math.isfinite(value):
        expected = "a finite number"
    elif math.isfinite(high):
        expected = f"a number above {low:g}, at most {high:g}" if is_open else f"{low:g} to {high:g}"
    else:
        expected = f"a number above {low:g}" if is_open else f"at least {low:g}"
    raise UsageError(f"{name}: expected {expected}, got {value}.")


def parse_duration_s(flag: str, text: str) -> float:
    """Parse a duration such as `90s`, `10m`, `12h` or `7d`.

    Args:
        flag: Flag for messages.
        text: The duration.

    Returns:
        Seconds.

    Raises:
        UsageError: The text is not a duration above 0.
    """
    return _parse_quantity(flag, text, DURATION_UNITS_S, "s, m, h or d, for example 10m")


def parse_size_bytes(flag: str, text: str) -> int:
    """Parse a size such as `500MB` or `20GB`.

    Args:
        flag: Flag for messages.
        text: The size.

    Returns:
        Bytes.

    Raises:
        UsageError: The text is not a size above 0.
    """
    return round(_parse_quantity(flag, text, SIZE_UNITS, "MB, GB, TB, MiB, GiB or TiB, for example 20GB"))


def _parse_quantity(flag: str, text: str, units: Mapping[str, int], expected_units: str) -> float:
    match = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(units)})", text.strip())
    if not match or float(match[1]) == 0:
        raise UsageError(f"{flag} {text}: expected a number above 0 and {expected_units}.")
    return float(match[1]) * units[match[2]]


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Format the last sentence of an error message about an unknown name.

    Args:
        name: Unknown name.
        known: Valid names.

    Returns:
        ". Did you mean X?" for the most similar name, or ". Expected one of ..." if none is similar.
    """
    known = list(known)
    similar = difflib.get_close_matches(name, known, 1)
    return f". Did you mean {similar[0]}?" if similar else f". Expected one of {', '.join(known)}."


def _apply_override_at(
    cls: type, values: Mapping[str, Any], path: list[str], text: str, assignment: str
) -> dict[str, Any]:
    field_types = _get_field_types(cls)
    name, rest = path[0], path[1:]
    if name not in field_types:
        raise UsageError(f"--set {assignment}: no such setting{suggest_name(name, field_types)}")
    if not rest:
        return {**values, name: _convert_value(field_types[name], text, f"--set {assignment}")}
    nested_cls, is_optional = _unwrap_optional(field_types[name])
    nested = values.get(name)
    if not (isinstance(nested_cls, type) and is_dataclass(nested_cls)) or (nested is None and is_optional):
        raise UsageError(f"--set {assignment}: {name} is not in use. Add it to --distill or to the recipe.")
    if not isinstance(nested, Mapping | None):
        raise UsageError(f"{name}: expected a mapping of {', '.join(_get_field_types(nested_cls))}.")
    return {**values, name: _apply_override_at(nested_cls, nested or {}, rest, text, assignment)}


def _unwrap_optional(cls: Any) -> tuple[Any, bool]:
    """Return `X` and True for the type `X | None`, else the type itself and False.

    A union of literals is one literal.
    """
    if typing.get_origin(cls) not in (types.UnionType, typing.Union):
        return cls, False
    args = [arg for arg in typing.get_args(cls) if arg is not type(None)]
    if all(typing.get_origin(arg) is typing.Literal for arg in args):
        values = tuple(value for arg in args for value in typing.get_args(arg))
        return typing.Literal[values], type(None) in typing.get_args(cls)
    if any(typing.get_origin(arg) is typing.Literal for arg in args):
        return cls, False  # a number or a word
    return args[0], type(None) in typing.get_args(cls)


def _list_required_fields(cls: Any) -> list[str]:
    return [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]


def _get_field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _convert_value(cls: Any, value: Any, where: str) -> Any:
    cls, is_optional = _unwrap_optional(cls)
    if is_optional and (value is None or value == "none"):
        return None
    if is_dataclass(cls) and isinstance(cls, type):
        return dataclass_from_dict(cls, {} if value is None else value, where)
    if typing.get_origin(cls) is typing.Literal:
        if value not in typing.get_args(cls):
            raise UsageError(f"{where}: expected one of {', '.join(map(str, typing.get_args(cls)))}, got {value!r}.")
        return value
    if typing.get_origin(cls) is dict:
        return _convert_dict(typing.get_args(cls)[1], value, where)
    if typing.get_origin(cls) is tuple:
        return _convert_tuple(typing.get_args(cls), value, where)
    convert = _convert_number_or_word if typing.get_origin(cls) is typing.Union else _convert_scalar
    return convert(cls, value, where)


def _convert_dict(item_type: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: expected a mapping, got {value!r}.")
    if item_type is Any:
        return dict(value)
    return {key: _convert_value(item_type, item, _join_key(where, str(key))) for key, item in value.items()}


def _convert_tuple(item_types: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise UsageError(f"{where}: expected a list, got {value!r}.")
    if item_types[-1] is Ellipsis:
        item_types = item_types[:1] * len(items)
    if len(item_types) != len(items):
        raise UsageError(f"{where}: expected {len(item_types)} values, got {len(items)}.")
    return tuple(_convert_value(cls, item, where) for cls, item in zip(item_types, items, strict=True))


def _convert_number_or_word(cls: Any, value: Any, where: str) -> Any:
    """Convert a value of a type such as `float | Literal["auto"]`."""
    number_type, literal = typing.get_args(cls)
    words = typing.get_args(literal)
    if value in words:
        return value
    try:
        return _convert_scalar(number_type, value, where)
    except UsageError:
        raise UsageError(f"{where}: expected a number or {', '.join(words)}, got {value!r}.") from None


def _convert_scalar(cls: Any, value: Any, where: str) -> Any:
    if cls is bool:
        if isinstance(value, bool):
            return value
        if value in ("true", "false"):
            return value == "true"
        raise UsageError(f"{where}: expected true or false, got {value!r}.")
    if cls is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise UsageError(f"{where}: expected a string, got {value!r}.")
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = cls(value)
            if cls is float and math.isnan(number):  # NaN would pass every range check
                number = None
        except (ValueError, OverflowError):
            number = None
        if number is not None and (not isinstance(value, float) or number == value):
            return number
    raise UsageError(f"{where}: expected {'an integer' if cls is int else 'a number'}, got {value!r}.")


def _join_key(where: str, key: str) -> str:
    if not where:
        return key
    return f"{where} {key}" if where.endswith(":") else f"{where}.{key}"
