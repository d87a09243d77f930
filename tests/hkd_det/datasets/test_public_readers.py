"""VOC, INRIA, Penn-Fudan, CrowdHuman, EuroCity Persons: small valid, invalid and mutated datasets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets import Sample
from hkd_det.datasets.base import raise_error
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, HkdError, UsageError

VOC = """<annotation><size><width>100</width><height>80</height><depth>3</depth></size>
<object><name>person</name><difficult>0</difficult><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>70</ymax>
</bndbox></object>
<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>
<object><name>Person</name><difficult>1</difficult><bndbox><xmin>50</xmin><ymin>5</ymin><xmax>60</xmax><ymax>30</ymax>
</bndbox></object></annotation>"""
INRIA = """# PASCAL Annotation Version 1.00

Image filename : "Train/pos/a.png"
Image size (X x Y x C) : 100 x 80 x 3
Database : "The INRIA Rh\xf4ne-Alpes Annotated Person Database"
Objects with ground truth : 1 { "PASperson" }

# Top left pixel co-ordinates : (0, 0)

Original label for object 1 "PASperson" : "UprightPerson"
Center point on object 1 "PASperson" (X, Y) : (25, 24)
Bounding box for object 1 "PASperson" (Xmin, Ymin) - (Xmax, Ymax) : (10, 20) - (39, 69)
"""
PENN = """# Compatible with PASCAL Annotation Version 1.00
Image filename : "PennFudanPed/PNGImages/a0.png"
Image size (X x Y x C) : 100 x 80 x 3
Objects with ground truth : 1 { "PASpersonWalking" }
# Top left pixel co-ordinates : (1, 1)
Original label for object 1 "PASpersonWalking" : "PennFudanPed"
Bounding box for object 1 "PASpersonWalking" (Xmin, Ymin) - (Xmax, Ymax) : (11, 21) - (40, 70)
"""
CROWD = [
    {"tag": "person", "fbox": [10, 20, 30, 50], "vbox": [10, 20, 30, 25], "hbox": [1, 1, 2, 2], "extra": {"occ": 1}},
    {"tag": "person", "fbox": [-5, 60, 30, 50], "vbox": [0, 60, 25, 20], "extra": {"ignore": 1}},
    {"tag": "mask", "fbox": [50, 5, 10, 25], "vbox": [50, 5, 10, 25]},
]
EURO = {
    "imagewidth": 100,
    "imageheight": 80,
    "children": [
        {"identity": "pedestrian", "x0": 10, "y0": 20, "x1": 40, "y1": 70, "tags": ["occluded>40", "truncated>10"]},
        {"identity": "rider", "x0": 50, "y0": 5, "x1": 60, "y1": 30, "tags": [], "children": []},
    ],
}
Build = Callable[[Path], dict[str, Any]]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1"))


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((80, 100, 3), np.uint8))


def voc(root: Path) -> dict[str, Any]:
    write(root / "Annotations" / "a.xml", VOC)
    write(root / "ImageSets" / "Main" / "trainval.txt", "a  1\n")
    write_image(root / "JPEGImages" / "a.jpg")
    return {"format": "voc", "train": "trainval"}


def inria(root: Path) -> dict[str, Any]:
    write(root / "Train" / "annotations" / "a.txt", INRIA)
    write_image(root / "Train" / "pos" / "a.png")
    write_image(root / "Train" / "neg" / "b.jpg")
    return {"format": "inria", "train": "Train"}


def pennfudan(root: Path) -> dict[str, Any]:
    for number in range(5):
        write(root / "Annotation" / f"a{number}.txt", PENN)
        write_image(root / "PNGImages" / f"a{number}.png")
    return {"format": "pennfudan", "train": "train", "val": "val"}


def crowdhuman(root: Path) -> dict[str, Any]:
    write(root / "annotation_train.odgt", json.dumps({"ID": "273271,c9db0", "gtboxes": CROWD}) + "\n")
    write_image(root / "Images" / "273271,c9db0.jpg")
    return {"format": "crowdhuman", "train": "train"}


def eurocity(root: Path) -> dict[str, Any]:
    write(root / "night" / "labels" / "train" / "rome" / "rome_1.json", json.dumps(EURO))
    write_image(root / "night" / "img" / "train" / "rome" / "rome_1.png")
    return {"format": "eurocity", "time": "night", "train": "train"}


BUILDERS: dict[str, Build] = {
    "voc": voc,
    "inria": inria,
    "pennfudan": pennfudan,
    "crowdhuman": crowdhuman,
    "eurocity": eurocity,
}
FILES = {
    "voc": "Annotations/a.xml",
    "inria": "Train/annotations/a.txt",
    "pennfudan": "Annotation/a0.txt",
    "crowdhuman": "annotation_train.odgt",
    "eurocity": "night/labels/train/rome/rome_1.json",
}


def write_dataset(name: str, root: Path, **more: Any) -> Path:
    entry = {**BUILDERS[name](root), **more}
    (root / "data.yaml").write_text(yaml.safe_dump(entry))
    return root / "data.yaml"


def read(name: str, root: Path, split: str = "train") -> list[Sample]:
    return load_dataset(str(write_dataset(name, root)), split)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_same_box_in_every_format(name: str, tmp_path: Path) -> None:
    """Pixels 10 to 39 and 20 to 69, 0-based, in the convention of each format."""
    first = read(name, tmp_path)[0]
    assert first.path.is_file()
    assert first.ground_truth.boxes_xyxy[0].tolist() == [10, 20, 40, 70] and not first.ground_truth.ignore[0]
    assert first.size_hw in ((80, 100), None)


def test_ignore_regions_and_visible_ratios(tmp_path: Path) -> None:
    ignored = {name: read(name, tmp_path / name)[0].ground_truth.ignore.tolist() for name in BUILDERS}
    assert ignored == {
        "voc": [False, True],
        "inria": [False],
        "pennfudan": [False],
        "crowdhuman": [False, True, True],
        "eurocity": [False, True],
    }
    assert read("crowdhuman", tmp_path / "c")[0].ground_truth.visible_ratio.tolist()[0] == 0.5
    assert read("eurocity", tmp_path / "e")[0].ground_truth.visible_ratio.tolist() == pytest.approx([0.4, 1.0])


def test_negative_images_and_the_pennfudan_split(tmp_path: Path) -> None:
    samples = read("inria", tmp_path / "i")
    assert [sample.image_id for sample in samples] == ["Train/pos/a.png", "Train/neg/b.jpg"]
    assert not len(samples[1].ground_truth)
    train, val = (read("pennfudan", tmp_path / "p", split) for split in ("train", "val"))
    assert [sample.image_id for sample in val] == ["a4"] and len(train) == 4


@pytest.mark.parametrize(
    ("name", "valid", "invalid", "message"),
    [
        (
            "voc",
            "<xmax>40",
            "<xmax>4",
            "line 2: object 1: expected a box with a width and height of at least 0, got [11.0, 21.0, 4.0, 70.0].",
        ),
        ("voc", "<xmin>50</xmin>", "", "line 5: object 3: bndbox: expected xmin"),
        ("voc", "</annotation>", "", "not XML"),
        ("voc", "<annotation>", "<!DOCTYPE x><annotation>", "document type"),
        (
            "inria",
            "(39, 69)",
            "(4, 69)",
            "line 12: expected a box with a width and height of at least 0, got [10.0, 20.0, 4.0, 69.0].",
        ),
        ("inria", "(39, 69)", "(39 69)", "line 12: expected `: (Xmin"),
        ("inria", "(10, 20) - (39", "(100, 20) - (139", "line 12: expected a box inside its image of "),
        ("inria", "1 { ", '2 { "PASperson" ', "expected boxes of 2 objects, got 1"),
        ("inria", "(0, 0)", "(0, 1)", "expected the line `# Top left pixel"),
        ("inria", "PASCAL Annotation", "PASCAL", "Version 1.00"),
        ("crowdhuman", "[10, 20, 30, 50]", "[10, 20, -30, 50]", "line 1, box 1"),
        ("crowdhuman", "[10, 20, 30, 50]", "[10, 20, 30]", "line 1, box 1"),
        ("crowdhuman", '"tag": "mask"', '"tag": "dog"', "line 1, box 3"),
        ("crowdhuman", '"ID": "273271,c9db0"', '"ID": "../a"', "line 1"),
        ("eurocity", '"x1": 40', '"x1": 4', "line 1, column 53: child 1"),
        ("eurocity", '"x1": 40', '"x1": null', "line 1, column 53: child 1"),
        ("eurocity", '"imagewidth": 100', '"imagewidth": 0', "imagewidth"),
    ],
)
def test_error_names_its_location_and_can_be_skipped(
    name: str, valid: str, invalid: str, message: str, tmp_path: Path
) -> None:
    data = write_dataset(name, tmp_path)
    path = tmp_path / FILES[name]
    text = path.read_bytes().decode("latin-1")
    assert valid in text
    write(path, text.replace(valid, invalid, 1))
    with pytest.raises(DataError, match=path.name) as caught:
        load_dataset(str(data), "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    errors: list[DataError] = []
    try:
        load_dataset(str(data), "train", errors.append)
    except DataError as error:
        assert "contains no images" in str(error)
    assert str(caught.value) in map(str, errors)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_missing_images_are_rejected(name: str, tmp_path: Path) -> None:
    data = write_dataset(name, tmp_path)
    for path in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")]:
        path.unlink()
    with pytest.raises(DataError, match="missing"):
        load_dataset(str(data), "train")


def test_invalid_options_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="time: expected day or night, got 'noon'"):
        load_dataset(str(write_dataset("eurocity", tmp_path / "e", time="noon")), "train")
    with pytest.raises(UsageError, match="Did you mean skip_missing"):
        load_dataset(str(write_dataset("crowdhuman", tmp_path / "c", skip_misisng=True)), "train")
    with pytest.raises(DataError, match="no such file"):
        load_dataset(str(write_dataset("crowdhuman", tmp_path / "c", train="test")), "train")
    for name, message in (("inria", "got none"), ("eurocity", "got none"), ("voc", "no such")):
        with pytest.raises(DataError, match=message):
            load_dataset(str(write_dataset(name, tmp_path / name, train="elsewhere")), "train")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILDERS))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_raise_only_hkd_errors(name: str, tmp_path: Path, data: st.DataObject) -> None:
    entry = write_dataset(name, tmp_path)
    path = tmp_path / FILES[name]
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(raw)
    errors: list[DataError] = []
    try:
        for sample in load_dataset(str(entry), "train", data.draw(st.sampled_from([raise_error, errors.append]))):
            assert np.isfinite(sample.ground_truth.boxes_xyxy).all()
    except HkdError as error:
        errors.append(DataError(str(error)))
    assert not any("\n" in str(error) for error in errors)
