"""Tests of the page on which the images of a dataset are browsed: its data, its thumbnails, and odd file names."""

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import cv2
import numpy as np
import pytest

from hkd_det.datasets.check_browser import BrowsedImage, select_images, write_browser_page
from hkd_det.structures import GroundTruth
from hkd_det.train.cli import main

ODD_NAMES = [
    "a b #1?%41.jpg",
    "<img src=x onerror=alert(1)>.jpg",
    "x<!--<script>.jpg",
    "caf\u00e9 \u65e5.jpg",
    "q\"'&lt;.jpg",
]


def read_content(page: str) -> Any:
    """Return the data of the page as a browser does: up to the first end tag."""
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</script", 1)[0])


def check(root: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[int, Any]:
    monkeypatch.chdir(root)
    code = main(["--data", "my.yaml", "--check", *flags])
    page = root / "runs" / "check" / "my" / "images.html"
    return code, read_content(page.read_text()) if page.exists() else None


def write_image(path: Path, width: int = 100, height: int = 80) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(list(os.fsencode(path))).integers(0, 255, (6, 8, 3), np.uint8)
    pixels = cv2.resize(blocks, (width, height), interpolation=cv2.INTER_NEAREST)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """YOLO dataset: train with persons, ignore regions, unused classes and an error; val with unreadable images."""
    for name in ("a.jpg", "b.png", "deep/a.jpg"):
        write_image(tmp_path / "images" / "train" / name)
        label = (tmp_path / "labels" / "train" / name).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.2 0.5\n1 0.5 0.5 0.4 0.5\n2 0.25 0.25 0.5 0.5\n")
    (tmp_path / "labels" / "train" / "deep" / "a.txt").write_text("0 0.5 0.5\n")
    write_image(tmp_path / "images" / "val" / "large.jpg", 1000, 500)
    write_image(tmp_path / "images" / "val" / "damaged.jpg")
    damaged = tmp_path / "images" / "val" / "damaged.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (tmp_path / "images" / "val" / "text.jpg").write_text("text")
    (tmp_path / "labels" / "val").mkdir()
    for name in ("large", "damaged", "text"):
        (tmp_path / "labels" / "val" / f"{name}.txt").write_text("")
    names = "names: [person, poster, car]\nignore_category: poster\n"
    (tmp_path / "my.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\n{names}")
    return tmp_path


def test_page_lists_all_images_with_boxes(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, content = check(dataset, monkeypatch)
    assert code == 1 and content["splits"] == ["train", "val"]
    images = {f"{content['folders'][one[1]][0]}/{one[2]}": one for one in content["images"]}
    train = {f"images/train/{name}" for name in ("a.jpg", "b.png", "deep/a.jpg")}
    assert set(images) == train | {f"images/val/{name}.jpg" for name in ("large", "damaged", "text")}
    preview, width, height, persons, visible, ignored, unused, proposals, problems = images["images/train/b.png"][4:]
    assert (width, height, persons[0][:4], ignored[0][:4]) == (100, 80, [40, 20, 20, 40], [30, 20, 40, 40])
    assert unused[0][:4] == [0, 0, 50, 40] and content["labels"][unused[0][4]] == "car"
    assert not visible and not proposals and not problems
    folder = dataset / "runs" / "check" / "my"
    assert cv2.imread(str(folder / content["previews"] / "train" / f"{preview}.jpg")).shape == (80, 100, 3)
    large = images["images/val/large.jpg"]
    assert cv2.imread(str(folder / content["previews"] / "val" / f"{large[4]}.jpg")).shape == (166, 333, 3)


def test_problems_belong_to_their_images(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, content = check(dataset, monkeypatch)
    problems = {
        f"{content['folders'][one[1]][0]}/{one[2]}": [(content["kinds"][kind][:2], text) for kind, text in one[-1]]
        for one in content["images"]
    }
    [(kind, text)] = problems["images/train/deep/a.jpg"]
    assert kind == ["annotation", "error"] and text.startswith("labels/train/deep/a.txt, line 1: expected")
    assert not problems["images/train/a.jpg"]  # the label file of the other directory has the same name
    assert problems["images/val/damaged.jpg"][0][0] == ["image", "error"]
    assert problems["images/val/text.jpg"][0][0] == ["annotation", "error"]
    sizes = {one[2]: one[5] for one in content["images"]}
    assert sizes["damaged.jpg"] == sizes["text.jpg"] == 0  # not readable


def test_coco_records_belong_to_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"]
    for name in names:
        write_image(tmp_path / name)
    boxes = [(0, 1, [10, 20, 30, 50]), (1, 1, [1, 2, -3, 4]), (1, 2, [5, 6, 7, 8]), (1, 2, None), (2, 1, [4, 5, 6, 0])]
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box}
        for number, (image, category, box) in enumerate(boxes)
    ]
    images = [{"id": number, "file_name": name, "width": 100, "height": 80} for number, name in enumerate(names)]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "all.json").write_text(json.dumps(content))
    (tmp_path / "my.yaml").write_text("format: coco\nval: {images: ., annotations: all.json}\n")
    _, content = check(tmp_path, monkeypatch)
    kinds = {one[2]: [content["kinds"][kind][0] for kind, _ in one[-1]] for one in content["images"]}
    assert kinds == {"a.jpg": [], "b.jpg": ["annotation"], "c.jpg": ["box_without_area"]}
    unused = {one[2]: one[10] for one in content["images"]}
    assert unused == {"a.jpg": [], "b.jpg": [[5, 6, 7, 8, content["labels"].index("car")]], "c.jpg": []}


def test_voc_records_belong_to_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_object(name: str, corners: tuple[int, ...]) -> str:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"

    (tmp_path / "Annotations").mkdir()
    for name, objects in (
        ("a", make_object("person", (11, 21, 30, 70)) + make_object("car", (1, 2, 30, 40))),
        ("b", make_object("person", (30, 70, 11, 21))),
    ):
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg")
        xml = f"<annotation><filename>{name}.jpg</filename>{objects}</annotation>"
        (tmp_path / "Annotations" / f"{name}.xml").write_text(xml)
    (tmp_path / "my.yaml").write_text("format: voc\npath: .\ntrain: train\n")
    _, content = check(tmp_path, monkeypatch)
    first, second = content["images"]
    assert first[7][0][:4] == [10, 20, 20, 50] and first[10][0][:4] == [0, 1, 30, 39]
    assert [content["kinds"][kind][0] for kind, _ in second[-1]] == ["annotation"] and not first[-1]


def test_near_duplicates_are_problems_of_images(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (dataset / "images" / "val" / "large.jpg").write_bytes((dataset / "images" / "train" / "a.jpg").read_bytes())
    _, content = check(dataset, monkeypatch)
    kinds = {content["kinds"][kind][0] for one in content["images"] if one[2] == "large.jpg" for kind, _ in one[-1]}
    assert "near_duplicates_in_train" in kinds


@pytest.mark.slow
def test_limit_selects_images_with_problems_first(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, content = check(dataset, monkeypatch, "--check-images", "4")
    names = [one[2] for one in content["images"]]
    assert len(names) == 4 and {"damaged.jpg", "text.jpg"} <= set(names)
    files = sorted(path.name for path in (dataset / "runs/check/my/thumbnails").rglob("*.jpg"))
    assert len(files) == sum(one[5] > 0 for one in content["images"])
    assert "4 of 6" in " ".join((dataset / "runs/check/my/images.html").read_text().split())
    assert check(dataset, monkeypatch, "--check-images", "0")[1] is None
    assert not (dataset / "runs/check/my/thumbnails").exists()
    assert "images.html" not in (dataset / "runs/check/my/index.html").read_text()
    assert len(check(dataset, monkeypatch, "--check-images", "all")[1]["images"]) == 6


def test_limit_is_a_number_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", "my.yaml", "--check", "--check-images", "-3"])
    assert "expected a number of images or all" in capsys.readouterr().err
    assert main(["--data", "my.yaml", "--check-images", "3"]) == 2 and "requires --check" in capsys.readouterr().err


def test_odd_file_names_are_text_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "labels").mkdir()
    names = [*map(os.fsencode, ODD_NAMES), b"bad\xff.jpg"]
    for name in names:
        write_image(tmp_path / "images" / os.fsdecode(name))
        (tmp_path / "labels" / os.fsdecode(name[:-4] + b".txt")).write_text("0 0.5 0.5 0.2 0.5\n")
    (tmp_path / "my.yaml").write_text("train: images\nval: images\nnames: ['<b>person']\n")
    code, content = check(tmp_path, monkeypatch)
    assert code == 0 and {one[2] for one in content["images"]} == {*ODD_NAMES, r"bad\udcff.jpg"}
    folder = tmp_path / "runs" / "check" / "my"
    for one in content["images"]:
        assert not set(one[3]) & set(" #?<>\"'&")
        assert (folder / os.fsdecode(unquote_to_bytes(f"{content['folders'][one[1]][1]}/{one[3]}"))).is_file()
    page = (folder / "images.html").read_text()
    assert "<img src=x" not in page and "<b>person" not in page and page.count("<script") == 2


def make_images(num_images: int, **fields: Any) -> list[BrowsedImage]:
    rng = np.random.default_rng(0)
    images = []
    for number in range(num_images):
        corners = rng.uniform(0, 1000, (8, 2)).astype(np.float32)
        boxes = np.concatenate([corners, corners + 50], axis=1)
        ground_truth = GroundTruth(boxes, rng.random(8) < 0.2, boxes, ("person",) * 8)
        path = Path(f"images/set{number % 7}/frame_{number:06}.jpg")
        images.append(BrowsedImage("train", path, Path(f"train/{number}.jpg"), ground_truth, (1080, 1920), **fields))
    return images


@pytest.mark.slow
def test_page_of_10000_images_is_small_and_fast(tmp_path: Path) -> None:
    images = make_images(10_000)
    start = time.process_time()
    write_browser_page(tmp_path / "images.html", "my", images, len(images), tmp_path / "thumbnails")
    assert time.process_time() - start < 20
    assert (tmp_path / "images.html").stat().st_size < 6e6
    tracemalloc.start()
    write_browser_page(tmp_path / "images.html", "my", images[:1000], 1000, tmp_path / "thumbnails")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1000 * 20_000  # bytes
    assert len(read_content((tmp_path / "images.html").read_text())["images"]) == 1000


def test_selection_is_evenly_spaced() -> None:
    images = make_images(100)
    for index in (7, 50):
        images[index].add("error", "annotation", "x")
    for index in range(10, 20):
        images[index].add("note", "near_duplicates_within_train", "x")
    assert [images.index(one) for one in select_images(images, 7)] == [7, 10, 12, 14, 16, 18, 50]
    assert len(select_images(images, 40)) == 40 and select_images(images, 1000) == images
    assert select_images([], 5) == [] == select_images(images, 0)
