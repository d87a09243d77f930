"""CityPersons: the official files in full, both forms alike, and every way they can be broken."""

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


def write_set(root: Path, pictures: int = 2) -> None:
    """Two pictures in one city, as .mat and as JSON."""
    annotated = []
    for index in range(pictures):
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
@pytest.mark.parametrize(("split", "pictures", "records"), [("train", 2975, 27770), ("val", 500, 5795)])
def test_every_record_of_the_official_files_is_kept(split: str, pictures: int, records: int) -> None:
    samples = _read_mat_samples(OFFICIAL / f"anno_{split}.mat", OFFICIAL)
    assert (len(samples), sum(len(sample.ground_truth) for sample in samples)) == (pictures, records)
    raw = scipy.io.loadmat(OFFICIAL / f"anno_{split}.mat")[f"anno_{split}_aligned"]
    numbers = Counter(int(row[0]) for i in range(pictures) for row in raw[0, i][0, 0]["bbs"])
    names = Counter(label for sample in samples for label in sample.ground_truth.labels)
    order = ("ignore", "pedestrian", "rider", "sitting person", "other person", "people group")
    assert names == {order[number]: count for number, count in numbers.items()}
    assert sum(int((~sample.ground_truth.ignore).sum()) for sample in samples) == numbers[1]


@official
def test_boxes_of_all_dtypes_equal_the_official_json() -> None:
    content = json.loads((OFFICIAL / "val_gt.json").read_text())
    samples = _read_mat_samples(OFFICIAL / "anno_val.mat", OFFICIAL)
    wanted: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for record in content["annotations"]:
        wanted[record["image_id"]].append(record)
    for image, sample in zip(content["images"], samples, strict=True):
        records = wanted[image["id"]]
        assert image["im_name"] == sample.path.name and len(records) == len(sample.ground_truth)
        boxes = np.array([r["bbox"] for r in records], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_array_equal(sample.ground_truth.boxes_xyxy, boxes)
        np.testing.assert_allclose(sample.ground_truth.visible_ratio, [r["vis_ratio"] for r in records], atol=1e-12)
        np.testing.assert_array_equal(sample.ground_truth.ignore, [bool(r["ignore"]) for r in records])


@official
def test_the_five_real_pictures_can_be_read() -> None:
    found = read_citypersons(OFFICIAL, "train", True) + read_citypersons(OFFICIAL, "val", True)
    assert len(found) == 5 and all(sample.path.is_file() for sample in found)
    with pytest.raises(DataError, match=r"2973 of 2975 pictures are missing, the first .*png; .*skip_missing"):
        read_citypersons(OFFICIAL, "train")


def test_mat_and_json_give_the_same(tmp_path: Path) -> None:
    write_set(tmp_path)
    from_mat = read_citypersons(tmp_path, "train")
    (tmp_path / "annotations" / "anno_train.mat").unlink()
    from_json = read_citypersons(tmp_path, "train")
    assert (
        [s.image_id for s in from_mat] == [s.image_id for s in from_json] == ["ulm_000000_000019", "ulm_000001_000019"]
    )
    for one, other in zip(from_mat, from_json, strict=True):
        assert one.path == other.path and one.ground_truth.labels == other.ground_truth.labels == (
            "pedestrian",
            "people group",
        )
        np.testing.assert_array_equal(one.ground_truth.boxes_xyxy, other.ground_truth.boxes_xyxy)
        np.testing.assert_array_equal(one.ground_truth.boxes_xyxy, [[10, 20, 51, 120], [-5, 0, 25, 60]])
        np.testing.assert_array_equal(one.ground_truth.visible_xyxy, other.ground_truth.visible_xyxy)
        assert one.ground_truth.ignore.tolist() == [False, True] and one.ground_truth.visible_ratio[0] == 0.8


def mat(path: Path, content: dict[str, Any]) -> None:
    scipy.io.savemat(path, content)


def test_a_mat_of_the_wrong_shape_is_one_clear_line(tmp_path: Path) -> None:
    write_set(tmp_path)
    path = tmp_path / "annotations" / "anno_train.mat"
    whole = path.read_bytes()
    cell = np.empty((1, 1), object)
    struct = np.empty((1, 1), [("cityname", "O"), ("im_name", "O"), ("bbs", "O")])
    struct[0, 0] = ("ulm", "ulm_000000_000019_leftImg8bit.png", np.zeros((3, 5)))
    cell[0, 0] = struct
    cases: list[tuple[Any, str]] = [
        (lambda: path.write_bytes(whole[: len(whole) // 2]), "not a readable MATLAB file"),
        (lambda: path.write_text("no mat"), "not a readable MATLAB file"),
        (lambda: mat(path, {"x": np.zeros((2, 2))}), "expected one cell array"),
        (lambda: mat(path, {"a": cell, "b": cell}), "expected one cell array"),
        (lambda: mat(path, {"anno_train_aligned": cell}), r"shape \(3, 5\)"),
    ]
    for spoil, message in cases:
        spoil()
        with pytest.raises(DataError, match=message) as caught:
            read_citypersons(tmp_path, "train")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "dog"}, "dog"),
        ({"bbox": [0, 0, float("nan"), 5]}, "NaN"),
        ({"bbox": [0, 0, -3, 5]}, "negative"),
        ({"bbox": [0, 0, 1e39, 5]}, "record 1"),
        ({"bbox": [0, 0, 10**400, 5]}, "record 1: not a record"),
        ({"bbox": [0, 0, 3]}, "record 1: not a record"),
        ({"bboxVis": None}, "record 1: not a record"),
    ],
)
def test_a_faulty_json_record_names_its_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_set(tmp_path)
    (tmp_path / "annotations" / "anno_train.mat").unlink()
    path = next((tmp_path / "gtBboxCityPersons").rglob("*.json"))
    content = json.loads(path.read_text())
    content["objects"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_citypersons(tmp_path, "train")
    assert f"{path.name}, line 1, column " in str(caught.value)
    faults: list[DataError] = []
    assert len(read_citypersons(tmp_path, "train", on_error=faults.append)) == 2 and len(faults) == 1


def test_missing_pictures_and_annotations_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leftImg8bit/val"):
        read_citypersons(tmp_path, "val")
    write_set(tmp_path)
    gone = tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_000001_000019_leftImg8bit.png"
    gone.unlink()
    with pytest.raises(DataError, match="ulm_000001_000019"):
        read_citypersons(tmp_path, "train")
    assert [s.image_id for s in read_citypersons(tmp_path, "train", skip_missing=True)] == ["ulm_000000_000019"]
    next((tmp_path / "leftImg8bit").rglob("*.png")).unlink()
    with pytest.raises(DataError, match=r"2 of 2 pictures are missing, the first .*000000_000019_leftImg8bit\.png"):
        read_citypersons(tmp_path, "train", skip_missing=True)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"imgHeight": Infinity, "imgWidth": 1, "objects": []}', "{"])
def test_another_json_in_the_tree_is_one_line(tmp_path: Path, text: str) -> None:
    write_set(tmp_path)
    (tmp_path / "annotations" / "anno_train.mat").unlink()
    path = next((tmp_path / "gtBboxCityPersons").rglob("*.json"))
    path.write_text(text)
    with pytest.raises(DataError, match=path.name) as caught:
        read_citypersons(tmp_path, "train")
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_mat_raises_nothing_but_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / "annotations").exists():
        write_set(tmp_path)
    source = tmp_path / "annotations" / "anno_train.mat"
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    spoiled = tmp_path / "spoiled" / "anno_train.mat"
    spoiled.parent.mkdir(exist_ok=True)
    spoiled.write_bytes(bytes(raw))
    try:
        _read_mat_samples(spoiled, tmp_path)
    except HkdError as error:
        assert str(spoiled) in str(error)
