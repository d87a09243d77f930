"""The yaml that names any data set: what is read, and what is refused with its name."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets import catalog as catalogue
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, HkdError, UsageError

COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": [{"id": 1, "name": "person"}]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One picture, images/train/a.jpg, with its labels in YOLO form and, as coco.json, in COCO's."""
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "images/train/a.jpg"), np.zeros((60, 100, 3), np.uint8))
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0.2 0.5\n")
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    return tmp_path


def data_yaml(root: Path, **content: Any) -> str:
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return str(root / "data.yaml")


def test_the_users_own_yaml(root: Path) -> None:
    data = data_yaml(root, path=".", train="images/train", names=["person", "dog"])
    (sample,) = load_dataset(data, "train")
    assert sample.path.is_file() and len(sample.ground_truth) == 1
    for other in ("val", "path", "trian"):
        with pytest.raises(UsageError, match=f"no split '{other}', only train"):
            load_dataset(data, other)
    assert (
        len(load_dataset(data_yaml(root, path=str(root / "images"), train="train", names={0: "person"}), "train")) == 1
    )


COCO_SPLIT = {"images": "images/train", "annotations": "coco.json"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": "images/train", "nams": ["person"]}, "did you mean 'names'"),
        ({"train": "images/train"}, "names"),
        ({"train": "images/train", "names": "person"}, "names"),
        ({"train": "images/train", "names": {"0": "person"}}, "names"),
        ({"train": 5, "names": ["person"]}, "5 must be a text"),
        ({"train": "images/train", "names": ["person"], "category": 3}, "category: 3 must be a name"),
        ({"train": "images/train", "names": ["person"], "path": None}, "path: None must be a folder"),
        ({"train": "images/train", "names": ["person"], "skip_missing": True}, "skip_missing' for format yolo"),
        ({"train": "images/train", "format": "tfrecord"}, "voc"),
        ({"train": "images/train", "format": ["coco"]}, "none of yolo, coco, citypersons"),
        ({"train": "images/train", "format": "coco"}, "annotations"),
        ({"train": {"images": "images/train"}, "format": "coco"}, "annotations"),
        ({"train": {**COCO_SPLIT, "annotations": 3}, "format": "coco"}, "3 must be a text"),
        ({"train": COCO_SPLIT, "format": "coco", "skip_missing": "false"}, "must be true or false"),
        ({"train": COCO_SPLIT, "format": "citypersons"}, "must be a text"),
        ({"train": "train", "format": "citypersons", "category": "person"}, "unknown key 'category'"),
    ],
)
def test_a_yaml_that_says_something_else_is_refused(root: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_dataset(data_yaml(root, **content), "train")
    assert "data.yaml" in str(caught.value) and "\n" not in str(caught.value)


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
def test_what_is_no_data_yaml_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(str(path), "train")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("train: images\n5: 5\n")
    with pytest.raises(UsageError, match="unknown key 5"):
        load_dataset(str(tmp_path / "data.yaml"), "train")


def test_a_yaml_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in ("folder.yaml", "none.yaml"):
        with pytest.raises(DataError, match=name):
            load_dataset(str(tmp_path / name), "train")


def test_names_of_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'citypersons'"):
        load_dataset("cityperson", "train")
    with pytest.raises(DataError, match=r"datasets/citypersons is not there.*cityscapes-dataset\.com.*leftImg8bit"):
        load_dataset("citypersons", "train")
    content = yaml.safe_load(catalogue.find_catalog_file().read_text())
    for entry in content.values():
        keys = catalogue.COMMON_KEYS | catalogue.FORMAT_KEYS[entry["format"]] | catalogue.CATALOG_KEYS
        assert catalogue.CATALOG_KEYS | {"license"} <= set(entry) <= keys


def test_a_name_is_looked_for_under_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hkd_det.datasets.synthetic.scene import AnnotationRecord
    from hkd_det.datasets.synthetic.writer import write_citypersons_json

    monkeypatch.chdir(tmp_path)
    home = Path("datasets/citypersons")
    record = [AnnotationRecord(1, 24000, (1, 2, 4, 10), (1, 2, 4, 10))]
    write_citypersons_json(home / "gtBboxCityPersons/val/ulm/u_gtBboxCityPersons.json", (64, 128), record)
    (home / "leftImg8bit/val/ulm").mkdir(parents=True)
    cv2.imwrite(str(home / "leftImg8bit/val/ulm/u_leftImg8bit.png"), np.zeros((64, 128, 3), np.uint8))
    (sample,) = load_dataset("citypersons", "val")
    assert sample.ground_truth.boxes_xyxy.tolist() == [[1, 2, 5, 12]]


def test_lists_are_joined_with_ids_of_their_own(root: Path) -> None:
    shutil.copytree(root / "images/train", root / "images/more")
    both = [COCO_SPLIT, {**COCO_SPLIT, "images": "images/more"}]
    samples = load_dataset(data_yaml(root, format="coco", train=both), "train")
    assert [sample.image_id for sample in samples] == ["0/1", "1/1"]
    samples = load_dataset(data_yaml(root, train=["images/train", "images/more"], names=["person"]), "train")
    assert [(s.image_id, len(s.ground_truth)) for s in samples] == [("0/a.jpg", 1), ("1/a.jpg", 0)]


def test_coco_pictures_that_are_missing_are_told_at_once(root: Path) -> None:
    images = [{"id": number, "file_name": f"{name}.jpg"} for number, name in enumerate("abc")]
    (root / "coco.json").write_text(json.dumps({**COCO, "images": images}))
    with pytest.raises(DataError, match=r"2 of 3 pictures are missing, the first .*b\.jpg; .*skip_missing: true"):
        load_dataset(data_yaml(root, format="coco", train=COCO_SPLIT), "train")
    assert len(load_dataset(data_yaml(root, format="coco", train=COCO_SPLIT, skip_missing=True), "train")) == 1
    nowhere = {**COCO_SPLIT, "images": "nowhere"}
    with pytest.raises(DataError, match=r"3 of 3 pictures are missing, the first .*nowhere/a\.jpg"):
        load_dataset(data_yaml(root, format="coco", train=nowhere, skip_missing=True), "train")
    with pytest.raises(DataError, match="holds no pictures"):
        load_dataset(data_yaml(root, format="coco", train=[]), "train")


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["yolo", "coco", "citypersons"]),
    st.sampled_from(["path", "train", "names", "category", "skip_missing", "format", "nc", "images"]),
    junk,
)
def test_any_value_of_any_key_raises_nothing_but_our_errors(root: Path, form: str, key: str, value: Any) -> None:
    train = {"yolo": "images/train", "coco": dict(COCO_SPLIT), "citypersons": "train"}[form]
    content: dict[str, Any] = {"format": form, "train": train, "names": ["person"]}
    if key == "images" and form == "coco":
        content["train"][key] = value
    else:
        content[key] = value
    with contextlib.suppress(HkdError):
        assert load_dataset(data_yaml(root, **content), "train")
