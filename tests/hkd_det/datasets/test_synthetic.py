"""The synthetic street: the same for everybody, in CityPersons' own form, with a truth that holds."""

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io

from hkd_det.datasets import read_image
from hkd_det.datasets.citypersons import read_citypersons
from hkd_det.datasets.synthetic import RenderedScene, generate_scene, write_synthetic_dataset, write_video, writer
from hkd_det.datasets.synthetic.renderer import Canvas
from hkd_det.datasets.synthetic.scene import PEDESTRIAN
from hkd_det.errors import DataError, UsageError

OFFICIAL = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "citypersons" / "anno_val.mat"
SMALL = (128, 256)


@pytest.fixture(scope="module")
def streets() -> list[RenderedScene]:
    return [generate_scene(0, 0, index) for index in range(40)]


def visibility(street: RenderedScene) -> list[tuple[int, float, int]]:
    """(label, share of the box that can be seen, height) of every record."""
    return [
        (r.label, r.visible_xywh[2] * r.visible_xywh[3] / max(1, r.box_xywh[2] * r.box_xywh[3]), r.box_xywh[3])
        for r in street.records
    ]


def test_every_label_occurs_and_people_are_many(streets: list[RenderedScene]) -> None:
    labels = Counter(record.label for street in streets for record in street.records)
    assert set(labels) == {0, 1, 2, 3, 4, 5} and labels[PEDESTRIAN] > 6 * len(streets)


def test_people_are_near_and_far(streets: list[RenderedScene]) -> None:
    seen = [height for s in streets for label, share, height in visibility(s) if label == PEDESTRIAN and share >= 0.65]
    assert np.mean(np.array(seen) >= 50) * len(seen) / len(streets) > 4
    assert min(seen) < 35 and max(seen) > 220


def test_some_are_hidden_in_part_and_some_not_at_all(streets: list[RenderedScene]) -> None:
    shares = [share for street in streets for label, share, _ in visibility(street) if label == PEDESTRIAN]
    assert sum(share == 1 for share in shares) > 0.25 * len(shares) and sum(share < 0.65 for share in shares) > 20


def test_boxes_have_the_aspect_and_hold_what_is_visible(streets: list[RenderedScene]) -> None:
    for street in streets:
        for record in street.records:
            x, y, width, height = record.box_xywh
            vx, vy, vwidth, vheight = record.visible_xywh
            assert width > 0 and height > 0
            assert x <= vx and y <= vy and vx + vwidth <= x + width and vy + vheight <= y + height
            if record.label in (1, 2, 3, 4):
                assert abs(width - 0.41 * height) <= 1.5


def test_a_box_encloses_the_painted_person() -> None:
    """Somebody alone on an empty canvas: crown and sole are where the box says, to two per cent."""
    from hkd_det.datasets.synthetic import person as figure
    from hkd_det.datasets.synthetic.person import sample_person, walking_pose

    chance = np.random.default_rng(0)
    for _ in range(30):
        canvas = Canvas((400, 400), (0, 0, 0))
        canvas.object_id = 1
        person = sample_person(chance)
        joints = walking_pose(person)
        figure.paint_person(canvas, person, joints, (200, 350), 300)
        extent = canvas.compute_extent_xyxy(1)
        assert extent is not None
        crown_px = 350 - 300 * (joints.head[1] + figure.HEAD_TOP_OFFSET)
        assert abs(extent[1] - crown_px) < 4 and abs(extent[3] - 350) < 6 and 50 <= crown_px < 70


def test_a_person_behind_another_is_seen_less() -> None:
    canvas = Canvas((100, 100), (0, 0, 0))
    canvas.object_id = 1
    canvas.draw_polygon([(10, 10), (50, 10), (50, 90), (10, 90)], (255, 0, 0))
    canvas.object_id = 2
    canvas.draw_polygon([(30, 0), (100, 0), (100, 100), (30, 100)], (0, 255, 0))
    extent = canvas.compute_extent_xyxy(1)
    assert extent is not None and extent.tolist() == [10, 10, 30, 91]
    assert canvas.image[50, 20].tolist() == [255, 0, 0] and canvas.image[50, 40].tolist() == [0, 255, 0]


def test_the_same_seed_gives_the_same_street_and_another_another() -> None:
    one, same, other = generate_scene(3, 1, 5, SMALL), generate_scene(3, 1, 5, SMALL), generate_scene(4, 1, 5, SMALL)
    np.testing.assert_array_equal(one.image, same.image)
    assert one.records == same.records and (one.image != other.image).any()
    assert one.image.shape == (*SMALL, 3) and one.image.dtype == np.uint8


def test_the_set_does_not_depend_on_the_workers_and_is_read_as_citypersons(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path / "one", 3, 2, seed=1, size_hw=SMALL, num_workers=1)
    write_synthetic_dataset(tmp_path / "two", 3, 2, seed=1, size_hw=SMALL, num_workers=2)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 5 * 2 + 2 + 1
    for file in files:
        if file.suffix != ".mat":  # a .mat holds the time it was written
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    samples = read_citypersons(tmp_path / "one", "train")
    for index, sample in enumerate(samples):
        street = generate_scene(1, 0, index, SMALL)
        np.testing.assert_array_equal(read_image(sample.path), street.image)
        assert len(sample.ground_truth) == len(street.records)
    (tmp_path / "one" / "annotations" / "anno_train.mat").unlink()
    for from_mat, from_json in zip(samples, read_citypersons(tmp_path / "one", "train"), strict=True):
        np.testing.assert_array_equal(from_mat.ground_truth.boxes_xyxy, from_json.ground_truth.boxes_xyxy)
        assert from_mat.ground_truth.labels == from_json.ground_truth.labels


@pytest.mark.skipif(not OFFICIAL.exists(), reason="HKD_TEST_DATA is not set")
def test_the_mat_is_nested_as_the_official_one(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, 0, 2, size_hw=SMALL, num_workers=1)
    ours = scipy.io.loadmat(tmp_path / "annotations" / "anno_val.mat")["anno_val_aligned"]
    theirs = scipy.io.loadmat(OFFICIAL)["anno_val_aligned"]
    assert ours.shape == (1, 2) and ours.dtype == theirs.dtype
    one, other = ours[0, 0], theirs[0, 0]
    assert one.dtype == other.dtype and one.shape == other.shape
    for name in one.dtype.names:
        assert one[0, 0][name].dtype.kind == other[0, 0][name].dtype.kind
        assert one[0, 0][name].ndim == other[0, 0][name].ndim


def test_a_finished_set_is_left_alone_and_another_refused(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, 1, 1, size_hw=SMALL, num_workers=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_synthetic_dataset(tmp_path, 1, 1, size_hw=SMALL, num_workers=1)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="another street"):
        write_synthetic_dataset(tmp_path, 1, 1, seed=9, size_hw=SMALL, num_workers=1)
    (tmp_path / "street.json").write_text("{")
    with pytest.raises(DataError, match="not readable"):
        write_synthetic_dataset(tmp_path, 1, 1, size_hw=SMALL, num_workers=1)


def test_an_interrupted_set_is_not_marked_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = writer.generate_scene

    def interrupted(seed: int, split: int, index: int, size_hw: tuple[int, int]) -> RenderedScene:
        if index == 2:
            raise KeyboardInterrupt
        return drawn(seed, split, index, size_hw)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "draw_street", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_synthetic_dataset(tmp_path, 4, 1, size_hw=SMALL, num_workers=1)
    assert not (tmp_path / "street.json").exists()
    write_synthetic_dataset(tmp_path, 4, 1, size_hw=SMALL, num_workers=1)
    assert json.loads((tmp_path / "street.json").read_text())["train"] == 4
    assert len(read_citypersons(tmp_path, "train")) == 4


def test_people_move_in_the_film(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", num_frames=5, size_hw=SMALL)
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1].astype(int))
    capture.release()
    assert len(frames) == 5 and frames[0].shape == (*SMALL, 3)
    assert all(np.abs(a - b).max() > 60 for a, b in pairwise(frames))
