"""Annotation text files of Piotr's toolbox (bbGt)."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets.caltech import read_bbgt
from hkd_det.errors import DataError

HEADER = "% bbGt version=3\n"


def test_columns_become_arrays(tmp_path: Path) -> None:
    path = tmp_path / "set06_V000_I00029.jpg.txt"
    path.write_text(HEADER + "person 309 145.5 45 102 1 309 145 20 102 0 0\n\npeople 1 2 3 4 0 0 0 0 0 1 0\n")
    annotations = read_bbgt(path)
    assert annotations.labels == ("person", "people") and annotations.boxes_xywh.dtype == np.float64
    assert annotations.boxes_xywh.tolist() == [[309, 145.5, 45, 102], [1, 2, 3, 4]]
    assert annotations.visible_xywh.tolist() == [[309, 145, 20, 102], [0, 0, 0, 0]]
    assert annotations.occluded.tolist() == [True, False] and annotations.ignore.tolist() == [False, True]
    assert annotations.object_ids.tolist() == [-1, -1]


@pytest.mark.parametrize(("version", "rest"), [(1, ""), (2, " 1"), (3, " 1 0")])
def test_older_versions_have_fewer_fields(tmp_path: Path, version: int, rest: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"% bbGt version={version}\r\nperson 1 2 3 4 0 0 0 0 0{rest}\r\n".encode())
    annotations = read_bbgt(path)
    assert annotations.boxes_xywh.tolist() == [[1, 2, 3, 4]] and annotations.ignore.tolist() == [version > 1]
    path.write_text(f"% bbGt version={version}\nperson 1 2 3 4 0 0 0 0 0{rest} 7\n")
    with pytest.raises(DataError, match="line 2"):
        read_bbgt(path)


def test_header_alone_is_a_frame_without_objects(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(HEADER)
    annotations = read_bbgt(tmp_path / "a.txt")
    assert len(annotations) == 0 and annotations.boxes_xywh.shape == (0, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: .*bbGt version=3"),
        ("person 1 2 3 4 0 0 0 0 0 0 0\n", "line 1: .*bbGt version=3"),
        ("% bbGt version=4\n", "line 1: bbGt version 4 is not supported"),
        (HEADER + "person 1 2 3 4\n", "line 2: expected `label x y w h occluded vx vy vw vh ignore angle`"),
        (HEADER + "\n\nperson 1 2 three 4 0 0 0 0 0 0 0\n", "line 4"),
        (HEADER + "person 1 2 nan 4 0 0 0 0 0 0 0\n", "line 2: expected four pixel coordinates"),
        (HEADER + "person 1 2 3 -4 0 0 0 0 0 0 0\n", "line 2: expected a box with a width and height of at least 0"),
        (HEADER + "person 1 2 3 4 1 0 0 -1 0 0 0\n", "line 2: expected a box with a width and height of at least 0"),
        (HEADER + "person 1 2 3 4 nan 0 0 0 0 0 0\n", "line 2: expected 0 or 1 for occluded and ignore, got nan and 0"),
        (HEADER + "person 1 2 3 4 0 0 0 0 0 inf 0\n", "line 2: expected 0 or 1 .* got 0 and inf"),
    ],
)
def test_invalid_text_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_bbgt(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: no such"):
        read_bbgt(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="got a directory"):
        read_bbgt(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(DataError, match="expected a text file"):
        read_bbgt(tmp_path / "a.txt")


def test_invalid_lines_are_reported_and_omitted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(HEADER + "person 1\nperson 1 2 3 4 0 0 0 0 0 0 0\nperson 1 2 -3 4 0 0 0 0 0 0 0\n")
    errors: list[DataError] = []
    assert read_bbgt(path, errors.append).boxes_xywh.tolist() == [[1, 2, 3, 4]]
    assert "line 2" in str(errors[0]) and "line 4" in str(errors[1]) and len(errors) == 2


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("person? 0123456789.-+e%bGtvrsion=3_\n\t\x1c\u2028\0é²"), max_size=120), st.booleans())
def test_any_text_raises_only_data_errors(tmp_path: Path, text: str, has_header: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text(HEADER * has_header + text, encoding="utf-8", newline="")
    try:
        annotations = read_bbgt(path)
        assert np.isfinite(annotations.boxes_xywh).all()
    except DataError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
