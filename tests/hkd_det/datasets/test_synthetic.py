"""Tests of the synthetic data: determinism, CityPersons form, correct annotations."""

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
from hkd_det.datasets.synthetic.person import HEAD_TOP_OFFSET, paint_person, sample_person, walking_pose
from hkd_det.datasets.synthetic.renderer import Canvas
from hkd_det.datasets.synthetic.scene import PEDESTRIAN
from hkd_det.errors import DataError, UsageError

OFFICIAL = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "citypersons" / "anno_val.mat"
SMALL = (128, 256)


@pytest.fixture(scope="module")
def scenes() -> list[RenderedScene]:
    return [generate_scene(0, 0, index) for index in range(40)]


def list_visibility(scene: RenderedScene) -> list[tuple[int, float, int]]:
    """Return label, visible ratio and height of every annotation."""
    return [
        (r.label, r.visible_xywh[2] * r.visible_xywh[3] / max(1, r.box_xywh[2] * r.box_xywh[3]), r.box_xywh[3])
        for r in scene.records
    ]


def test_scenes_contain_every_label(scenes: list[RenderedScene]) -> None:
    labels = Counter(record.label for scene in scenes for record in scene.records)
    assert set(labels) == {0, 1, 2, 3, 4, 5} and labels[PEDESTRIAN] > 6 * len(scenes)


def test_persons_are_near_and_far(scenes: list[RenderedScene]) -> None:
    heights = [
        height
        for scene in scenes
        for label, ratio, height in list_visibility(scene)
        if label == PEDESTRIAN and ratio >= 0.65
    ]
    assert np.mean(np.array(heights) >= 50) * len(heights) / len(scenes) > 4
    assert min(heights) < 35 and max(heights) > 220


def test_some_persons_are_occluded(scenes: list[RenderedScene]) -> None:
    ratios = [ratio for scene in scenes for label, ratio, _ in list_visibility(scene) if label == PEDESTRIAN]
    assert sum(ratio == 1 for ratio in ratios) > 0.25 * len(ratios) and sum(ratio < 0.65 for ratio in ratios) > 20


def test_boxes_contain_visible_boxes(scenes: list[RenderedScene]) -> None:
    for scene in scenes:
        for record in scene.records:
            x, y, width, height = record.box_xywh
            vx, vy, vwidth, vheight = record.visible_xywh
            assert width > 0 and height > 0
            assert x <= vx and y <= vy and vx + vwidth <= x + width and vy + vheight <= y + height
            if record.label in (1, 2, 3, 4):
                assert abs(width - 0.41 * height) <= 1.5


def test_box_encloses_the_drawn_person() -> None:
    """On an empty canvas, the top and the bottom of the box differ from the pixels by at most 2 %."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        canvas = Canvas((400, 400), (0, 0, 0))
        canvas.object_id = 1
        person = sample_person(rng)
        joints = walking_pose(person)
        paint_person(canvas, person, joints, (200, 350), 300)
        extent = canvas.compute_extent_xyxy(1)
        assert extent is not None
        head_top_px = 350 - 300 * (joints.head[1] + HEAD_TOP_OFFSET)
        assert abs(extent[1] - head_top_px) < 4 and abs(extent[3] - 350) < 6 and 50 <= head_top_px < 70


def test_canvas_extent_excludes_occluded_pixels() -> None:
    canvas = Canvas((100, 100), (0, 0, 0))
    canvas.object_id = 1
    canvas.draw_polygon([(10, 10), (50, 10), (50, 90), (10, 90)], (255, 0, 0))
    canvas.object_id = 2
    canvas.draw_polygon([(30, 0), (100, 0), (100, 100), (30, 100)], (0, 255, 0))
    extent = canvas.compute_extent_xyxy(1)
    assert extent is not None and extent.tolist() == [10, 10, 30, 91]
    assert canvas.image[50, 20].tolist() == [255, 0, 0] and canvas.image[50, 40].tolist() == [0, 255, 0]


def test_generate_scene_depends_only_on_arguments() -> None:
    one, same, other = generate_scene(3, 1, 5, SMALL), generate_scene(3, 1, 5, SMALL), generate_scene(4, 1, 5, SMALL)
    np.testing.assert_array_equal(one.image, same.image)
    assert one.records == same.records and (one.image != other.image).any()
    assert one.image.shape == (*SMALL, 3) and one.image.dtype == np.uint8


@pytest.mark.slow
def test_dataset_is_independent_of_worker_count(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path / "one", 3, 2, seed=1, size_hw=SMALL, num_workers=1)
    write_synthetic_dataset(tmp_path / "two", 3, 2, seed=1, size_hw=SMALL, num_workers=2)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 5 * 2 + 2 + 1
    for file in files:
        if file.suffix != ".mat":  # a .mat contains the time of its creation
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.slow
def test_dataset_contains_the_generated_scenes(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, 3, 2, seed=1, size_hw=SMALL, num_workers=1)
    samples = read_citypersons(tmp_path, "train")
    assert len(samples) == 3
    for index, sample in enumerate(samples):
        scene = generate_scene(1, 0, index, SMALL)
        np.testing.assert_array_equal(read_image(sample.path), scene.image)
        assert len(sample.ground_truth) == len(scene.records)
    (tmp_path / "annotations" / "anno_train.mat").unlink()
    for from_mat, from_json in zip(samples, read_citypersons(tmp_path, "train"), strict=True):
        np.testing.assert_array_equal(from_mat.ground_truth.boxes_xyxy, from_json.ground_truth.boxes_xyxy)
        assert from_mat.ground_truth.labels == from_json.ground_truth.labels


@pytest.mark.skipif(not OFFICIAL.exists(), reason="HKD_TEST_DATA is not set")
def test_mat_has_the_form_of_the_official_file(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, 0, 2, size_hw=SMALL, num_workers=1)
    written = scipy.io.loadmat(tmp_path / "annotations" / "anno_val.mat")["anno_val_aligned"]
    official = scipy.io.loadmat(OFFICIAL)["anno_val_aligned"]
    assert written.shape == (1, 2) and written.dtype == official.dtype
    one, other = written[0, 0], official[0, 0]
    assert one.dtype == other.dtype and one.shape == other.shape
    for name in one.dtype.names:
        assert one[0, 0][name].dtype.kind == other[0, 0][name].dtype.kind
        assert one[0, 0][name].ndim == other[0, 0][name].ndim


def test_existing_dataset_is_kept(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path, 1, 1, size_hw=SMALL, num_workers=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_synthetic_dataset(tmp_path, 1, 1, size_hw=SMALL, num_workers=1)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="another dataset"):
        write_synthetic_dataset(tmp_path, 1, 1, seed=9, size_hw=SMALL, num_workers=1)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not readable"):
        write_synthetic_dataset(tmp_path, 1, 1, size_hw=SMALL, num_workers=1)


def test_interrupted_dataset_is_completed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = writer.generate_scene

    def interrupt(seed: int, split: int, index: int, size_hw: tuple[int, int]) -> RenderedScene:
        if index == 2:
            raise KeyboardInterrupt
        return generate(seed, split, index, size_hw)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "generate_scene", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_synthetic_dataset(tmp_path, 4, 1, size_hw=SMALL, num_workers=1)
    assert not (tmp_path / "dataset.json").exists()
    write_synthetic_dataset(tmp_path, 4, 1, size_hw=SMALL, num_workers=1)
    assert json.loads((tmp_path / "dataset.json").read_text())["num_train"] == 4
    assert len(read_citypersons(tmp_path, "train")) == 4


def test_persons_move_in_the_video(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", num_frames=5, size_hw=SMALL)
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1].astype(int))
    capture.release()
    assert len(frames) == 5 and frames[0].shape == (*SMALL, 3)
    assert all(np.abs(a - b).max() > 60 for a, b in pairwise(frames))
