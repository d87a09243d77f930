"""Caltech's .vbb files: every number as scipy reads it, every way they can be broken."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets.base import raise_error
from hkd_det.datasets.caltech_annotations import FrameAnnotations, read_vbb
from hkd_det.errors import DataError

OFFICIAL = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "caltech"
FILMS = sorted(OFFICIAL.rglob("*.vbb"))
ID, OCCL = "id", "occl"
Write = Callable[..., None]


def cell(values: list[Any]) -> Any:
    array = np.empty((1, len(values)), object)
    for index, value in enumerate(values):
        array[0, index] = value
    return array


def record(number: float, pos: Any, posv: Any = (0, 0, 0, 0), occl: float = 0) -> dict[str, Any]:
    return {ID: number, "pos": np.array([pos], float), OCCL: occl, "lock": 0, "posv": np.array([posv])}


@pytest.mark.skipif(not FILMS, reason="HKD_TEST_DATA is not set")
@pytest.mark.parametrize("path", FILMS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_box_of_the_official_files(path: Path) -> None:
    frames = read_vbb(path)
    raw = scipy.io.loadmat(path)["A"][0, 0]
    assert len(frames) == raw["nFrame"].item() == raw["objLists"].size
    for ours, theirs in zip(frames, raw["objLists"].ravel(), strict=True):
        assert len(ours) == (theirs.size if theirs.dtype.names else 0)
        for index in range(len(ours)):
            one = theirs[0, index]
            assert ours.labels[index] == raw["objLbl"][0, one["id"].item() - 1].item()
            assert ours.object_ids[index] == one["id"].item() and ours.occluded[index] == one["occl"].item()
            assert ours.boxes_xywh[index].tolist() == one["pos"].ravel().tolist()
            assert ours.visible_xywh[index].tolist() == one["posv"].ravel().tolist()


@pytest.mark.skipif(not FILMS, reason="HKD_TEST_DATA is not set")
def test_known_counts_of_two_films() -> None:
    labels = [label for frame in read_vbb(OFFICIAL / "annotations/set06/V000.vbb") for label in frame.labels]
    assert {name: labels.count(name) for name in set(labels)} == {"person": 146, "people": 50, "person-fa": 589}
    frame = read_vbb(OFFICIAL / "annotations/set06/V000.vbb")[0]
    assert frame.labels == ("person-fa", "person-fa") and frame.boxes_xywh.dtype == np.float64
    np.testing.assert_allclose(frame.boxes_xywh[0], [171.50120627, 183.62765794, 9.80971641, 25.85834059], atol=1e-8)


def test_a_written_film_is_read_as_it_was(tmp_path: Path, write_vbb: Write) -> None:
    path = tmp_path / "V000.vbb"
    hidden = record(1, (10.5, 20.25, 41, 100), (10, 20, 41, 50), 1)
    write_vbb(path, [[], [hidden, record(3, (1, 2, 3, 4))]], ["person", "", "people"], objHide=np.ones((1, 3)))
    empty, full = read_vbb(path)
    assert len(empty) == 0 and empty.boxes_xywh.shape == (0, 4)
    assert full.labels == ("person", "people") and full.object_ids.tolist() == [1, 3]
    assert full.boxes_xywh.tolist() == [[10.5, 20.25, 41, 100], [1, 2, 3, 4]]
    assert full.visible_xywh.tolist() == [[10, 20, 41, 50], [0, 0, 0, 0]]
    assert full.occluded.tolist() == [True, False] and full.ignore.tolist() == [False, False]


GOOD = record(1, (1, 2, 3, 4))
NAN = float("nan")


@pytest.mark.parametrize(
    ("frames", "changes", "message"),
    [
        ([[GOOD]], {"vers": 1.3}, r"\.vbb version 1\.3; version 1\.4 is read"),
        ([[GOOD]], {"vers": NAN}, r"version nan"),
        ([[GOOD]], {"vers": "new"}, r"no \.vbb annotation"),
        ([[GOOD]], {"nFrame": 2}, "boxes of 1 frames, but nFrame is 2"),
        ([[GOOD]], {"nFrame": NAN}, r"no \.vbb annotation"),
        ([[GOOD]], {"nFrame": np.inf}, r"no \.vbb annotation"),
        ([[GOOD]], {"objLists": "none"}, "boxes of 0 frames"),
        ([[GOOD]], {"objLists": np.ones((1, 1))}, "frame 0: no object"),
        ([[GOOD]], {"objLists": cell(["a"])}, "frame 0: no object"),
        ([[GOOD]], {"objLists": cell([cell([cell([])])])}, "frame 0: no object"),
        ([[GOOD]], {"objLbl": np.ones((1, 1))}, r"no \.vbb annotation"),
        ([[GOOD]], {"objLbl": "person"}, r"no \.vbb annotation"),
        ([[], [record(2, (1, 2, 3, 4))]], {}, "frame 1: object 2 has no label"),
        ([[record(0, (1, 2, 3, 4))]], {}, "object 0 has no label"),
        ([[record(1.5, (1, 2, 3, 4))]], {}, "object 1.5 has no label"),
        ([[record(1, (1, 2, 3))]], {}, "boxes of 3 and 4 numbers"),
        ([[record(1, (1, 2, -3, 4))]], {}, "frame 0: object 1: .*negative"),
        ([[record(1, (1, 2, 3, 4), (1, 2, 3, -4))]], {}, "object 1: .*negative"),
        ([[record(1, (1, NAN, 3, 4))]], {}, "object 1: .*NaN"),
        ([[record(1, (1, 2, 3, 1e30))]], {}, "no pixels"),
        ([[GOOD | {OCCL: "x"}]], {}, "no object"),
        ([[GOOD | {ID: np.ones((1, 2))}]], {}, "2 numbers where one should be"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, write_vbb: Write, frames: Any, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "V000.vbb"
    write_vbb(path, frames, ["person"], **changes)
    with pytest.raises(DataError, match=message) as caught:
        read_vbb(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_other_matlab_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "V000.vbb"
    for content in ({"x": 1.0}, {"vers": 1.4}, {"vers": 1.4, "A": 3.0}, {"vers": 1.4, "A": {"nFrame": 1}}):
        scipy.io.savemat(path, content, appendmat=False)
        with pytest.raises(DataError, match=r"V000\.vbb: no \.vbb annotation"):
            read_vbb(path)


def test_faulty_objects_are_reported_and_left_out(tmp_path: Path, write_vbb: Write) -> None:
    path = tmp_path / "V000.vbb"
    write_vbb(path, [[record(1, (1, 2, -3, 4)), GOOD], [record(9, (1, 2, 3, 4))]], ["person"])
    faults: list[DataError] = []
    first, second = read_vbb(path, faults.append)
    assert first.boxes_xywh.tolist() == [[1, 2, 3, 4]] and len(second) == 0
    assert ["frame 0: object 1" in str(faults[0]), "frame 1: object 9" in str(faults[1])] == [True, True]


def test_columns_of_different_lengths_do_not_pass() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        FrameAnnotations(
            ("person",), np.zeros((1, 4)), np.zeros((2, 4)), np.ones(1, bool), np.ones(1, bool), np.ones(1, int)
        )


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_file_raises_nothing_but_our_errors(tmp_path: Path, write_vbb: Write, data: st.DataObject) -> None:
    source, spoiled = tmp_path / "whole.vbb", tmp_path / "spoiled.vbb"
    if not source.exists():
        write_vbb(source, [[GOOD, record(2, (5, 6, 7, 8), (5, 6, 7, 4), 1)], [], [GOOD]], ["person", "people"])
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(128, len(raw) - 1))] = data.draw(st.sampled_from([*range(20), 127, 128, 255]))
    spoiled.write_bytes(raw)
    for on_fault in (raise_error, [].append):
        try:
            read_vbb(spoiled, on_fault)
        except DataError as error:
            assert str(spoiled) in str(error) and "\n" not in str(error)
