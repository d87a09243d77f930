"""datasets.yaml and data yaml files of the user."""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets import catalog
from hkd_det.datasets.audit_report import plan_audited_files
from hkd_det.datasets.catalog import find_coco_source, list_coco_files, load_dataset
from hkd_det.datasets.data_yaml import CATALOG_KEYS, find_catalog_file
from hkd_det.errors import DataError, HkdError, UnavailableError, UsageError

COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": [{"id": 1, "name": "person"}]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write the image images/train/a.jpg with YOLO labels and coco.json."""
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "images/train/a.jpg"), np.zeros((60, 100, 3), np.uint8))
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0.2 0.5\n")
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    return tmp_path


def write_data_yaml(root: Path, **content: Any) -> str:
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return str(root / "data.yaml")


def test_data_yaml_of_the_user(root: Path) -> None:
    data = write_data_yaml(root, path=".", train="images/train", names=["person", "dog"])
    (sample,) = load_dataset(data, "train")
    assert sample.path.is_file() and len(sample.ground_truth) == 1
    for other in ("test", "path", "trian"):
        with pytest.raises(UsageError, match=f"no split '{other}'. Expected one of train"):
            load_dataset(data, other)
    data = write_data_yaml(root, path=str(root / "images"), train="train", names={0: "person"})
    assert len(load_dataset(data, "train")) == 1


COCO_SPLIT = {"images": "images/train", "annotations": "coco.json"}


def write_coco(root: Path, num_images: int) -> None:
    for index in range(num_images):
        cv2.imwrite(str(root / f"images/train/{index}.jpg"), np.zeros((60, 100, 3), np.uint8))
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 60} for n in range(num_images)]
    box = {"category_id": 1, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 0}
    annotations = [{"id": n + 1, "image_id": n, **box} for n in range(num_images)]
    (root / "coco.json").write_text(json.dumps({**COCO, "images": images, "annotations": annotations}))


@pytest.mark.parametrize(("num_images", "is_split"), [(49, False), (50, True)])
def test_annotation_file_is_that_of_a_split_unless_val_is_a_part_of_it(
    root: Path, num_images: int, is_split: bool
) -> None:
    write_coco(root, num_images)
    data = write_data_yaml(root, format="coco", train=COCO_SPLIT, test=COCO_SPLIT)
    assert (find_coco_source(data, "train") is None) == is_split and find_coco_source(data, "val") is None
    test = find_coco_source(data, "test")
    assert test is not None and test.annotations == root / "coco.json"
    assert list_coco_files(data) == [root / "coco.json"] * 2
    with pytest.raises(UsageError, match=r"contains the annotations of --data"):
        plan_audited_files(data, str(root / "coco.json"), ["train"])


def test_dataset_without_simplejpeg_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UnavailableError, match=r"^simplejpeg: not installed\. Run pip install 'hkd-det\[bench\]'\.$"):
        load_dataset(write_data_yaml(root), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": "images/train", "nams": ["person"]}, "Did you mean names"),
        ({"train": "images/train"}, "names"),
        ({"train": "images/train", "names": "person"}, "names"),
        ({"train": "images/train", "names": {"a": "person"}}, "names"),
        ({"train": 5, "names": ["person"]}, "expected a string, got 5"),
        (
            {"train": "images/train", "names": ["person"], "category": 3},
            "category: expected a name or a list of names, got 3",
        ),
        ({"train": "images/train", "names": ["person"], "path": 3}, "path: expected a directory, got 3"),
        ({"train": "images/train", "names": ["person"], "skip_missing": True}, "skip_missing' for format yolo"),
        ({"train": "images/train", "format": "tfrecord"}, "voc"),
        ({"train": "images/train", "format": ["coco"]}, "expected one of yolo, coco, citypersons"),
        ({"train": "images/train", "format": "coco"}, "annotations"),
        ({"train": {"images": "images/train"}, "format": "coco"}, "annotations"),
        ({"train": {**COCO_SPLIT, "annotations": 3}, "format": "coco"}, "expected a string, got 3"),
        ({"train": COCO_SPLIT, "format": "coco", "skip_missing": "false"}, "expected true or false"),
        ({"train": COCO_SPLIT, "format": "citypersons"}, "expected a string"),
        ({"train": "train", "format": "citypersons", "category": "person"}, "unknown key 'category'"),
    ],
)
def test_invalid_value_names_the_file(root: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_dataset(write_data_yaml(root, **content), "train")
    assert "data.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: }", "line 2"),
        ("a:\n\t- b", "line 2"),
        ("? [a]\n: b", "line 1"),
        ("- 1\n", "key: value"),
        ("", "key: value"),
        ("[" * 5000, "nested"),
        ("a: 2020-99-99", "not YAML"),
        ("\udcff", "not YAML"),
    ],
)
def test_invalid_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(str(path), "train")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_key_that_is_not_a_string_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("train: images\n5: 5\n")
    with pytest.raises(UsageError, match="unknown key 5"):
        load_dataset(str(tmp_path / "data.yaml"), "train")


def test_missing_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in ("folder.yaml", "none.yaml"):
        with pytest.raises(DataError, match=name):
            load_dataset(str(tmp_path / name), "train")


def test_names_of_datasets_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="Did you mean citypersons"):
        load_dataset("cityperson", "train")
    with pytest.raises(DataError, match=r"datasets/citypersons does not exist.*cityscapes-dataset\.com.*leftImg8bit"):
        load_dataset("citypersons", "train")
    content = yaml.safe_load(find_catalog_file().read_text())
    for name in content:
        assert CATALOG_KEYS | {"license"} <= set(catalog.load_catalog_entry(name)), name


def test_named_dataset_is_read_from_datasets_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hkd_det.datasets.synthetic.scene import AnnotationRecord
    from hkd_det.datasets.synthetic.writer import write_citypersons_json

    monkeypatch.chdir(tmp_path)
    root = Path("datasets/citypersons")
    record = [AnnotationRecord(1, 24000, (1, 2, 4, 10), (1, 2, 4, 10))]
    write_citypersons_json(root / "gtBboxCityPersons/val/ulm/u_gtBboxCityPersons.json", (64, 128), record)
    (root / "leftImg8bit/val/ulm").mkdir(parents=True)
    cv2.imwrite(str(root / "leftImg8bit/val/ulm/u_leftImg8bit.png"), np.zeros((64, 128, 3), np.uint8))
    (sample,) = load_dataset("citypersons", "val")
    assert sample.ground_truth.boxes_xyxy.tolist() == [[1, 2, 5, 12]]


def test_merged_lists_have_unique_image_ids(root: Path) -> None:
    shutil.copytree(root / "images/train", root / "images/more")
    both = [COCO_SPLIT, {**COCO_SPLIT, "images": "images/more"}]
    samples = load_dataset(write_data_yaml(root, format="coco", train=both), "train")
    assert [sample.image_id for sample in samples] == ["0/1", "1/1"]
    samples = load_dataset(write_data_yaml(root, train=["images/train", "images/more"], names=["person"]), "train")
    assert [(s.image_id, len(s.ground_truth)) for s in samples] == [("0/a.jpg", 1), ("1/a.jpg", 0)]


def test_missing_coco_images_are_rejected(root: Path) -> None:
    images = [{"id": number, "file_name": f"{name}.jpg"} for number, name in enumerate("abc")]
    (root / "coco.json").write_text(json.dumps({**COCO, "images": images}))
    with pytest.raises(DataError, match=r"2 of 3 images are missing, the first is .*b\.jpg.*skip_missing: true"):
        load_dataset(write_data_yaml(root, format="coco", train=COCO_SPLIT), "train")
    assert len(load_dataset(write_data_yaml(root, format="coco", train=COCO_SPLIT, skip_missing=True), "train")) == 1
    nowhere = {**COCO_SPLIT, "images": "nowhere"}
    with pytest.raises(DataError, match=r"3 of 3 images are missing, the first is .*nowhere/a\.jpg"):
        load_dataset(write_data_yaml(root, format="coco", train=nowhere, skip_missing=True), "train")
    with pytest.raises(DataError, match="contains no images"):
        load_dataset(write_data_yaml(root, format="coco", train=[]), "train")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["yolo", "coco", "citypersons"]),
    st.sampled_from(["path", "train", "names", "category", "skip_missing", "format", "nc", "images"]),
    VALUES,
)
def test_any_value_raises_only_hkd_errors(root: Path, format_name: str, key: str, value: Any) -> None:
    train = {"yolo": "images/train", "coco": dict(COCO_SPLIT), "citypersons": "train"}[format_name]
    content: dict[str, Any] = {"format": format_name, "train": train, "names": ["person"]}
    if key == "images" and format_name == "coco":
        content["train"][key] = value
    else:
        content[key] = value
    with contextlib.suppress(HkdError):
        assert load_dataset(write_data_yaml(root, **content), "train")
