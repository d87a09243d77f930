"""COCO JSON: valid and invalid files."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.datasets.coco import read_coco
from hkd_det.errors import DataError, HkdError

INRIA = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "inria"


def make_content(**changes: Any) -> dict[str, Any]:
    complete: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 80}, {"id": 8, "file_name": "b.jpg"}],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 40]},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [80, 50, 40, 40], "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5]},
        ],
    }
    return {**complete, **changes}


def write_json(folder: Path, value: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(value))
    return path


def make_annotations(**changes: Any) -> list[dict[str, Any]]:
    return [{"id": 5, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], **changes}]


def test_crowds_are_ignored_and_boxes_clipped(tmp_path: Path) -> None:
    first, second = read_coco(write_json(tmp_path, make_content()), tmp_path / "images")
    assert first.path == tmp_path / "images" / "a.jpg" and first.size_hw == (80, 100) and second.size_hw is None
    np.testing.assert_array_equal(first.ground_truth.boxes_xyxy, [[10, 20, 40, 60], [80, 50, 100, 80]])
    assert first.ground_truth.ignore.tolist() == [False, True] and len(second.ground_truth) == 0


def test_visible_boxes_and_ignore_flags_are_kept(tmp_path: Path) -> None:
    ignored = make_annotations(bbox=[10, 20, 30, 40], vis_bbox=[10, 20, 30, 20], ignore=1)
    value = make_content(annotations=ignored + make_annotations())
    gt = read_coco(write_json(tmp_path, value), tmp_path)[0].ground_truth
    assert gt.visible_ratio.tolist() == [0.5, 1] and gt.ignore.tolist() == [True, False]


def test_full_box_with_visible_box_is_not_clipped(tmp_path: Path) -> None:
    both = make_annotations(bbox=[80, 20, 40, 40], vis_bbox=[80, 20, 20, 40]) + make_annotations(bbox=[90, 0, 20, 10])
    gt = read_coco(write_json(tmp_path, make_content(annotations=both)), tmp_path)[0].ground_truth
    np.testing.assert_array_equal(gt.boxes_xyxy, [[80, 20, 120, 60], [90, 0, 100, 10]])
    np.testing.assert_array_equal(gt.visible_xyxy, [[80, 20, 100, 60], [90, 0, 100, 10]])
    assert gt.visible_ratio.tolist() == [0.5, 1]


def test_box_without_area_is_an_ignore_region(tmp_path: Path) -> None:
    value = make_content(annotations=make_annotations(bbox=[10, 20, 0, 40]) + make_annotations())
    assert read_coco(write_json(tmp_path, value), tmp_path)[0].ground_truth.ignore.tolist() == [True, False]


def test_person_category_is_selected(tmp_path: Path) -> None:
    large = make_content(categories=[{"id": 1, "name": "Person"}, {"id": 2, "name": "car"}])
    assert len(read_coco(write_json(tmp_path, large), tmp_path)[0].ground_truth) == 2
    only = make_content(categories=[{"id": 9, "name": "worker"}], annotations=make_annotations(category_id=9))
    assert len(read_coco(write_json(tmp_path, only), tmp_path)[0].ground_truth) == 1
    two = make_content(categories=[{"id": 1, "name": "worker"}, {"id": 2, "name": "car"}])
    with pytest.raises(DataError, match="worker, car"):
        read_coco(write_json(tmp_path, two), tmp_path)
    assert len(read_coco(write_json(tmp_path, two), tmp_path, "worker")[0].ground_truth) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected a COCO file"),
        ({"images": []}, "expected a COCO file"),
        (make_content(images=[]), "images: expected at least one image"),
        (make_content(images=[{"id": 1}]), "file_name"),
        (make_content(images=[{"id": 7, "file_name": "a"}, {"id": 7, "file_name": "b"}]), "duplicate image id 7"),
        (make_content(images=[{"id": [7], "file_name": "a"}]), "image id: expected a number or a string"),
        (make_content(categories={}), "categories"),
        (make_content(annotations=make_annotations(image_id=99)), "99"),
        (make_content(annotations=[{"id": 5, "image_id": 7}]), "annotation 5"),
        (make_content(annotations=make_annotations(bbox=[1, 2, 3])), "annotation 5"),
        (make_content(annotations=make_annotations(bbox=[1, 2, float("nan"), 4])), "annotation 5"),
        (make_content(annotations=make_annotations(bbox=[1, 2, -3, 4])), "annotation 5"),
        (make_content(annotations=make_annotations(bbox=[1, 2, "3", 4])), "annotation 5"),
        (make_content(annotations=make_annotations(bbox=[1, 2, True, 4])), "annotation 5"),
        (make_content(annotations=make_annotations(bbox=[1, 2, 10**400, 4])), "annotation 5"),
        (make_content(annotations=make_annotations(bbox=[1e39, 2, 3, 4])), "annotation 5"),
        (make_content(annotations=make_annotations(category_id=77)), "category_id 77 is not in the file"),
        (make_content(annotations=make_annotations(category_id=[1])), "is not in the file"),
        (make_content(annotations=make_annotations(bbox=[200, 2, 3, 4])), "expected a box inside its image"),
        (
            make_content(annotations=make_annotations(bbox=[200, 2, 3, 4], vis_bbox=[200, 2, 3, 4])),
            "expected a box inside its image",
        ),
        (
            make_content(images=[{"id": 7, "file_name": "a", "width": 0, "height": 5}]),
            "expected a width and height of at least 1",
        ),
        (
            make_content(images=[{"id": 7, "file_name": "a", "width": 9, "height": None}]),
            "expected a width and height of at least 1",
        ),
    ],
)
def test_invalid_content_names_file_and_record(tmp_path: Path, value: Any, message: str) -> None:
    path = write_json(tmp_path, value)
    with pytest.raises(DataError, match=message) as caught:
        read_coco(path, tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_invalid_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    path.write_text('{"images": [\n oops')
    with pytest.raises(DataError, match="line 2"):
        read_coco(path, tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_coco(tmp_path / "none.json", tmp_path)
    for text, message in (("[" * 100_000, "nested too deeply"), ("1" * 5000, "not JSON"), ("\udcff", "not JSON")):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(DataError, match=message):
            read_coco(path, tmp_path)
    with pytest.raises(DataError, match="got a directory"):
        read_coco(tmp_path, tmp_path)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.sampled_from([10**400, -(10**400), 640.0])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "bbox", "name"]), inner),
    max_leaves=6,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(["images", "categories", "annotations"]),
    st.integers(0, 2),
    st.sampled_from(["id", "image_id", "bbox", "category_id", "file_name", "name", "width", "height", "vis_bbox", ""]),
    VALUES,
)
def test_mutated_content_raises_only_hkd_errors(
    tmp_path_factory: pytest.TempPathFactory, part: str, index: int, key: str, value: Any
) -> None:
    damaged = make_content()
    entry = damaged[part][index % len(damaged[part])]
    if key:
        entry[key] = value
    else:
        damaged[part][index % len(damaged[part])] = value
    path = write_json(tmp_path_factory.mktemp("coco"), damaged)
    try:
        read_coco(path, path.parent)
    except HkdError as error:
        assert str(path) in str(error)


@pytest.mark.skipif(not INRIA.is_dir(), reason="HKD_TEST_DATA is not set")
def test_inria_person_counts() -> None:
    training, test = (read_coco(INRIA / f"{split}.json", INRIA) for split in ("train", "test"))
    assert (len(training), len(test)) == (614, 288)
    assert (sum(len(s.ground_truth) for s in training), sum(len(s.ground_truth) for s in test)) == (1240, 597)
    assert all(sample.path.is_file() for sample in test)
