"""Strict dataclasses from mappings and `--set` overrides."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkd_det.config import apply_override, check_range, dataclass_from_dict, parse_duration_s, parse_size_bytes
from hkd_det.errors import UsageError


@dataclass(frozen=True)
class Inner:
    weight: float = 1.0
    names: tuple[str, ...] = ()
    mode: Literal["one", "two"] = "one"
    adapter: Literal["one", "two"] | Literal["none"] = "none"


@dataclass(frozen=True)
class Outer:
    run: str
    count: int = 1
    on: bool = False
    size: tuple[int, int] = (1, 2)
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    free: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


INNER_VALUES = st.builds(
    Inner,
    weight=st.floats(allow_nan=False),
    names=st.lists(st.text()).map(tuple),
    mode=st.sampled_from(["one", "two"]),
    adapter=st.sampled_from(["one", "two", "none"]),
)


@given(
    st.builds(
        Outer,
        run=st.text(),
        count=st.integers(),
        on=st.booleans(),
        size=st.tuples(st.integers(), st.integers()),
        inner=INNER_VALUES,
        other=st.none() | INNER_VALUES,
    )
)
def test_dataclass_survives_the_round_trip(settings: Outer) -> None:
    assert dataclass_from_dict(Outer, asdict(settings)) == settings


def test_omitted_key_is_default_and_empty_mapping_is_enabled() -> None:
    assert dataclass_from_dict(Outer, {"run": "r", "other": None}) == Outer("r")
    assert dataclass_from_dict(Outer, {"run": "r", "other": {}}) == Outer("r", other=Inner())


def test_number_that_yaml_reads_as_string_is_converted() -> None:
    assert dataclass_from_dict(Inner, {"weight": "1e-3"}).weight == 0.001


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "run"),
        ([], "mapping"),
        ({"run": "r", "cuont": 1}, "Did you mean count"),
        ({"run": "r", "inner": {"wieght": 1}}, r"inner\.wieght.*Did you mean weight"),
        ({"run": "r", "count": 1.5}, "expected an integer"),
        ({"run": "r", "count": "many"}, "expected an integer"),
        ({"run": "r", "count": True}, "expected an integer"),
        ({"run": "r", "count": float("inf")}, "expected an integer"),
        ({"run": "r", "inner": {"weight": float("nan")}}, r"inner\.weight.*expected a number"),
        ({"run": "r", "inner": {"weight": "nan"}}, r"inner\.weight.*expected a number"),
        ({"run": "r", "on": "yes"}, "expected true or false"),
        ({"run": "r", "size": 3}, "expected a list"),
        ({"run": "r", "size": [3]}, "size: expected 2 values, got 1"),
        ({"run": "r", "counts": {"a": "many"}}, r"counts\.a: .*expected an integer"),
        ({"run": "r", "inner": {"mode": "three"}}, "one, two"),
        ({"run": ["r"]}, "expected a string"),
        ({"run": "r", "inner": 3}, "mapping"),
        ({"run": "r", "free": 3}, "mapping"),
    ],
)
def test_invalid_value_names_the_key(values: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclass_from_dict(Outer, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": "r", "inner": {"wieght": 1}}, "r.yaml: inner.wieght: no such setting. Did you mean weight?"),
        ({"run": "r", "count": "x"}, "r.yaml: count: expected an integer, got 'x'."),
        ({}, "r.yaml: missing run. Add the missing keys."),
    ],
)
def test_error_separates_file_and_key(values: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        dataclass_from_dict(Outer, values, "r.yaml:")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("value", "limits", "is_open", "message"),
    [
        (0, (1,), False, "x: expected at least 1, got 0."),
        (0.0, (0,), True, "x: expected a number above 0, got 0.0."),
        (1.5, (0, 1), False, "x: expected 0 to 1, got 1.5."),
        (0, (0, 1), True, "x: expected a number above 0, at most 1, got 0."),
        (float("inf"), (0,), False, "x: expected a finite number, got inf."),
        (float("nan"), (0, 1), False, "x: expected a finite number, got nan."),
        ("a", (0, 1), False, "x: expected a number, got 'a'."),
    ],
)
def test_value_outside_range_is_rejected(value: Any, limits: tuple[float, ...], is_open: bool, message: str) -> None:
    with pytest.raises(UsageError) as error:
        check_range("x", value, *limits, is_open=is_open)
    assert str(error.value) == message


def test_limits_belong_to_the_range() -> None:
    for value in (0, 1, 0.5):
        check_range("x", value, 0, 1)
    check_range("x", 1, 0, 1, is_open=True)


def test_override_reaches_nested_dataclasses() -> None:
    def apply(assignment: str) -> Outer:
        return dataclass_from_dict(Outer, apply_override(Outer, {"run": "r", "other": {}}, assignment))

    assert apply("inner.weight=2").inner.weight == 2
    assert apply("other.names=a,b").other == Inner(names=("a", "b"))
    assert apply("size=3,4").size == (3, 4)
    assert apply("other=none").other is None
    assert apply("count=3") == Outer("r", count=3, other=Inner())


@pytest.mark.parametrize("assignment", ["count", "cuont=1", "inner.nothing=1", "other.weight=2", "count=x"])
def test_invalid_override_is_rejected(assignment: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        apply_override(Outer, {"run": "r"}, assignment)
    with pytest.raises(UsageError, match="inner: expected a mapping"):
        apply_override(Outer, {"run": "r", "inner": 3}, "inner.weight=1")


def test_durations_and_sizes() -> None:
    assert [parse_duration_s("--x", text) for text in ("90s", "10m", "1.5h", "7d")] == [90, 600, 5400, 604800]
    assert [parse_size_bytes("--x", text) for text in ("500MB", "20GB", "1GiB")] == [5e8, 2e10, 2**30]
    for text in ("", "10", "m", "-1m", "0s", "1w"):
        with pytest.raises(UsageError, match="--x"):
            parse_duration_s("--x", text)
    for text in ("", "10", "GB", "-1GB", "0GB", "1kB"):
        with pytest.raises(UsageError, match="--x"):
            parse_size_bytes("--x", text)
