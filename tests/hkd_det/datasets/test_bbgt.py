"""The text form of Piotr's toolbox: what is written is read, what is wrong is one line with its number."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets.caltech_annotations import read_bbgt
from hkd_det.errors import DataError

HEADER = "% bbGt version=3\n"


def test_columns_and_their_meaning(tmp_path: Path) -> None:
    path = tmp_path / "set06_V000_I00029.jpg.txt"
    path.write_text(HEADER + "person 309 145.5 45 102 1 309 145 20 102 0 0\n\npeople 1 2 3 4 0 0 0 0 0 1 0\n")
    found = read_bbgt(path)
    assert found.labels == ("person", "people") and found.boxes_xywh.dtype == np.float64
    assert found.boxes_xywh.tolist() == [[309, 145.5, 45, 102], [1, 2, 3, 4]]
    assert found.visible_xywh.tolist() == [[309, 145, 20, 102], [0, 0, 0, 0]]
    assert found.occluded.tolist() == [True, False] and found.ignore.tolist() == [False, True]
    assert found.object_ids.tolist() == [-1, -1]


@pytest.mark.parametrize(("version", "rest"), [(1, ""), (2, " 1"), (3, " 1 0")])
def test_older_versions_have_fewer_fields(tmp_path: Path, version: int, rest: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"% bbGt version={version}\r\nperson 1 2 3 4 0 0 0 0 0{rest}\r\n".encode())
    found = read_bbgt(path)
    assert found.boxes_xywh.tolist() == [[1, 2, 3, 4]] and found.ignore.tolist() == [version > 1]
    path.write_text(f"% bbGt version={version}\nperson 1 2 3 4 0 0 0 0 0{rest} 7\n")
    with pytest.raises(DataError, match="line 2"):
        read_bbgt(path)


def test_a_header_alone_is_a_frame_without_people(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(HEADER)
    found = read_bbgt(tmp_path / "a.txt")
    assert len(found) == 0 and found.boxes_xywh.shape == (0, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: .*bbGt version=3"),
        ("person 1 2 3 4 0 0 0 0 0 0 0\n", "line 1: .*bbGt version=3"),
        ("% bbGt version=4\n", "line 1: bbGt version 4; versions 1 to 3"),
        (HEADER + "person 1 2 3 4\n", "line 2: .*is not `label x y w h occluded vx vy vw vh ignore angle`"),
        (HEADER + "\n\nperson 1 2 three 4 0 0 0 0 0 0 0\n", "line 4"),
        (HEADER + "person 1 2 nan 4 0 0 0 0 0 0 0\n", "line 2: .*NaN"),
        (HEADER + "person 1 2 3 -4 0 0 0 0 0 0 0\n", "line 2: .*negative"),
        (HEADER + "person 1 2 3 4 1 0 0 -1 0 0 0\n", "line 2: .*negative"),
        (HEADER + "person 1 2 3 4 nan 0 0 0 0 0 0\n", "line 2: occluded nan"),
        (HEADER + "person 1 2 3 4 0 0 0 0 0 inf 0\n", "line 2: .*ignore inf"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_bbgt(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_files_folders_and_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: no such"):
        read_bbgt(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="a folder"):
        read_bbgt(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(DataError, match="not a text file"):
        read_bbgt(tmp_path / "a.txt")


def test_faulty_lines_are_reported_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(HEADER + "person 1\nperson 1 2 3 4 0 0 0 0 0 0 0\nperson 1 2 -3 4 0 0 0 0 0 0 0\n")
    faults: list[DataError] = []
    assert read_bbgt(path, faults.append).boxes_xywh.tolist() == [[1, 2, 3, 4]]
    assert "line 2" in str(faults[0]) and "line 4" in str(faults[1]) and len(faults) == 2


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("person? 0123456789.-+e%bGtvrsion=3_\n\t\x1c\u2028\0é²"), max_size=120), st.booleans())
def test_any_text_raises_nothing_but_our_errors(tmp_path: Path, text: str, headed: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text(HEADER * headed + text, encoding="utf-8", newline="")
    try:
        found = read_bbgt(path)
        assert np.isfinite(found.boxes_xywh).all()
    except DataError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
