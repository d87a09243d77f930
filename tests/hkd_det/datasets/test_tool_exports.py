"""Exports of labeling tools as `--data`: directories, archives, COCO files, and data YAML files of other tools."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from hkd_det.datasets import data_yaml
from hkd_det.datasets.base import DatasetError
from hkd_det.datasets.catalog import dataset_license, list_splits, load_dataset
from hkd_det.errors import DataError, HkdError, UsageError

ROW = "0 0.5 0.5 0.2 0.5\n"


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".jpg", np.zeros((60, 100, 3), np.uint8))[1].tobytes())


def write_labeled(image: Path, label: Path, rows: str = ROW) -> None:
    write_image(image)
    label.parent.mkdir(parents=True, exist_ok=True)
    label.write_text(rows)


def count(data: Path | str) -> dict[str, tuple[int, int]]:
    """Return the number of images and boxes of each split. Warnings are permitted, errors are not."""
    return {
        split: (len(samples), sum(len(sample.ground_truth) for sample in samples))
        for split in list_splits(str(data))
        for samples in [load_dataset(str(data), split)]
    }


def write_roboflow_yolo(root: Path) -> dict[str, tuple[int, int]]:
    for split, num in (("train", 3), ("valid", 2), ("test", 1)):
        for index in range(num):
            name = f"gate-{index}_jpg.rf.0a{index}"
            write_labeled(root / split / "images" / f"{name}.jpg", root / split / "labels" / f"{name}.txt")
    (root / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 1\nnames: ['Person']\n\n"
        "roboflow:\n  workspace: w\n  license: CC BY 4.0\n"
    )
    (root / "README.dataset.txt").write_text("gate > v3\n")
    return {"train": (3, 3), "val": (2, 2), "test": (1, 1)}


def write_coco_file(path: Path, names: list[str], prefix: str = "") -> None:
    content = {
        "images": [{"id": index, "file_name": f"{prefix}{name}"} for index, name in enumerate(names)],
        "annotations": [
            {"id": index, "image_id": index, "category_id": 1, "bbox": [1, 2, 30, 40]} for index in range(len(names))
        ],
        "categories": [
            {"id": 0, "name": "person", "supercategory": "none"},
            {"id": 1, "name": "pedestrian", "supercategory": "person"},
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_roboflow_coco(root: Path) -> dict[str, tuple[int, int]]:
    for split, names in (("train", ["a.jpg", "b.jpg"]), ("valid", ["c.jpg"])):
        for name in names:
            write_image(root / split / name)
        write_coco_file(root / split / "_annotations.coco.json", names)
    return {"train": (2, 2), "val": (1, 1)}


def write_cvat_coco(root: Path) -> dict[str, tuple[int, int]]:
    write_image(root / "images" / "default" / "a.jpg")
    write_coco_file(root / "annotations" / "instances_default.json", ["a.jpg"])
    return {"train": (1, 1)}


def write_coco_2017(root: Path) -> dict[str, tuple[int, int]]:
    for split in ("train2017", "val2017"):
        write_image(root / split / "a.jpg")
        write_coco_file(root / "annotations" / f"instances_{split}.json", ["a.jpg"])
    return {"train": (1, 1), "val": (1, 1)}


def write_label_studio_coco(root: Path) -> dict[str, tuple[int, int]]:
    write_image(root / "images" / "7c01-a.jpg")
    write_coco_file(root / "result.json", ["7c01-a.jpg"], "images\\")
    return {"train": (1, 1)}


def write_cvat_yolo(root: Path) -> dict[str, tuple[int, int]]:
    for index, rows in enumerate((ROW, "", ROW + "1 0.2 0.5 0.1 0.5\n")):
        name = f"frame_{index:06}"
        write_labeled(root / "obj_train_data" / f"{name}.jpg", root / "obj_train_data" / f"{name}.txt", rows)
    (root / "obj.names").write_text("person\nbicycle\n")
    (root / "obj.data").write_text(
        "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/\n"
    )
    (root / "train.txt").write_text("".join(f"data/obj_train_data/frame_{index:06}.jpg\n" for index in range(3)))
    return {"train": (3, 2)}


def write_label_studio(root: Path) -> dict[str, tuple[int, int]]:
    write_labeled(root / "images" / "7c01-a.jpg", root / "labels" / "7c01-a.txt")
    (root / "classes.txt").write_text("person\nbag\n")
    write_notes(root, ["person", "bag"])
    return {"train": (1, 1)}


def write_notes(root: Path, names: list[str]) -> None:
    categories = [{"id": index, "name": name} for index, name in enumerate(names)]
    (root / "notes.json").write_text(json.dumps({"categories": categories, "info": {"contributor": "Label Studio"}}))


def write_label_img(root: Path) -> dict[str, tuple[int, int]]:
    write_labeled(root / "a.jpg", root / "a.txt")
    (root / "classes.txt").write_text("person\n")
    return {"train": (1, 1)}


def write_yolo_splits(root: Path) -> dict[str, tuple[int, int]]:
    for split in ("train", "val"):
        write_labeled(root / "images" / split / "a.jpg", root / "labels" / split / "a.txt")
    (root / "classes.txt").write_text("person\n")
    return {"train": (1, 1), "val": (1, 1)}


VOC = (
    "<annotation><filename>{name}.jpg</filename><size><width>100</width><height>60</height></size><object><name>person"
    "</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>"
)


def write_roboflow_voc(root: Path) -> dict[str, tuple[int, int]]:
    for split in ("train", "valid"):
        write_labeled(root / split / "a.jpg", root / split / "a.xml", VOC.format(name="a"))
    return {"train": (1, 1), "val": (1, 1)}


def write_cvat_voc(root: Path) -> dict[str, tuple[int, int]]:
    for name in ("IMG 001", "cam/IMG 002"):
        write_labeled(root / "JPEGImages" / f"{name}.jpg", root / "Annotations" / f"{name}.xml", VOC.format(name=name))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "default.txt").write_text("IMG 001\ncam/IMG 002\n")
    return {"train": (2, 2)}


def write_lower_case_voc(root: Path) -> dict[str, tuple[int, int]]:
    for name in ("a", "b"):
        write_labeled(root / "images" / f"{name}.jpg", root / "annotations" / f"{name}.xml", VOC.format(name=name))
    return {"train": (2, 2)}


def write_fiftyone_coco(root: Path) -> dict[str, tuple[int, int]]:
    write_image(root / "data" / "a.jpg")
    write_coco_file(root / "labels.json", ["a.jpg"])
    return {"train": (1, 1)}


WRITERS: list[Callable[[Path], dict[str, tuple[int, int]]]] = [
    write_roboflow_yolo,
    write_roboflow_coco,
    write_roboflow_voc,
    write_cvat_coco,
    write_cvat_yolo,
    write_cvat_voc,
    write_lower_case_voc,
    write_fiftyone_coco,
    write_coco_2017,
    write_label_studio,
    write_label_studio_coco,
    write_label_img,
    write_yolo_splits,
]


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITERS)
def test_export_is_read_as_directory_and_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], dict[str, tuple[int, int]]]
) -> None:
    monkeypatch.setattr(data_yaml, "DATASETS_DIR", tmp_path / "datasets")
    root = tmp_path / "top" / "export"
    root.mkdir(parents=True)
    expected = write(root)
    (root / "._data.yaml").write_bytes(b"Mac OS X")
    assert count(root) == expected
    monkeypatch.chdir(root)
    assert count(".") == expected
    for base in (root, root.parent):
        archive = shutil.make_archive(str(tmp_path / f"{base.name}-files"), "zip", base)
        assert count(archive) == expected


def test_coco_file_is_read_directly(tmp_path: Path) -> None:
    write_roboflow_coco(tmp_path)
    assert count(tmp_path / "train" / "_annotations.coco.json") == {"train": (2, 2)}
    assert count(tmp_path / "valid" / "_annotations.coco.json") == {"val": (1, 1)}


def test_license_of_roboflow_is_used(tmp_path: Path) -> None:
    write_roboflow_yolo(tmp_path)
    assert dataset_license(str(tmp_path)) == "CC BY 4.0"


def test_unknown_layout_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for data in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DataError, match=r"Expected a data YAML, obj\.data"):
            list_splits(str(data))


def test_class_files_that_disagree_are_an_error(tmp_path: Path) -> None:
    write_label_studio(tmp_path)
    write_notes(tmp_path, ["bag", "person"])
    with pytest.raises(DataError, match=r"notes\.json: the class ids differ .* Compare classes\.txt, notes\.json"):
        load_dataset(str(tmp_path), "train")
    (tmp_path / "notes.json").unlink()
    (tmp_path / "data.yaml").write_text("train: images\nnames: [bag, person]\n")
    problems: list[DataError] = []
    load_dataset(str(tmp_path), "train", problems.append)
    (conflict,) = [error for error in problems if isinstance(error, DatasetError) and error.kind == "class_names"]
    assert conflict.is_error and conflict.file.endswith("classes.txt")


def write_data(root: Path, **content: Any) -> str:
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    return str(root / "data.yaml")


@pytest.mark.parametrize(
    "content",
    [
        {"train": "images/train", "path": None, "val": None, "channels": 3, "kpt_shape": [17, 3], "flip_idx": [0]},
        {"train": "../images/train", "download": "print(1)", "minival": None, "yaml_file": "data.yaml"},
        {"train": "/content/set-3/images/train", "author": "me", "url": "https://example.com"},
        {"train": "images/train", "path": "/home/me/datasets/set"},
        {"train": "set-3/images/train"},
        {"train": ".\\images\\train", "nc": 1},
        {"train": "D:\\set\\images\\train"},
    ],
)
def test_data_yaml_of_another_machine_is_read(tmp_path: Path, content: dict[str, Any]) -> None:
    write_labeled(tmp_path / "images" / "train" / "a.jpg", tmp_path / "labels" / "train" / "a.txt")
    assert count(write_data(tmp_path, **content, names={0: "person"})) == {"train": (1, 1)}
    assert count(write_data(tmp_path, **content, names={"0": "person"})) == {"train": (1, 1)}


def test_unknown_key_is_a_warning_and_a_misspelled_one_an_error(tmp_path: Path) -> None:
    write_labeled(tmp_path / "images" / "a.jpg", tmp_path / "labels" / "a.txt")
    problems: list[DataError] = []
    load_dataset(write_data(tmp_path, train="images", names=["person"], exported_by="x"), "train", problems.append)
    assert [(error.kind, error.is_error) for error in problems if isinstance(error, DatasetError)] == [
        ("unknown_key", False)
    ]
    with pytest.raises(UsageError, match="Did you mean category"):
        load_dataset(write_data(tmp_path, train="images", names=["person"], catagory="x"), "train")


def test_missing_test_split_is_a_warning(tmp_path: Path) -> None:
    write_roboflow_yolo(tmp_path)
    shutil.rmtree(tmp_path / "test")
    assert list_splits(str(tmp_path)) == ["train", "val"]
    problems: list[DataError] = []
    load_dataset(str(tmp_path), "train", problems.append)
    assert [error.kind for error in problems if isinstance(error, DatasetError)] == ["no_test_split"]


def test_pascal_voc_list_has_names_with_blanks(tmp_path: Path) -> None:
    write_cvat_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_text("IMG 001  1\nIMG 001.jpg\ncam\\IMG 002 -1\n")
    problems: list[DataError] = []
    (tmp_path / "data.yaml").write_text("format: voc\ntrain: train\n")
    samples = load_dataset(str(tmp_path / "data.yaml"), "train", problems.append)
    assert [sample.image_id for sample in samples] == ["IMG 001", "cam/IMG 002"]
    assert [error.kind for error in problems if isinstance(error, DatasetError)] == ["repeated_image"]


def test_pascal_voc_problems_are_reported(tmp_path: Path) -> None:
    text = VOC.format(name="a").replace("</name>", "</name><difficult>true</difficult>")
    write_labeled(tmp_path / "train" / "a.jpg", tmp_path / "train" / "a.xml", text)
    with pytest.raises(DataError, match="all 1 persons are difficult"):
        load_dataset(str(tmp_path), "train")
    (tmp_path / "train" / "a.xml").write_text(VOC.format(name="b"))
    write_image(tmp_path / "train" / "a.jpeg")
    with pytest.raises(DataError, match=r"a\.xml: annotation file of 2 images"):
        load_dataset(str(tmp_path), "train")
    (tmp_path / "train" / "a.jpeg").unlink()
    (tmp_path / "train" / "a.xml").write_text(VOC.format(name="a").replace("<width>100", "<width>200"))
    with pytest.raises(DataError, match=r"a\.jpg: expected 200 x 60 pixels as annotated, got 100 x 60"):
        load_dataset(str(tmp_path), "train")


def test_missing_val_names_the_remedy(tmp_path: Path) -> None:
    for index in range(10):
        write_labeled(tmp_path / "images" / f"{index}.jpg", tmp_path / "labels" / f"{index}.txt")
    data = write_data(tmp_path, train="images", names=["person"])
    assert list_splits(data) == ["train"] and len(load_dataset(data, "train")) == 10
    with pytest.raises(UsageError, match=r"no split 'val', and a part of 10 .* Add `val: DIR`, or `val_ratio"):
        load_dataset(data, "val")
    data = write_data(tmp_path, train="images", names=["person"], val_ratio=0.2)
    assert list_splits(data) == ["train", "val"]
    train, val = ([sample.image_id for sample in load_dataset(data, split)] for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 2) and not set(train) & set(val)
    assert [sample.image_id for sample in load_dataset(data, "val")] == val


def test_fifth_of_the_training_images_is_val_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(50):
        write_labeled(tmp_path / "images" / f"{index}.jpg", tmp_path / "labels" / f"{index}.txt")
    data = write_data(tmp_path, train="images", names=["person"])
    assert list_splits(data) == ["train", "val"]
    train, val = ([sample.image_id for sample in load_dataset(data, split)] for split in ("train", "val"))
    assert (len(train), len(val)) == (40, 10) and not set(train) & set(val)
    assert "10 of 50 training images are the split val" in caplog.text
    stated = write_data(tmp_path, train="images", names=["person"], val_ratio=0.2)
    assert [sample.image_id for sample in load_dataset(stated, "val")] == val


def test_export_without_val_can_be_split(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    write_cvat_yolo(tmp_path / "export")
    with pytest.raises(UsageError, match=r"Write a data YAML with the lines `path: .*export` and `val_ratio: 0.2`"):
        load_dataset(str(tmp_path / "export"), "val")
    data = write_data(tmp_path, path="export", val_ratio=0.3)
    assert {split: images for split, (images, _) in count(data).items()} == {"train": 2, "val": 1}


BOMBS = [
    "a: &a [x, x]\nb: &b [*a, *a]\n"
    + "".join(f"k{n}: &k{n} [*{'b' if n == 0 else f'k{n - 1}'}, *b]\n" for n in range(3)),
    "names:\n  0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"  {n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
    "a0: &a0 {x0: 1, x1: 1}\n"
    + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
    "names: &a [*a, *a]\n",
]


@pytest.mark.parametrize("text", BOMBS[1:])
def test_aliases_that_expand_without_limit_are_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.yaml").write_text(f"train: images\n{text}")
    with pytest.raises(DataError, match=r"data\.yaml: its aliases expand to more than") as caught:
        load_dataset(str(tmp_path / "data.yaml"), "train")
    assert len(str(caught.value)) < 500


def test_few_aliases_are_permitted(tmp_path: Path) -> None:
    write_labeled(tmp_path / "images" / "a.jpg", tmp_path / "labels" / "a.txt")
    (tmp_path / "data.yaml").write_text("train: &images images\nval: *images\nnames: [person]\n")
    assert count(tmp_path / "data.yaml") == {"train": (1, 1), "val": (1, 1)}
    (tmp_path / "data.yaml").write_text(f"train: images\n{BOMBS[0]}names: [[person]]\n")
    with pytest.raises(HkdError, match="names: expected a list or a mapping"):
        load_dataset(str(tmp_path / "data.yaml"), "train")
