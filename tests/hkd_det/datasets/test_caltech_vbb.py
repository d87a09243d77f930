"""`.vbb` files of Caltech Pedestrian against scipy, and invalid files."""

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
from hkd_det.datasets.caltech import FrameAnnotations, read_vbb
from hkd_det.errors import DataError

OFFICIAL = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "caltech"
VIDEOS = sorted(OFFICIAL.rglob("*.vbb"))
ID, OCCL = "id", "occl"
Write = Callable[..., None]


def cell(values: list[Any]) -> Any:
    array = np.empty((1, len(values)), object)
    for index, value in enumerate(values):
        array[0, index] = value
    return array


def record(number: float, pos: Any, posv: Any = (0, 0, 0, 0), occl: float = 0) -> dict[str, Any]:
    return {ID: number, "pos": np.array([pos], float), OCCL: occl, "lock": 0, "posv": np.array([posv])}


@pytest.mark.skipif(not VIDEOS, reason="HKD_TEST_DATA is not set")
@pytest.mark.parametrize(
    "path",
    [*VIDEOS[:2], *(pytest.param(path, marks=pytest.mark.slow) for path in VIDEOS[2:])],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_official_files_equal_scipy(path: Path) -> None:
    frames = read_vbb(path)
    raw = scipy.io.loadmat(path)["A"][0, 0]
    assert len(frames) == raw["nFrame"].item() == raw["objLists"].size
    for annotations, expected in zip(frames, raw["objLists"].ravel(), strict=True):
        assert len(annotations) == (expected.size if expected.dtype.names else 0)
        for index in range(len(annotations)):
            item = expected[0, index]
            assert annotations.labels[index] == raw["objLbl"][0, item["id"].item() - 1].item()
            assert annotations.object_ids[index] == item["id"].item()
            assert annotations.occluded[index] == item["occl"].item()
            assert annotations.boxes_xywh[index].tolist() == item["pos"].ravel().tolist()
            assert annotations.visible_xywh[index].tolist() == item["posv"].ravel().tolist()


@pytest.mark.skipif(not VIDEOS, reason="HKD_TEST_DATA is not set")
def test_known_counts_of_an_official_video() -> None:
    labels = [label for frame in read_vbb(OFFICIAL / "annotations/set06/V000.vbb") for label in frame.labels]
    assert {name: labels.count(name) for name in set(labels)} == {"person": 146, "people": 50, "person-fa": 589}
    frame = read_vbb(OFFICIAL / "annotations/set06/V000.vbb")[0]
    assert frame.labels == ("person-fa", "person-fa") and frame.boxes_xywh.dtype == np.float64
    np.testing.assert_allclose(frame.boxes_xywh[0], [171.50120627, 183.62765794, 9.80971641, 25.85834059], atol=1e-8)


def test_written_video_is_read_unchanged(tmp_path: Path, write_vbb: Write) -> None:
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
        ([[GOOD]], {"vers": 1.3}, r"\.vbb version 1\.3 is not supported, only 1\.4"),
        ([[GOOD]], {"vers": NAN}, r"version nan"),
        ([[GOOD]], {"vers": "new"}, r"expected a \.vbb annotation"),
        ([[GOOD]], {"nFrame": 2}, "expected objects of 2 frames .*, got 1"),
        ([[GOOD]], {"nFrame": NAN}, r"expected a \.vbb annotation"),
        ([[GOOD]], {"nFrame": np.inf}, r"expected a \.vbb annotation"),
        ([[GOOD]], {"objLists": "none"}, "expected objects of 1 frames .*, got 0"),
        ([[GOOD]], {"objLists": np.ones((1, 1))}, "frame 0: expected an object"),
        ([[GOOD]], {"objLists": cell(["a"])}, "frame 0: expected an object"),
        ([[GOOD]], {"objLists": cell([cell([cell([])])])}, "frame 0: expected an object"),
        ([[GOOD]], {"objLbl": np.ones((1, 1))}, r"expected a \.vbb annotation"),
        ([[GOOD]], {"objLbl": "person"}, r"expected a \.vbb annotation"),
        ([[], [record(2, (1, 2, 3, 4))]], {}, "frame 1: object 2 has no label"),
        ([[record(0, (1, 2, 3, 4))]], {}, "object 0 has no label"),
        ([[record(1.5, (1, 2, 3, 4))]], {}, "object 1.5 has no label"),
        ([[record(1, (1, 2, 3))]], {}, "expected boxes of 4 numbers, got 3 and 4"),
        ([[record(1, (1, 2, -3, 4))]], {}, "frame 0: object 1: expected a box with a width"),
        ([[record(1, (1, 2, 3, 4), (1, 2, 3, -4))]], {}, "object 1: expected a box with a width"),
        ([[record(1, (1, NAN, 3, 4))]], {}, "object 1: expected four pixel coordinates"),
        ([[record(1, (1, 2, 3, 1e30))]], {}, "expected four pixel coordinates"),
        ([[GOOD | {OCCL: "x"}]], {}, "expected an object"),
        ([[GOOD | {ID: np.ones((1, 2))}]], {}, "expected one number, got 2"),
    ],
)
def test_invalid_vbb_names_frame_and_object(
    tmp_path: Path, write_vbb: Write, frames: Any, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "V000.vbb"
    write_vbb(path, frames, ["person"], **changes)
    with pytest.raises(DataError, match=message) as caught:
        read_vbb(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_other_matlab_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "V000.vbb"
    for content in ({"x": 1.0}, {"vers": 1.4}, {"vers": 1.4, "A": 3.0}, {"vers": 1.4, "A": {"nFrame": 1}}):
        scipy.io.savemat(path, content, appendmat=False)
        with pytest.raises(DataError, match=r"V000\.vbb: expected a \.vbb annotation"):
            read_vbb(path)


def test_invalid_objects_are_reported_and_omitted(tmp_path: Path, write_vbb: Write) -> None:
    path = tmp_path / "V000.vbb"
    write_vbb(path, [[record(1, (1, 2, -3, 4)), GOOD], [record(9, (1, 2, 3, 4))]], ["person"])
    errors: list[DataError] = []
    first, second = read_vbb(path, errors.append)
    assert first.boxes_xywh.tolist() == [[1, 2, 3, 4]] and len(second) == 0
    assert ["frame 0: object 1" in str(errors[0]), "frame 1: object 9" in str(errors[1])] == [True, True]


def test_arrays_of_different_lengths_are_rejected() -> None:
    with pytest.raises(ValueError, match="arrays of the same length"):
        FrameAnnotations(
            ("person",), np.zeros((1, 4)), np.zeros((2, 4)), np.ones(1, bool), np.ones(1, bool), np.ones(1, int)
        )


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_vbb_raises_only_data_errors(tmp_path: Path, write_vbb: Write, data: st.DataObject) -> None:
    source, damaged = tmp_path / "complete.vbb", tmp_path / "damaged.vbb"
    if not source.exists():
        write_vbb(source, [[GOOD, record(2, (5, 6, 7, 8), (5, 6, 7, 4), 1)], [], [GOOD]], ["person", "people"])
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(128, len(raw) - 1))] = data.draw(st.sampled_from([*range(20), 127, 128, 255]))
    damaged.write_bytes(raw)
    for on_error in (raise_error, [].append):
        try:
            read_vbb(damaged, on_error)
        except DataError as error:
            assert str(damaged) in str(error) and "\n" not in str(error)
