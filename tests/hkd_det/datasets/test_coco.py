"""COCO JSON: what is read, and what is refused with the file's and the record's name."""

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


def content(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 80}, {"id": 8, "file_name": "b.jpg"}],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 40]},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [80, 50, 40, 40], "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5]},
        ],
    }
    return {**whole, **changes}


def written(folder: Path, value: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(value))
    return path


def annotation(**changes: Any) -> list[dict[str, Any]]:
    return [{"id": 5, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], **changes}]


def test_people_are_read_crowds_ignored_boxes_cut_at_the_border(tmp_path: Path) -> None:
    first, second = read_coco(written(tmp_path, content()), tmp_path / "pictures")
    assert first.path == tmp_path / "pictures" / "a.jpg" and first.size_hw == (80, 100) and second.size_hw is None
    np.testing.assert_array_equal(first.ground_truth.boxes_xyxy, [[10, 20, 40, 60], [80, 50, 100, 80]])
    assert first.ground_truth.ignore.tolist() == [False, True] and len(second.ground_truth) == 0


def test_visible_boxes_and_ignore_flags_are_kept(tmp_path: Path) -> None:
    value = content(annotations=annotation(bbox=[10, 20, 30, 40], vis_bbox=[10, 20, 30, 20], ignore=1))
    truth = read_coco(written(tmp_path, value), tmp_path)[0].ground_truth
    assert truth.visible_ratio.tolist() == [0.5] and truth.ignore.tolist() == [True]


def test_with_a_visible_box_the_whole_one_may_reach_beyond_the_picture(tmp_path: Path) -> None:
    """And it alone: another person in the same picture is cut as ever."""
    both = annotation(bbox=[80, 20, 40, 40], vis_bbox=[80, 20, 20, 40]) + annotation(bbox=[90, 0, 20, 10])
    truth = read_coco(written(tmp_path, content(annotations=both)), tmp_path)[0].ground_truth
    np.testing.assert_array_equal(truth.boxes_xyxy, [[80, 20, 120, 60], [90, 0, 100, 10]])
    np.testing.assert_array_equal(truth.visible_xyxy, [[80, 20, 100, 60], [90, 0, 100, 10]])
    assert truth.visible_ratio.tolist() == [0.5, 1]


def test_a_box_without_area_is_kept_and_ignored(tmp_path: Path) -> None:
    """COCO has a few: there is nobody to find, and no reason to refuse the file."""
    value = content(annotations=annotation(bbox=[10, 20, 0, 40]) + annotation())
    assert read_coco(written(tmp_path, value), tmp_path)[0].ground_truth.ignore.tolist() == [True, False]


def test_the_person_category_by_name_or_alone_or_as_asked(tmp_path: Path) -> None:
    large = content(categories=[{"id": 1, "name": "Person"}, {"id": 2, "name": "car"}])
    assert len(read_coco(written(tmp_path, large), tmp_path)[0].ground_truth) == 2
    only = content(categories=[{"id": 9, "name": "worker"}], annotations=annotation(category_id=9))
    assert len(read_coco(written(tmp_path, only), tmp_path)[0].ground_truth) == 1
    two = content(categories=[{"id": 1, "name": "worker"}, {"id": 2, "name": "car"}])
    with pytest.raises(DataError, match="worker, car"):
        read_coco(written(tmp_path, two), tmp_path)
    assert len(read_coco(written(tmp_path, two), tmp_path, "worker")[0].ground_truth) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "not a COCO file"),
        ({"images": []}, "not a COCO file"),
        (content(images=[]), "no pictures"),
        (content(images=[{"id": 1}]), "file_name"),
        (content(images=[{"id": 7, "file_name": "a"}, {"id": 7, "file_name": "b"}]), "stands twice"),
        (content(images=[{"id": [7], "file_name": "a"}]), "neither a number nor a text"),
        (content(categories={}), "categories"),
        (content(annotations=annotation(image_id=99)), "99"),
        (content(annotations=[{"id": 5, "image_id": 7}]), "annotation 5"),
        (content(annotations=annotation(bbox=[1, 2, 3])), "annotation 5"),
        (content(annotations=annotation(bbox=[1, 2, float("nan"), 4])), "annotation 5"),
        (content(annotations=annotation(bbox=[1, 2, -3, 4])), "annotation 5"),
        (content(annotations=annotation(bbox=[1, 2, "3", 4])), "annotation 5"),
        (content(annotations=annotation(bbox=[1, 2, True, 4])), "annotation 5"),
        (content(annotations=annotation(bbox=[1, 2, 10**400, 4])), "annotation 5"),
        (content(annotations=annotation(bbox=[1e39, 2, 3, 4])), "annotation 5"),
        (content(annotations=annotation(category_id=77)), "category_id 77 is not listed"),
        (content(annotations=annotation(category_id=[1])), "is not listed"),
        (content(annotations=annotation(bbox=[200, 2, 3, 4])), "outside its picture"),
        (content(annotations=annotation(bbox=[200, 2, 3, 4], vis_bbox=[200, 2, 3, 4])), "outside its picture"),
        (content(images=[{"id": 7, "file_name": "a", "width": 0, "height": 5}]), "whole numbers of pixels"),
        (content(images=[{"id": 7, "file_name": "a", "width": 9, "height": None}]), "whole numbers of pixels"),
    ],
)
def test_faults_name_file_and_record(tmp_path: Path, value: Any, message: str) -> None:
    path = written(tmp_path, value)
    with pytest.raises(DataError, match=message) as caught:
        read_coco(path, tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_json_names_the_line(tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match="a folder"):
        read_coco(tmp_path, tmp_path)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.sampled_from([10**400, -(10**400), 640.0])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "bbox", "name"]), inner),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(["images", "categories", "annotations"]),
    st.integers(0, 2),
    st.sampled_from(["id", "image_id", "bbox", "category_id", "file_name", "name", "width", "height", "vis_bbox", ""]),
    junk,
)
def test_any_mutation_raises_nothing_but_our_errors(
    tmp_path_factory: pytest.TempPathFactory, part: str, index: int, key: str, value: Any
) -> None:
    spoiled = content()
    entry = spoiled[part][index % len(spoiled[part])]
    if key:
        entry[key] = value
    else:
        spoiled[part][index % len(spoiled[part])] = value
    path = written(tmp_path_factory.mktemp("coco"), spoiled)
    try:
        read_coco(path, path.parent)
    except HkdError as error:
        assert str(path) in str(error)


@pytest.mark.skipif(not INRIA.is_dir(), reason="HKD_TEST_DATA is not set")
def test_inria_person_in_full() -> None:
    training, test = (read_coco(INRIA / f"{split}.json", INRIA) for split in ("train", "test"))
    assert (len(training), len(test)) == (614, 288)
    assert (sum(len(s.ground_truth) for s in training), sum(len(s.ground_truth) for s in test)) == (1240, 597)
    assert all(sample.path.is_file() for sample in test)
