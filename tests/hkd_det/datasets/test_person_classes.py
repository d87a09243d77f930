"""Roles of classes: persons, ignore regions, unused."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from hkd_det.datasets.base import DatasetError
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.person_classes import assign_class_roles
from hkd_det.errors import DataError


@pytest.mark.parametrize(
    ("names", "persons"),
    [
        (["pedestrian", "people", "bicycle"], {0, 1}),
        (["Person", "car", "person"], {0, 2}),
        (["man", "Woman", "child", "dog"], {0, 1, 2}),
        ([" PEDESTRIANS ", "rider"], {0}),
        (["worker"], {0}),
    ],
)
def test_standard_names_are_persons(names: list[str], persons: set[int]) -> None:
    assert assign_class_roles(dict(enumerate(names)), "", "", "x").persons == persons


def test_selected_names_replace_standard_names() -> None:
    names = {0: "worker", 1: "Visitor", 2: "mannequin", 3: "person"}
    roles = assign_class_roles(names, ["worker", "visitor"], "mannequin", "x")
    assert (roles.persons, roles.ignored) == ({0, 1}, {2})


@pytest.mark.parametrize(
    ("category", "ignore_category", "message"),
    [
        ("", "", "expected a class such as person, .* got worker, car. Set `category"),
        (["worker", "visiter"], "", "class 'visiter' of `category`, got worker, car"),
        ("worker", ["van"], "class 'van' of `ignore_category`, got worker, car"),
        ("worker", "worker", "worker: in `category` and in `ignore_category`"),
    ],
)
def test_unknown_name_lists_the_names(category: Any, ignore_category: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        assign_class_roles({0: "worker", 1: "car"}, category, ignore_category, "x")


CLASSES = ["Pedestrian", "person", "mannequin", "car"]  # one box of each, two of the last


def write_yolo(root: Path) -> dict[str, Any]:
    (root / "labels").mkdir()
    rows = [f"{index} 0.{index + 2} 0.5 0.1 0.5" for index in (0, 1, 2, 3)] + ["3 0.8 0.5 0.1 0.5"]
    (root / "labels" / "a.txt").write_text("\n".join(rows))
    return {"train": "images", "names": CLASSES}


def write_coco(root: Path) -> dict[str, Any]:
    records = [
        {"id": number, "image_id": 1, "category_id": index, "bbox": [10 * number, 5, 8, 20]}
        for number, index in enumerate((0, 1, 2, 3, 3))
    ]
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES)]
    images = [{"id": 1, "file_name": "a.png"}]
    (root / "a.json").write_text(json.dumps({"images": images, "annotations": records, "categories": categories}))
    return {"format": "coco", "train": {"images": "images", "annotations": "a.json"}}


def write_voc(root: Path) -> dict[str, Any]:
    (root / "Annotations").mkdir()
    objects = "".join(
        f"<object><name>{CLASSES[index]}</name><bndbox><xmin>{10 * number + 1}</xmin><ymin>5</ymin>"
        f"<xmax>{10 * number + 8}</xmax><ymax>30</ymax></bndbox></object>"
        for number, index in enumerate((0, 1, 2, 3, 3))
    )
    (root / "Annotations" / "a.xml").write_text(f"<annotation>{objects}</annotation>")
    return {"format": "voc", "train": "train"}


@pytest.mark.parametrize("write", [write_yolo, write_coco, write_voc])
def test_readers_agree(tmp_path: Path, write: Any) -> None:
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((60, 100, 3), np.uint8))
    content = {**write(tmp_path), "ignore_category": "Mannequin"}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    problems: list[DataError] = []
    (sample,) = load_dataset(str(tmp_path / "data.yaml"), "train", problems.append)
    assert sample.ground_truth.ignore.tolist() == [False, False, True]
    (unused,) = problems
    assert isinstance(unused, DatasetError) and (unused.class_name, unused.count) == ("car", 2)


def test_unused_classes_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((60, 100, 3), np.uint8))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(write_yolo(tmp_path)))
    load_dataset(str(tmp_path / "data.yaml"), "train")
    assert [record.getMessage() for record in caplog.records] == [
        "unused classes: car 2, mannequin 1. Set `category` to train on them."
    ]
