"""Boxes of COCO records: substitutes of a missing bbox, rotation, flags, repetitions, and other forms."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from pycocotools import mask as coco_mask

from hkd_det.datasets.base import DatasetError
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.coco import read_coco
from hkd_det.datasets.image_files import find_form_error
from hkd_det.errors import DataError

POLYGON = [[10, 20, 40, 20, 40, 60, 10, 60]]
MASK = np.zeros((80, 100), np.uint8, order="F")
MASK[20:60, 10:40] = 1


def write_coco(root: Path, records: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a file with one image of 100 x 80 pixels."""
    cv2.imwrite(str(root / "a.png"), np.zeros((80, 100, 3), np.uint8))
    annotations = [{"id": number, "image_id": 1, "category_id": 1, **record} for number, record in enumerate(records)]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": annotations,
    }
    (root / "a.json").write_text(json.dumps({**content, **changes}))
    return root / "a.json"


def read(path: Path) -> tuple[list[list[float]], list[bool], dict[str, DatasetError]]:
    """Return boxes and ignore flags of the image, and the problems by kind."""
    errors: list[DataError] = []
    (sample,) = read_coco(path, path.parent, "", errors.append)
    problems = {error.kind: error for error in errors if isinstance(error, DatasetError)}
    return sample.ground_truth.boxes_xyxy.astype(float).round(2).tolist(), sample.ground_truth.ignore.tolist(), problems


def run_length(mask: np.ndarray[Any, Any]) -> list[int]:
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *changes, len(flat)]).tolist()


@pytest.mark.parametrize(
    "record",
    [
        {"bbox": [0, 0, 0, 0], "segmentation": POLYGON},
        {"bbox": None, "segmentation": POLYGON},
        {"segmentation": [[10, 20, 20, 20, 20, 60], [30, 20, 40, 20, 40, 50]]},
        {"bbox": [10, 20, 0, 40], "segmentation": POLYGON[0]},
        {"segmentation": {"size": [80, 100], "counts": run_length(MASK)}},
        {"segmentation": {"size": [80, 100], "counts": coco_mask.encode(MASK)["counts"].decode()}},
    ],
)
def test_segmentation_replaces_a_missing_box(tmp_path: Path, record: dict[str, Any]) -> None:
    assert read(write_coco(tmp_path, [record])) == ([[10, 20, 40, 60]], [False], {})


@pytest.mark.parametrize("record", [{"bbox": [0, 0, 0, 0]}, {"bbox": [5, 5, 0, 0], "segmentation": []}, {"bbox": None}])
def test_box_without_extent_is_an_error(tmp_path: Path, record: dict[str, Any]) -> None:
    path = write_coco(tmp_path, [record, {"bbox": [1, 2, 30, 40]}])
    with pytest.raises(DataError, match=r"a\.json, line 1, column \d+: annotation 0: the bbox .* has no extent"):
        read_coco(path, tmp_path)


@pytest.mark.parametrize(
    ("rotation", "box"),
    [(90.0, [40, 20, 60, 60]), (270, [40, 20, 60, 60]), ("45", [28.79, 18.79, 71.21, 61.21]), (0, [30, 30, 70, 50])],
)
def test_rotated_box_is_bounded(tmp_path: Path, rotation: Any, box: list[float]) -> None:
    record = {"bbox": [30, 30, 40, 20], "attributes": {"rotation": rotation, "occluded": False}}
    assert read(write_coco(tmp_path, [record])) == ([box], [False], {})


def test_rotation_that_is_not_a_number_is_an_error(tmp_path: Path) -> None:
    record = {"bbox": [30, 30, 40, 20], "attributes": {"rotation": "left"}}
    with pytest.raises(DataError, match="rotation: expected an angle in degrees, got 'left'"):
        read_coco(write_coco(tmp_path, [record]), tmp_path)


def test_flags_are_read_as_text(tmp_path: Path) -> None:
    flags = ["0", "1", 0.0, True, None, "false", "true", ""]
    records = [{"bbox": [10 * number, 5, 8, 20], "iscrowd": flag} for number, flag in enumerate(flags)]
    expected = [False, True, False, True, False, False, True, False]
    assert read(write_coco(tmp_path, records))[1] == expected
    with pytest.raises(DataError, match="annotation 0: iscrowd: expected 0 or 1, got 'maybe'"):
        read_coco(write_coco(tmp_path, [{"bbox": [1, 2, 3, 4], "iscrowd": "maybe"}]), tmp_path)


@pytest.mark.parametrize("flag", [{"iscrowd": 1}, {"ignore": "1"}])
def test_crowds_only_are_an_error(tmp_path: Path, flag: dict[str, Any]) -> None:
    path = write_coco(tmp_path, [{"bbox": [1, 2, 30, 40], **flag}, {"bbox": [40, 2, 30, 40], **flag}])
    _, ignore, problems = read(path)
    assert ignore == [True, True] and problems["all_iscrowd"].count == 2 and problems["all_iscrowd"].is_error
    with pytest.raises(DataError, match="all 2 records of persons have iscrowd"):
        read_coco(path, tmp_path)


@pytest.mark.parametrize(
    ("boxes", "kind"),
    [
        ([[10, 20, 30, 60], [50, 10, 70, 70]], "boxes_xyxy"),  # beyond the image as xywh
        ([[1, 2, 21, 32], [5, 5, 25, 35], [8, 2, 20, 20]], "boxes_xyxy"),  # by their areas
        ([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.1, 0.2]], "boxes_normalized"),
        ([[50, 30, 100, 60], [150, 30, 50, 100], [20, 70, 20, 60]], "boxes_beyond_image"),  # of a larger image
    ],
)
def test_boxes_of_another_form_are_an_error(tmp_path: Path, boxes: list[list[float]], kind: str) -> None:
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in boxes]
    records = [{"bbox": box, "area": area} for box, area in zip(boxes, areas, strict=True)]
    path = write_coco(tmp_path, records, images=[{"id": 1, "file_name": "a.png"}])
    problem = read(path)[2][kind]
    assert problem.is_error and problem.file == str(path)


@pytest.mark.parametrize(
    ("image_hw", "num_boxes", "is_error"), [((480, 640), 12, True), ((480, 640), 3, False), ((200, 200), 12, False)]
)
def test_boxes_in_percent_are_an_error(image_hw: tuple[int, int], num_boxes: int, is_error: bool) -> None:
    rng = np.random.default_rng(0)
    records = [{"bbox": [*rng.uniform(0, 60, 2), *rng.uniform(5, 40, 2)]} for _ in range(num_boxes)]
    error = find_form_error(records, [image_hw] * num_boxes, "a.json")
    assert (error is not None and error.kind == "boxes_normalized" and "percentages" in str(error)) == is_error


def test_valid_boxes_have_no_form_error(tmp_path: Path) -> None:
    boxes = [[2, 3, 30, 40], [0, 0, 100, 80], [60, 30, 39, 50], [1, 1, 9, 20]]
    records = [{"bbox": box, "area": 0.7 * box[2] * box[3]} for box in boxes]
    assert read(write_coco(tmp_path, records))[2] == {}


def test_repeated_boxes_are_used_once_for_training(tmp_path: Path) -> None:
    write_coco(tmp_path, [{"bbox": [1, 2, 30, 40]}, {"bbox": [1.0, 2, 30, 40]}, {"bbox": [1, 2, 30, 41]}])
    split = {"images": ".", "annotations": "a.json"}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"format": "coco", "train": split, "val": split}))
    counts, problems = [], []
    for name in ("train", "val"):
        errors: list[DataError] = []
        counts.append(len(load_dataset(str(tmp_path / "data.yaml"), name, errors.append)[0].ground_truth))
        problems += [(error.kind, error.count, error.is_error) for error in errors if isinstance(error, DatasetError)]
    assert counts == [2, 3] and problems == [("repeated_box", 1, False)] * 2


def test_records_of_one_image_are_merged(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "./a.png"}, {"id": 3, "file_name": ".\\a.png"}]
    records = [
        {"bbox": [1, 2, 30, 40]},
        {"bbox": [40, 2, 30, 40], "image_id": 2},
        {"bbox": [1, 2, 30, 40], "image_id": 3},
    ]
    boxes, _, problems = read(write_coco(tmp_path, records, images=images))
    assert boxes == [[1, 2, 31, 42], [40, 2, 70, 42]] and problems["repeated_image"].count == 2


def test_root_category_of_roboflow_is_left_out(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "person", "supercategory": "none"},
        {"id": 1, "name": "worker", "supercategory": "person"},
    ]
    boxes, _, problems = read(write_coco(tmp_path, [{"bbox": [1, 2, 30, 40]}], categories=categories))
    assert len(boxes) == 1 and problems == {}


@pytest.mark.parametrize("stated_hw", [(160, 200), (100, 80)])
def test_stated_size_of_another_image_is_an_error(tmp_path: Path, stated_hw: tuple[int, int]) -> None:
    image = {"id": 1, "file_name": "a.png", "width": stated_hw[1], "height": stated_hw[0]}
    write_coco(tmp_path, [{"bbox": [1, 2, 30, 40]}], images=[image])
    split = {"images": ".", "annotations": "a.json"}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"format": "coco", "train": split}))
    with pytest.raises(DataError, match=rf"a\.png: expected {stated_hw[1]} x {stated_hw[0]} pixels .* got 100 x 80"):
        load_dataset(str(tmp_path / "data.yaml"), "train")
