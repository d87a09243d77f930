"""Caltech Pedestrian: official counts, both annotation formats, image locations and errors."""

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
    read_vbb,
)
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, UsageError

OFFICIAL = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "caltech"
official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="HKD_TEST_DATA is not set")
Write = Callable[..., None]
HEADER = "% bbGt version=3\n"


def record(number: int, pos: Any, posv: Any = (0, 0, 0, 0), occl: int = 0) -> dict[str, Any]:
    return {"id": number, "pos": np.array([pos], float), "occl": occl, "lock": 0, "posv": np.array([posv])}


def make_image(root: Path, name: str) -> Path:
    path = root / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@official
@pytest.mark.slow
def test_official_frames_are_every_30th() -> None:
    frames = list(read_original_annotations(OFFICIAL / "annotations", ["set00", "set06"], 30))
    lengths = {  # nFrame of the ten videos
        **{"set00/V000": 1845, "set00/V001": 1844, "set00/V002": 1322, "set00/V003": 568, "set00/V004": 2133},
        **{"set06/V000": 1842, "set06/V001": 1842, "set06/V002": 1775, "set06/V003": 1775, "set06/V004": 1841},
    }
    expected = [f"{video}/I{index:05}" for video, count in lengths.items() for index in range(29, count, 30)]
    assert [frame.name for frame in frames] == expected
    assert len(list(read_original_annotations(OFFICIAL / "annotations", ["set00"], 3))) == sum(
        count // 3 for video, count in lengths.items() if video < "set01"
    )


@official
def test_frame_and_pixel_indices_match_the_official_gt() -> None:
    # The corrected ground truth contains rounded original boxes where they are ignored. Other frames differ.
    gt = scipy.io.loadmat(OFFICIAL / "gt-All.mat")["gt"]
    assert gt.shape == (1, 4024)
    videos = [read_vbb(path) for path in sorted((OFFICIAL / "annotations" / "set06").glob("*.vbb"))]
    frames = [(video, index) for video in videos for index in range(29, len(video), 30)]
    num_equal = {-1: 0, 0: 0, 1: 0}
    for shift in num_equal:
        for (video, index), rows in zip(frames, gt[0], strict=False):
            original = (
                np.floor(video[index + shift].boxes_xywh + 0.5) if index + shift < len(video) else np.zeros((0, 4))
            )
            corrected = rows.reshape(-1, 5)
            num_equal[shift] += sum((original == box).all(axis=1).any() for box in corrected[corrected[:, 4] == 1, :4])
    assert num_equal[0] > 50 and num_equal[0] > 2 * max(num_equal[-1], num_equal[1])


@official
@pytest.mark.slow
def test_official_labels_become_persons_or_ignore(tmp_path: Path) -> None:
    (tmp_path / "annotations").symlink_to(OFFICIAL / "annotations")
    frames = list(read_original_annotations(OFFICIAL / "annotations", ["set06"], 30))
    for frame in frames:
        make_image(tmp_path, f"{frame.name}.jpg")
    samples = read_caltech(tmp_path, "set06", frame_step=7)  # a test set always uses 30
    assert [sample.image_id for sample in samples] == [frame.name for frame in frames]
    raw_counts = Counter(label for frame in frames for label in frame.annotations.labels)
    counts = Counter(label for sample in samples for label in sample.ground_truth.labels)
    assert raw_counts["person-fa"] > 0
    assert counts == {name: count for name, count in raw_counts.items() if name != "person-fa"}
    assert sum(int((~sample.ground_truth.ignore).sum()) for sample in samples) == raw_counts["person"]
    assert all(
        ((s.ground_truth.visible_ratio >= 0) & (s.ground_truth.visible_ratio <= 1 + 1e-9)).all() for s in samples
    )


def write_original(root: Path, write_vbb: Write) -> None:
    """Write two videos of four frames: a visible person, a half occluded one, and one object of each other label."""
    objects = [
        record(1, (1, 1, 10, 20)),
        record(1, (11, 21, 10, 20), (11, 21, 10, 10), 1),
        *(record(number, (5, 5, 4, 8)) for number in range(2, 6)),
        record(1, (5, 5, 0, 8)),
    ]
    labels = ["person", "people", "person?", "ignore", "person-fa"]
    for name in ("set00/V000", "set01/V003"):
        write_vbb(root / "annotations" / f"{name}.vbb", [[], objects, [], objects[:1]], labels)


def test_original_boxes_become_0_based(tmp_path: Path, write_vbb: Write) -> None:
    write_original(tmp_path, write_vbb)
    for video in ("set00/V000", "set01/V003"):
        for index in (1, 3):
            make_image(tmp_path, f"{video}/I{index:05}.jpg")
    samples = read_caltech(tmp_path, "set00-set01", frame_step=2)
    assert [s.image_id for s in samples] == [f"{f}/I0000{i}" for f in ("set00/V000", "set01/V003") for i in (1, 3)]
    assert samples[0].path == tmp_path / "images" / "set00" / "V000" / "I00001.jpg"
    gt = samples[0].ground_truth
    assert gt.labels == ("person", "person", "people", "person?", "ignore", "person")
    assert gt.ignore.tolist() == [False, False, True, True, True, True]  # the last has no area
    assert gt.boxes_xyxy[:2].tolist() == [[0, 0, 10, 20], [10, 20, 20, 40]]
    assert gt.visible_xyxy[:2].tolist() == [[0, 0, 10, 20], [10, 20, 20, 30]]
    assert gt.visible_ratio[:2].tolist() == [1.0, 0.5]
    assert len(samples[1].ground_truth) == 1


def write_corrected(root: Path, names: list[str], text: str = "person 11 21 10 20 1 11 21 10 10 0 0\n") -> None:
    for name in names:
        path = root / "annotations_new" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + text)


@pytest.mark.parametrize(
    ("files", "images"),
    [
        ("anno_test_1xnew/set06_V000_I{:05}.jpg.txt", "set06_V000_I{:05}.jpg"),
        ("set06_V000_I{:05}.txt", "set06/V000/I{:05}.png"),
        ("set06/V000/I{:05}.txt", "set06/V000/I{:05}.jpg"),
        ("new/set06/V000/I{:05}.jpg.txt", "set06_V000_I{:05}.png"),
    ],
)
def test_corrected_files_and_images_at_all_locations(tmp_path: Path, files: str, images: str) -> None:
    write_corrected(tmp_path, [files.format(index) for index in (59, 29, 30)])
    write_corrected(tmp_path, ["readme.txt", "set07_V000_I00029.txt"], "none")
    paths = [make_image(tmp_path, images.format(index)) for index in (29, 59)]
    samples = read_caltech(tmp_path, "set06", CORRECTED)
    assert [s.image_id for s in samples] == ["set06/V000/I00029", "set06/V000/I00059"]
    assert [s.path for s in samples] == paths
    assert samples[0].ground_truth.boxes_xyxy.tolist() == [[10, 20, 20, 40]]
    assert samples[0].ground_truth.visible_xyxy.tolist() == [[10, 20, 20, 30]]


def test_corrected_flags_set_visibility_and_ignore(tmp_path: Path) -> None:
    lines = [
        "person 1 1 10 20 0 1 1 10 5 0 0",  # not occluded: the visible box has no effect
        "person 1 1 10 20 1 0 0 0 0 0 0",  # occluded, visible box not annotated
        "person 1 1 10 20 0 0 0 0 0 1 0",
        "person-fa 1 1 10 20 0 0 0 0 0 0 0",
    ]
    write_corrected(tmp_path, ["set06_V000_I00029.txt"], "\n".join(lines))
    make_image(tmp_path, "set06/V000/I00029.jpg")
    gt = read_caltech(tmp_path, "set06", CORRECTED)[0].ground_truth
    assert gt.visible_ratio.tolist() == [1, 1, 1] and gt.ignore.tolist() == [False, False, True]


def test_missing_or_duplicate_files_are_rejected(tmp_path: Path, write_vbb: Write) -> None:
    with pytest.raises(DataError, match=r"set06: expected files V\*\.vbb, got none"):
        read_caltech(tmp_path, "set06")
    with pytest.raises(DataError, match=r"annotations_new: expected a text file of every 30th frame of set06"):
        read_caltech(tmp_path, "set06", CORRECTED)
    write_original(tmp_path, write_vbb)
    with pytest.raises(DataError, match=r"4 of 4 images are missing, the first is .*set00/V000/I00001\.jpg"):
        read_caltech(tmp_path, "set00-set01", frame_step=2)
    one = make_image(tmp_path, "set01/V003/I00003.jpg")
    assert [s.path for s in read_caltech(tmp_path, "set00-set01", frame_step=2, skip_missing=True)] == [one]
    write_corrected(tmp_path, ["a/set06_V000_I00029.jpg.txt", "b/set06_V000_I00029.txt"])
    with pytest.raises(DataError, match="the same frame as"):
        read_caltech(tmp_path, "set06", CORRECTED)


def test_missing_corrected_frame_is_reported(tmp_path: Path) -> None:
    write_corrected(tmp_path, ["set00_V000_I00002.txt", "set00_V000_I00008.txt", "set00_V001_I00005.txt"])
    with pytest.raises(DataError, match=r"I00008\.txt: the frame before it, set00/V000/I00005, has no file"):
        list(read_corrected_annotations(tmp_path / "annotations_new", ["set00"], 3))
    errors: list[DataError] = []
    frames = list(read_corrected_annotations(tmp_path / "annotations_new", ["set00"], 3, errors.append))
    assert [frame.index for frame in frames] == [2, 8, 5] and "set00/V001/I00002" in str(errors[1])


def test_unknown_label_and_invalid_box_are_reported(tmp_path: Path, write_vbb: Write) -> None:
    boxes = [record(1, (1, 1, 10, 20)), record(2, (1, 1, -1, 1)), record(2, (1, 1, 10, 20))]
    write_vbb(tmp_path / "annotations" / "set00" / "V000.vbb", [boxes], ["dog", "person"])
    make_image(tmp_path, "set00/V000/I00000.jpg")
    errors: list[DataError] = []
    samples = read_caltech(tmp_path, "set00", frame_step=1, on_error=errors.append)
    assert samples[0].ground_truth.labels == ("person",)
    assert "frame 0: object 2" in str(errors[0]) and "got 'dog'" in str(errors[1])
    write_vbb(tmp_path / "annotations" / "set00" / "V000.vbb", [boxes[:1]], ["dog"])
    with pytest.raises(DataError, match=r"set00/V000/I00000: label: .*got 'dog'"):
        read_caltech(tmp_path, "set00", frame_step=1)


def test_parse_sets_by_name_and_range() -> None:
    assert parse_sets("set06") == ["set06"]
    assert parse_sets("set00-set05") == [f"set0{number}" for number in range(6)]
    for invalid in ("", "set11", "set05-set00", "set00-", "-set01", "set00-set05-set06", "train", "0-5"):
        with pytest.raises(UsageError, match="expected a set or a range of sets"):
            parse_sets(invalid)


def test_data_yaml_with_caltech_options(tmp_path: Path, write_vbb: Write) -> None:
    write_original(tmp_path, write_vbb)
    write_corrected(tmp_path, ["set06_V000_I00029.txt"])
    for name in ("set00/V000/I00003", "set06/V000/I00029"):
        make_image(tmp_path, f"{name}.jpg")
    data = tmp_path / "data.yaml"
    data.write_text("format: caltech\ntrain: set00\nframe_step: 4\n")
    assert [sample.image_id for sample in load_dataset(str(data), "train")] == ["set00/V000/I00003"]
    data.write_text("format: caltech\nval: set06\nannotations: corrected\nskip_missing: true\n")
    assert [sample.image_id for sample in load_dataset(str(data), "val")] == ["set06/V000/I00029"]
    for line, message in (
        ("annotations: newer", "annotations: expected original or corrected, got 'newer'"),
        ("annotations: 3", "annotations: expected original or corrected, got 3"),
        ("frame_step: 0", "frame_step: expected at least 1, got 0"),
        ("frame_step: often", "frame_step: expected an integer, got 'often'"),
        ("names: [person]\ncategory: x", "unknown key 'category'"),
    ):
        data.write_text(f"format: caltech\ntrain: set00\n{line}\n")
        with pytest.raises(UsageError, match=message):
            load_dataset(str(data), "train")
