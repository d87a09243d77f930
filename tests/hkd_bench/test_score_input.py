"""Tests of `hkd-bench score` on detections of other forms: hints, categories and image ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hkd_bench.cli import main
from hkd_bench.scoring import find_hint
from hkd_det.metrics.coco_files import read_coco_detections, read_coco_ground_truth

WIDTH, HEIGHT = 1280, 720
Record = dict[str, Any]


def make_ground_truth(num_images: int = 6, **image: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    images = [
        {"id": index + 11, "file_name": f"val/shot_{index:03}.jpg", "width": WIDTH, "height": HEIGHT, **image}
        for index in range(num_images)
    ]
    annotations = []
    for one in images:
        for left in (100, 500, 900):
            box = [left + int(rng.integers(100)), int(rng.integers(50, 300)), 90, 240 + int(rng.integers(100))]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": one["id"], "category_id": 1, "bbox": box, "iscrowd": 0}
            )
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}, {"id": 3, "name": "worker"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_detections(ground_truth: dict[str, Any]) -> list[Record]:
    return [
        {"image_id": one["image_id"], "category_id": 1, "bbox": list(map(float, one["bbox"])), "score": 0.9}
        for one in ground_truth["annotations"]
    ]


def write(folder: Path, ground_truth: dict[str, Any], detections: list[Record]) -> list[str]:
    (folder / "gt.json").write_text(json.dumps(ground_truth))
    (folder / "dt.json").write_text(json.dumps(detections))
    return ["score", "--annotations", str(folder / "gt.json"), "--detections", str(folder / "dt.json")]


def to_normalized_corners(x: float, y: float, w: float, h: float) -> list[float]:
    return [x / WIDTH, y / HEIGHT, (x + w) / WIDTH, (y + h) / HEIGHT]


def to_centered_letterbox(x: float, y: float, w: float, h: float) -> list[float]:
    return [x / 2, y / 2 + (640 - HEIGHT / 2) / 2, w / 2, h / 2]


@pytest.mark.parametrize("protocol", ["coco", "citypersons"])
@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda x, y, w, h: [x, y, x + w, y + h], "corners (xyxy)"),
        (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], "center, width and height"),
        (lambda x, y, w, h: [y, x, y + h, x + w], "corners with y first"),
        (lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT], "(normalized). Write"),
        (to_normalized_corners, "(normalized) and [x1, y1, x2, y2]"),
        (lambda x, y, w, h: [x / 2, y / 2, w / 2, h / 2], "scaled by 2: they are in pixels of a smaller image"),
        (lambda x, y, w, h: [3 * x, 3 * y, 3 * w, 3 * h], "scaled by 0.333: they are in pixels of a larger image"),
        (lambda x, y, w, h: [x / 2, y * 640 / 720, w / 2, h * 640 / 720], "from the network input size 640 x 640"),
        (to_centered_letterbox, "from the network input size 640 (centered letterbox)"),
    ],
)
def test_boxes_of_another_form_give_a_hint(
    tmp_path: Path,
    convert: Callable[..., list[float]],
    message: str,
    protocol: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ground_truth = make_ground_truth()
    detections = [{**one, "bbox": convert(*one["bbox"])} for one in make_detections(ground_truth)]
    command = write(tmp_path, ground_truth, detections)
    assert main([*command, "--protocol", protocol, "--json", str(tmp_path / "o.json")]) == 0
    error = capsys.readouterr().err
    assert "hkd-bench: warning: " in error and "18 would match" in error and message in error
    assert message in json.loads((tmp_path / "o.json").read_text())["hint"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 7}, "detections of category_id 7"),
        ({"image_id": -1}, "image_id is read as counted from 0"),
    ],
)
def test_other_ids_give_a_hint(
    tmp_path: Path, change: dict[str, int], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ground_truth = make_ground_truth()
    detections = make_detections(ground_truth)
    for one in detections:
        one["image_id"] += change.get("image_id", 0)
        one["category_id"] = change.get("category_id", 1)
    detections = [one for one in detections if one["image_id"] >= 11]
    others = [{**one, "bbox": [5, 5, 30, 70], "category_id": 1} for one in detections]
    command = write(tmp_path, ground_truth, detections + others)
    assert main([*command, "--protocol", "coco"]) == 0
    assert message in capsys.readouterr().err


def test_detections_that_miss_for_no_known_reason_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ground_truth = make_ground_truth()
    detections = [{**one, "bbox": [5, 700, 3000, 9]} for one in make_detections(ground_truth)]
    assert main([*write(tmp_path, ground_truth, detections), "--protocol", "citypersons"]) == 0
    assert "none of 18 persons matches a detection; 18 of 18 boxes reach beyond" in capsys.readouterr().err


@pytest.mark.parametrize("jitter_px", [0, 40, 90])
def test_own_misses_give_no_hint(tmp_path: Path, jitter_px: int) -> None:
    """Half of the persons are found at most, and many false positives are added."""
    rng = np.random.default_rng(1)
    ground_truth = make_ground_truth(40)
    detections = [
        {**one, "bbox": [one["bbox"][0] + float(rng.normal(0, jitter_px)), *one["bbox"][1:]]}
        for one in make_detections(ground_truth)[::3]
    ]
    for image in ground_truth["images"]:
        for _ in range(8):
            box = [*rng.uniform(0, 600, 2).tolist(), *rng.uniform(40, 300, 2).tolist()]
            detections.append({"image_id": image["id"], "category_id": 1, "bbox": box, "score": float(rng.random())})
    write(tmp_path, ground_truth, detections)
    truth = read_coco_ground_truth(tmp_path / "gt.json")
    table = read_coco_detections(tmp_path / "dt.json", truth)
    assert find_hint(tmp_path / "dt.json", truth, table) == ""


@pytest.mark.parametrize(
    "name",
    ["val/shot_000.jpg", "shot_000.jpg", "shot_000", "val/shot_000", "images/other/shot_000.png", "val\\shot_000"],
)
def test_image_id_can_be_a_file_name(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth = make_ground_truth()
    detections = make_detections(ground_truth)
    for one in detections:
        one["image_id"] = name.replace("000", f"{one['image_id'] - 11:03}")
    assert main([*write(tmp_path, ground_truth, detections), "--protocol", "coco", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["AP"] == pytest.approx(1)


def test_image_id_can_be_the_number_in_the_file_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth = make_ground_truth()
    detections = make_detections(ground_truth)
    for index, image in enumerate(ground_truth["images"]):
        image["file_name"] = f"{index * 100:012}.jpg"
    for one in detections:
        one["image_id"] = (one["image_id"] - 11) * 100
    command = write(tmp_path, ground_truth, detections)
    assert main([*command, "--protocol", "coco", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["AP"] == pytest.approx(1)
    for one in detections:
        one["image_id"] = str(one["image_id"] // 100 + 11)
    write(tmp_path, ground_truth, detections)
    assert main([*command, "--protocol", "coco", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["AP"] == pytest.approx(1)


def test_ambiguous_file_name_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth = make_ground_truth(2)
    for image, folder in zip(ground_truth["images"], "ab", strict=True):
        image["file_name"] = f"{folder}/shot.jpg"
    detections = [{**one, "image_id": "shot"} for one in make_detections(ground_truth)]
    assert main([*write(tmp_path, ground_truth, detections), "--protocol", "coco"]) == 1
    assert "image_id 'shot' is not among the 2 images" in capsys.readouterr().err


def test_category_selects_what_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth = make_ground_truth()
    for index, one in enumerate(ground_truth["annotations"]):
        one["category_id"] = (1, 3)[index % 2]
    detections = make_detections(ground_truth)
    for one, truth in zip(detections, ground_truth["annotations"], strict=True):
        one["category_id"] = truth["category_id"]
    command = write(tmp_path, ground_truth, detections)
    for names, num_gt in ((["worker"], 9), (["WORKER", "person"], 18), ([], 9)):
        flags = [flag for name in names for flag in ("--category", name)]
        assert main([*command, "--protocol", "citypersons", "--json", "-", *flags]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["num_gt"]["All"] == num_gt and printed["miss_rate"]["All"] == 0
        assert printed.get("category", []) == names
    assert main([*command, "--protocol", "coco", "--category", "guest"]) == 2
    assert "--category guest: expected a category of" in capsys.readouterr().err
    assert main([*command, "--protocol", "caltech", "--category", "person"]) == 2


def test_category_is_required_without_a_person_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth = make_ground_truth()
    ground_truth["categories"][0]["name"] = "visitor"
    assert main([*write(tmp_path, ground_truth, make_detections(ground_truth)), "--protocol", "coco"]) == 2
    assert "--category: expected one of visitor, bicycle, worker" in capsys.readouterr().err


@pytest.mark.parametrize("category_id", ["Person", "1"])
def test_category_id_can_be_text(tmp_path: Path, category_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth = make_ground_truth()
    detections = [{**one, "category_id": category_id} for one in make_detections(ground_truth)]
    assert main([*write(tmp_path, ground_truth, detections), "--protocol", "coco", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["AP"] == pytest.approx(1)


@pytest.mark.parametrize("protocol", ["coco", "citypersons"])
def test_category_ids_from_zero_are_an_error(tmp_path: Path, protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth = make_ground_truth()
    detections = [{**one, "category_id": 0} for one in make_detections(ground_truth)]
    detections.append({**detections[0], "category_id": 1, "bbox": [1, 2, 3, 4]})  # a bicycle
    assert main([*write(tmp_path, ground_truth, detections), "--protocol", protocol]) == 1
    error = capsys.readouterr().err
    assert "category_id 0 is not among the categories" in error and "1 (person), 2 (bicycle)" in error
    ground_truth["categories"].append({"id": 0, "name": "background"})
    assert main([*write(tmp_path, ground_truth, detections), "--protocol", protocol]) == 0


def test_file_without_detections_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*write(tmp_path, make_ground_truth(), []), "--protocol", "coco"]) == 0
    assert f"warning: {tmp_path / 'dt.json'}: contains no detection. Check the file." in capsys.readouterr().err
