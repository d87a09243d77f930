"""Settings from mappings and flags: what comes in is what comes out, and nothing unknown passes."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hkd_det.config import apply_override, dataclass_from_dict
from hkd_det.errors import UsageError


@dataclass(frozen=True)
class Inner:
    weight: float = 1.0
    names: tuple[str, ...] = ()
    rule: Literal["one", "two"] = "one"


@dataclass(frozen=True)
class Outer:
    run: str
    count: int = 1
    on: bool = False
    size: tuple[int, int] = (1, 2)
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    free: dict[str, Any] = field(default_factory=dict)


INNERS = st.builds(
    Inner,
    weight=st.floats(allow_nan=False),
    names=st.lists(st.text()).map(tuple),
    rule=st.sampled_from(["one", "two"]),
)


@given(
    st.builds(
        Outer,
        run=st.text(),
        count=st.integers(),
        on=st.booleans(),
        size=st.tuples(st.integers(), st.integers()),
        inner=INNERS,
        other=st.none() | INNERS,
    )
)
def test_plain_values_give_the_same_settings_back(settings: Outer) -> None:
    assert dataclass_from_dict(Outer, asdict(settings)) == settings


def test_what_is_left_out_keeps_its_default_and_an_empty_mapping_means_in_use() -> None:
    assert dataclass_from_dict(Outer, {"run": "r", "other": None}) == Outer("r")
    assert dataclass_from_dict(Outer, {"run": "r", "other": {}}) == Outer("r", other=Inner())


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    assert dataclass_from_dict(Inner, {"weight": "1e-3"}).weight == 0.001


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "run"),
        ([], "mapping"),
        ({"run": "r", "cuont": 1}, "did you mean count"),
        ({"run": "r", "inner": {"wieght": 1}}, r"inner\.wieght.*did you mean weight"),
        ({"run": "r", "count": 1.5}, "whole number"),
        ({"run": "r", "count": "many"}, "whole number"),
        ({"run": "r", "count": True}, "whole number"),
        ({"run": "r", "count": float("inf")}, "whole number"),
        ({"run": "r", "inner": {"weight": float("nan")}}, r"inner\.weight.*not a number"),
        ({"run": "r", "inner": {"weight": "nan"}}, r"inner\.weight.*not a number"),
        ({"run": "r", "on": "yes"}, "true nor false"),
        ({"run": "r", "size": 3}, "not a list"),
        ({"run": "r", "inner": {"rule": "three"}}, "one, two"),
        ({"run": ["r"]}, "not a text"),
        ({"run": "r", "inner": 3}, "mapping"),
        ({"run": "r", "free": 3}, "mapping"),
    ],
)
def test_what_is_wrong_is_named(values: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataclass_from_dict(Outer, values)


def test_flags_reach_into_what_is_nested() -> None:
    def changed(assignment: str) -> Outer:
        return dataclass_from_dict(Outer, apply_override(Outer, {"run": "r", "other": {}}, assignment))

    assert changed("inner.weight=2").inner.weight == 2
    assert changed("other.names=a,b").other == Inner(names=("a", "b"))
    assert changed("size=3,4").size == (3, 4)
    assert changed("other=none").other is None
    assert changed("count=3") == Outer("r", count=3, other=Inner())


@pytest.mark.parametrize("assignment", ["count", "cuont=1", "inner.nothing=1", "other.weight=2", "count=x"])
def test_a_flag_that_cannot_be_meant_is_refused(assignment: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        apply_override(Outer, {"run": "r"}, assignment)
    with pytest.raises(UsageError, match="inner: expected a mapping"):
        apply_override(Outer, {"run": "r", "inner": 3}, "inner.weight=1")
