"""CityPersons: the official files, equality of both formats, and invalid files."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets.citypersons import _read_mat_samples, read_citypersons
from hkd_det.datasets.synthetic.scene import AnnotationRecord
from hkd_det.datasets.synthetic.writer import ImageAnnotations, write_citypersons_json, write_citypersons_mat
from hkd_det.errors import DataError, HkdError

OFFICIAL = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set")) / "citypersons"
official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="HKD_TEST_DATA is not set")
RECORDS = [
    AnnotationRecord(1, 24000, (10, 20, 41, 100), (10, 20, 41, 80)),
    AnnotationRecord(5, 24001, (-5, 0, 30, 60), (0, 0, 25, 60)),
]


def write_dataset(root: Path, num_images: int = 2) -> None:
    """Write images of one city with annotations as .mat and as JSON."""
    annotated = []
    for index in range(num_images):
        stem = f"ulm_{index:06}_000019"
        path = root / "leftImg8bit" / "train" / "ulm" / f"{stem}_leftImg8bit.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((64, 128, 3), np.uint8))
        write_citypersons_json(
            root / "gtBboxCityPersons" / "train" / "ulm" / f"{stem}_gtBboxCityPersons.json", (64, 128), RECORDS
        )
        annotated.append(ImageAnnotations("ulm", stem, RECORDS))
    write_citypersons_mat(root / "annotations" / "anno_train.mat", "train", annotated)


@official
@pytest.mark.parametrize(("split", "num_images", "num_records"), [("train", 2975, 27770), ("val", 500, 5795)])
def test_all_official_records_are_kept(split: str, num_images: int, num_records: int) -> None:
    samples = _read_mat_samples(OFFICIAL / f"anno_{split}.mat", OFFICIAL)
    assert (len(samples), sum(len(sample.ground_truth) for sample in samples)) == (num_images, num_records)
    raw = scipy.io.loadmat(OFFICIAL / f"anno_{split}.mat")[f"anno_{split}_aligned"]
    numbers = Counter(int(row[0]) for i in range(num_images) for row in raw[0, i][0, 0]["bbs"])
    names = Counter(label for sample in samples for label in sample.ground_truth.labels)
    order = ("ignore", "pedestrian", "rider", "sitting person", "other person", "people group")
    assert names == {order[number]: count for number, count in numbers.items()}
    assert sum(int((~sample.ground_truth.ignore).sum()) for sample in samples) == numbers[1]


@official
def test_official_mat_equals_official_json() -> None:
    content = json.loads((OFFICIAL / "val_gt.json").read_text())
    samples = _read_mat_samples(OFFICIAL / "anno_val.mat", OFFICIAL)
    expected: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for record in content["annotations"]:
        expected[record["image_id"]].append(record)
    for image, sample in zip(content["images"], samples, strict=True):
        records = expected[image["id"]]
        assert image["im_name"] == sample.path.name and len(records) == len(sample.ground_truth)
        boxes = np.array([r["bbox"] for r in records], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(sample.ground_truth.boxes_xyxy, boxes)
        np.testing.assert_allclose(sample.ground_truth.visible_ratio, [r["vis_ratio"] for r in records], atol=1e-12)
        np.testing.assert_array_equal(sample.ground_truth.ignore, [bool(r["ignore"]) for r in records])


@official
def test_official_images_exist_or_are_missing() -> None:
    samples = read_citypersons(OFFICIAL, "train", True) + read_citypersons(OFFICIAL, "val", True)
    assert len(samples) == 5 and all(sample.path.is_file() for sample in samples)
    with pytest.raises(DataError, match=r"2973 of 2975 images are missing, the first is .*png.*skip_missing"):
        read_citypersons(OFFICIAL, "train")


def test_mat_equals_json(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    from_mat = read_citypersons(tmp_path, "train")
    (tmp_path / "annotations" / "anno_train.mat").unlink()
    from_json = read_citypersons(tmp_path, "train")
    assert (
        [s.image_id for s in from_mat] == [s.image_id for s in from_json] == ["ulm_000000_000019", "ulm_000001_000019"]
    )
    for sample, json_sample in zip(from_mat, from_json, strict=True):
        gt, json_gt = sample.ground_truth, json_sample.ground_truth
        assert sample.path == json_sample.path
        assert gt.labels == json_gt.labels == ("pedestrian", "people group")
        np.testing.assert_array_equal(gt.boxes_xyxy, json_gt.boxes_xyxy)
        np.testing.assert_array_equal(gt.boxes_xyxy, [[10, 20, 51, 120], [-5, 0, 25, 60]])
        np.testing.assert_array_equal(gt.visible_xyxy, json_gt.visible_xyxy)
        assert gt.ignore.tolist() == [False, True] and gt.visible_ratio[0] == 0.8


def save_mat(path: Path, content: dict[str, Any]) -> None:
    scipy.io.savemat(path, content)


def test_invalid_mat_is_rejected(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "annotations" / "anno_train.mat"
    complete = path.read_bytes()
    cell = np.empty((1, 1), object)
    struct = np.empty((1, 1), [("cityname", "O"), ("im_name", "O"), ("bbs", "O")])
    struct[0, 0] = ("ulm", "ulm_000000_000019_leftImg8bit.png", np.zeros((3, 5)))
    cell[0, 0] = struct
    cases: list[tuple[Any, str]] = [
        (lambda: path.write_bytes(complete[: len(complete) // 2]), "expected a readable MATLAB file"),
        (lambda: path.write_text("not a mat file"), "expected a readable MATLAB file"),
        (lambda: save_mat(path, {"x": np.zeros((2, 2))}), "expected one cell array"),
        (lambda: save_mat(path, {"a": cell, "b": cell}), "expected one cell array"),
        (lambda: save_mat(path, {"anno_train_aligned": cell}), r"got \(3, 5\)"),
    ]
    for damage, message in cases:
        damage()
        with pytest.raises(DataError, match=message) as caught:
            read_citypersons(tmp_path, "train")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "dog"}, "dog"),
        ({"bbox": [0, 0, float("nan"), 5]}, "expected four pixel coordinates"),
        ({"bbox": [0, 0, -3, 5]}, "expected a box with a width"),
        ({"bbox": [0, 0, 1e39, 5]}, "record 1"),
        ({"bbox": [0, 0, 10**400, 5]}, "record 1: expected a record"),
        ({"bbox": [0, 0, 3]}, "record 1: expected a record"),
        ({"bboxVis": None}, "record 1: expected a record"),
    ],
)
def test_invalid_json_record_names_its_location(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_dataset(tmp_path)
    (tmp_path / "annotations" / "anno_train.mat").unlink()
    path = next((tmp_path / "gtBboxCityPersons").rglob("*.json"))
    content = json.loads(path.read_text())
    content["objects"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_citypersons(tmp_path, "train")
    assert f"{path.name}, line 1, column " in str(caught.value)
    errors: list[DataError] = []
    assert len(read_citypersons(tmp_path, "train", on_error=errors.append)) == 2 and len(errors) == 1


def test_missing_images_and_annotations_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leftImg8bit/val"):
        read_citypersons(tmp_path, "val")
    write_dataset(tmp_path)
    missing = tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_000001_000019_leftImg8bit.png"
    missing.unlink()
    with pytest.raises(DataError, match="ulm_000001_000019"):
        read_citypersons(tmp_path, "train")
    assert [s.image_id for s in read_citypersons(tmp_path, "train", skip_missing=True)] == ["ulm_000000_000019"]
    next((tmp_path / "leftImg8bit").rglob("*.png")).unlink()
    with pytest.raises(DataError, match=r"2 of 2 images are missing, the first is .*000000_000019_leftImg8bit\.png"):
        read_citypersons(tmp_path, "train", skip_missing=True)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"imgHeight": Infinity, "imgWidth": 1, "objects": []}', "{"])
def test_other_json_is_rejected(tmp_path: Path, text: str) -> None:
    write_dataset(tmp_path)
    (tmp_path / "annotations" / "anno_train.mat").unlink()
    path = next((tmp_path / "gtBboxCityPersons").rglob("*.json"))
    path.write_text(text)
    with pytest.raises(DataError, match=path.name) as caught:
        read_citypersons(tmp_path, "train")
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_mat_raises_only_hkd_errors(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / "annotations").exists():
        write_dataset(tmp_path)
    source = tmp_path / "annotations" / "anno_train.mat"
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged" / "anno_train.mat"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(bytes(raw))
    try:
        _read_mat_samples(damaged, tmp_path)
    except HkdError as error:
        assert str(damaged) in str(error)
