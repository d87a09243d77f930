"""Line and column numbers of JSON list elements."""

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets.base import JsonLocations
from hkd_det.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
GAPS = st.text(" \t\r\n", max_size=3)
INDENTS = st.sampled_from([None, 1])


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(GAPS, VALUES, INDENTS, GAPS), min_size=1, max_size=5),
    st.dictionaries(st.text(max_size=4).filter(lambda key: key != "boxes"), VALUES, max_size=2),
    st.booleans(),
)
def test_annotated_location_is_where_the_element_was_written(
    tmp_path: Path, elements: list[tuple[str, object, int | None, str]], others: dict[str, object], is_one_line: bool
) -> None:
    before = "".join(f"{json.dumps(key)}: {json.dumps(value)}, " for key, value in others.items())
    text, starts = "{" + before + '"boxes" : [', []
    for gap, value, indent, end_gap in elements:
        text += gap.replace("\r", "") if not is_one_line else " " * len(gap)
        starts.append(len(text))
        text += json.dumps(value, indent=None if is_one_line else indent)
        text += (end_gap.replace("\r", "") if not is_one_line else "") + ","
    text = text[:-1] + "]}"
    path = tmp_path / "a.json"
    path.write_text(text + "\n", encoding="utf-8")
    for number, start in enumerate(starts):
        message = str(JsonLocations(path).annotate(DataError(f"{path}: wrong"), "boxes", number))
        line, column = len(text[:start].split("\n")), start + 1
        where = f"line {line}" if "\n" in text else f"line 1, column {column}"
        assert message == f"{path}, {where}: wrong"
