"""Caltech: the official numbers, both forms of annotation, where pictures lie, and what is told of faults."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from hkd_det.datasets.caltech import (
    CORRECTED,
    parse_sets,
    read_caltech,
    read_corrected_annotations,
    read_original_annotations,
)
from hkd_det.datasets.caltech_annotations import read_vbb
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, UsageError

OFFICIAL = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "caltech"
official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="HKD_TEST_DATA is not set")
Write = Callable[..., None]
HEADER = "% bbGt version=3\n"


def record(number: int, pos: Any, posv: Any = (0, 0, 0, 0), occl: int = 0) -> dict[str, Any]:
    return {"id": number, "pos": np.array([pos], float), "occl": occl, "lock": 0, "posv": np.array([posv])}


def picture(root: Path, name: str) -> Path:
    path = root / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@official
def test_the_official_frames_are_every_30th_of_each_film() -> None:
    frames = list(read_original_annotations(OFFICIAL / "annotations", ["set00", "set06"], 30))
    lengths = {  # nFrame of the ten films
        **{"set00/V000": 1845, "set00/V001": 1844, "set00/V002": 1322, "set00/V003": 568, "set00/V004": 2133},
        **{"set06/V000": 1842, "set06/V001": 1842, "set06/V002": 1775, "set06/V003": 1775, "set06/V004": 1841},
    }
    wanted = [f"{film}/I{index:05}" for film, count in lengths.items() for index in range(29, count, 30)]
    assert [frame.name for frame in frames] == wanted
    assert len(list(read_original_annotations(OFFICIAL / "annotations", ["set00"], 3))) == sum(
        count // 3 for film, count in lengths.items() if film < "set01"
    )


@official
def test_frames_and_pixels_are_counted_as_in_the_official_ground_truth() -> None:
    # The new ground truth keeps boxes of the old one where they are ignored, rounded: in frames one off they differ.
    gt = scipy.io.loadmat(OFFICIAL / "gt-All.mat")["gt"]
    assert gt.shape == (1, 4024)
    films = [read_vbb(path) for path in sorted((OFFICIAL / "annotations" / "set06").glob("*.vbb"))]
    frames = [(film, index) for film in films for index in range(29, len(film), 30)]
    alike = {-1: 0, 0: 0, 1: 0}
    for shift in alike:
        for (film, index), rows in zip(frames, gt[0], strict=False):
            old = np.floor(film[index + shift].boxes_xywh + 0.5) if index + shift < len(film) else np.zeros((0, 4))
            kept = rows.reshape(-1, 5)
            alike[shift] += sum((old == box).all(axis=1).any() for box in kept[kept[:, 4] == 1, :4])
    assert alike[0] > 50 and alike[0] > 2 * max(alike[-1], alike[1])


@official
def test_real_labels_get_their_meaning(tmp_path: Path) -> None:
    (tmp_path / "annotations").symlink_to(OFFICIAL / "annotations")
    frames = list(read_original_annotations(OFFICIAL / "annotations", ["set06"], 30))
    for frame in frames:
        picture(tmp_path, f"{frame.name}.jpg")
    samples = read_caltech(tmp_path, "set06", frame_step=7)  # of a test set it is every 30th all the same
    assert [sample.image_id for sample in samples] == [frame.name for frame in frames]
    raw = Counter(label for frame in frames for label in frame.annotations.labels)
    read = Counter(label for sample in samples for label in sample.ground_truth.labels)
    assert raw["person-fa"] > 0 and read == {name: count for name, count in raw.items() if name != "person-fa"}
    assert sum(int((~sample.ground_truth.ignore).sum()) for sample in samples) == raw["person"]
    assert all(
        ((s.ground_truth.visible_ratio >= 0) & (s.ground_truth.visible_ratio <= 1 + 1e-9)).all() for s in samples
    )


def old_set(root: Path, write_vbb: Write) -> None:
    """Two films of four frames: a whole person, a half hidden one, one of each other label."""
    people = [
        record(1, (1, 1, 10, 20)),
        record(1, (11, 21, 10, 20), (11, 21, 10, 10), 1),
        *(record(number, (5, 5, 4, 8)) for number in range(2, 6)),
        record(1, (5, 5, 0, 8)),
    ]
    labels = ["person", "people", "person?", "ignore", "person-fa"]
    for name in ("set00/V000", "set01/V003"):
        write_vbb(root / "annotations" / f"{name}.vbb", [[], people, [], people[:1]], labels)


def test_old_boxes_become_0_based_and_keep_what_is_visible(tmp_path: Path, write_vbb: Write) -> None:
    old_set(tmp_path, write_vbb)
    for film in ("set00/V000", "set01/V003"):
        for index in (1, 3):
            picture(tmp_path, f"{film}/I{index:05}.jpg")
    samples = read_caltech(tmp_path, "set00-set01", frame_step=2)
    assert [s.image_id for s in samples] == [f"{f}/I0000{i}" for f in ("set00/V000", "set01/V003") for i in (1, 3)]
    assert samples[0].path == tmp_path / "images" / "set00" / "V000" / "I00001.jpg"
    truth = samples[0].ground_truth
    assert truth.labels == ("person", "person", "people", "person?", "ignore", "person")
    assert truth.ignore.tolist() == [False, False, True, True, True, True]  # the last has no area
    assert truth.boxes_xyxy[:2].tolist() == [[0, 0, 10, 20], [10, 20, 20, 40]]
    assert truth.visible_xyxy[:2].tolist() == [[0, 0, 10, 20], [10, 20, 20, 30]]
    assert truth.visible_ratio[:2].tolist() == [1.0, 0.5]
    assert len(samples[1].ground_truth) == 1


def new_set(root: Path, names: list[str], text: str = "person 11 21 10 20 1 11 21 10 10 0 0\n") -> None:
    for name in names:
        path = root / "annotations_new" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + text)


@pytest.mark.parametrize(
    ("files", "pictures"),
    [
        ("anno_test_1xnew/set06_V000_I{:05}.jpg.txt", "set06_V000_I{:05}.jpg"),
        ("set06_V000_I{:05}.txt", "set06/V000/I{:05}.png"),
        ("set06/V000/I{:05}.txt", "set06/V000/I{:05}.jpg"),
        ("new/set06/V000/I{:05}.jpg.txt", "set06_V000_I{:05}.png"),
    ],
)
def test_new_annotations_and_pictures_in_all_their_places(tmp_path: Path, files: str, pictures: str) -> None:
    new_set(tmp_path, [files.format(index) for index in (59, 29, 30)])
    new_set(tmp_path, ["readme.txt", "set07_V000_I00029.txt"], "none")
    paths = [picture(tmp_path, pictures.format(index)) for index in (29, 59)]
    samples = read_caltech(tmp_path, "set06", CORRECTED)
    assert [s.image_id for s in samples] == ["set06/V000/I00029", "set06/V000/I00059"]
    assert [s.path for s in samples] == paths
    assert samples[0].ground_truth.boxes_xyxy.tolist() == [[10, 20, 20, 40]]
    assert samples[0].ground_truth.visible_xyxy.tolist() == [[10, 20, 20, 30]]


def test_new_flags_decide_what_is_visible_and_ignored(tmp_path: Path) -> None:
    lines = [
        "person 1 1 10 20 0 1 1 10 5 0 0",  # not occluded: whole, whatever its visible box
        "person 1 1 10 20 1 0 0 0 0 0 0",  # occluded, not marked: whole
        "person 1 1 10 20 0 0 0 0 0 1 0",
        "person-fa 1 1 10 20 0 0 0 0 0 0 0",
    ]
    new_set(tmp_path, ["set06_V000_I00029.txt"], "\n".join(lines))
    picture(tmp_path, "set06/V000/I00029.jpg")
    truth = read_caltech(tmp_path, "set06", CORRECTED)[0].ground_truth
    assert truth.visible_ratio.tolist() == [1, 1, 1] and truth.ignore.tolist() == [False, False, True]


def test_faults_of_the_set_are_one_line(tmp_path: Path, write_vbb: Write) -> None:
    with pytest.raises(DataError, match=r"set06: holds no V\*\.vbb"):
        read_caltech(tmp_path, "set06")
    with pytest.raises(DataError, match=r"annotations_new: no text files of every 30th frame of set06"):
        read_caltech(tmp_path, "set06", CORRECTED)
    old_set(tmp_path, write_vbb)
    with pytest.raises(DataError, match=r"4 of 4 pictures are missing, the first .*set00/V000/I00001\.jpg"):
        read_caltech(tmp_path, "set00-set01", frame_step=2)
    one = picture(tmp_path, "set01/V003/I00003.jpg")
    assert [s.path for s in read_caltech(tmp_path, "set00-set01", frame_step=2, skip_missing=True)] == [one]
    new_set(tmp_path, ["a/set06_V000_I00029.jpg.txt", "b/set06_V000_I00029.txt"])
    with pytest.raises(DataError, match="the same frame as"):
        read_caltech(tmp_path, "set06", CORRECTED)


def test_a_gap_among_the_new_files_is_told(tmp_path: Path) -> None:
    new_set(tmp_path, ["set00_V000_I00002.txt", "set00_V000_I00008.txt", "set00_V001_I00005.txt"])
    with pytest.raises(DataError, match=r"I00008\.txt: the frame before it, set00/V000/I00005, has no file"):
        list(read_corrected_annotations(tmp_path / "annotations_new", ["set00"], 3))
    faults: list[DataError] = []
    frames = list(read_corrected_annotations(tmp_path / "annotations_new", ["set00"], 3, faults.append))
    assert [frame.index for frame in frames] == [2, 8, 5] and "set00/V001/I00002" in str(faults[1])


def test_unknown_labels_and_faulty_records_are_reported(tmp_path: Path, write_vbb: Write) -> None:
    boxes = [record(1, (1, 1, 10, 20)), record(2, (1, 1, -1, 1)), record(2, (1, 1, 10, 20))]
    write_vbb(tmp_path / "annotations" / "set00" / "V000.vbb", [boxes], ["dog", "person"])
    picture(tmp_path, "set00/V000/I00000.jpg")
    faults: list[DataError] = []
    samples = read_caltech(tmp_path, "set00", frame_step=1, on_error=faults.append)
    assert samples[0].ground_truth.labels == ("person",)
    assert "frame 0: object 2" in str(faults[0]) and "set00/V000/I00000: label 'dog' is none of" in str(faults[1])
    write_vbb(tmp_path / "annotations" / "set00" / "V000.vbb", [boxes[:1]], ["dog"])
    with pytest.raises(DataError, match="label 'dog'"):
        read_caltech(tmp_path, "set00", frame_step=1)


def test_sets_by_name_and_range() -> None:
    assert parse_sets("set06") == ["set06"]
    assert parse_sets("set00-set05") == [f"set0{number}" for number in range(6)]
    for wrong in ("", "set11", "set05-set00", "set00-", "-set01", "set00-set05-set06", "train", "0-5"):
        with pytest.raises(UsageError, match="no sets of Caltech"):
            parse_sets(wrong)


def test_a_yaml_opens_it(tmp_path: Path, write_vbb: Write) -> None:
    old_set(tmp_path, write_vbb)
    new_set(tmp_path, ["set06_V000_I00029.txt"])
    for name in ("set00/V000/I00003", "set06/V000/I00029"):
        picture(tmp_path, f"{name}.jpg")
    data = tmp_path / "data.yaml"
    data.write_text("format: caltech\ntrain: set00\nframe_step: 4\n")
    assert [sample.image_id for sample in load_dataset(str(data), "train")] == ["set00/V000/I00003"]
    data.write_text("format: caltech\nval: set06\nannotations: corrected\nskip_missing: true\n")
    assert [sample.image_id for sample in load_dataset(str(data), "val")] == ["set06/V000/I00029"]
    for line, message in (
        ("annotations: newer", "annotations: 'newer' is none of original, corrected"),
        ("annotations: 3", "must be original or corrected"),
        ("frame_step: 0", "frame_step: 0 must be 1 or more"),
        ("frame_step: often", "must be a whole number"),
        ("names: [person]\ncategory: x", "unknown key 'category'"),
    ):
        data.write_text(f"format: caltech\ntrain: set00\n{line}\n")
        with pytest.raises(UsageError, match=message):
            load_dataset(str(data), "train")
