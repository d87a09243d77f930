"""Near-duplicates: eight orientations, changes that keep an image recognizable, and images that differ."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from hkd_det.datasets.coco import read_coco
from hkd_det.datasets.duplicates import (
    ORIENTATIONS,
    DuplicatePair,
    find_duplicates,
    group_duplicates,
    make_thumbnail,
    turn,
)
from hkd_det.image import read_image
from hkd_det.train.cli import main

SHARED = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
Image = NDArray[np.uint8]


def make_scene(seed: int, hw: tuple[int, int] = (240, 320)) -> Image:
    """Draw random rectangles and ellipses on a gradient."""
    rng = np.random.default_rng(seed)
    height, width = hw
    image = np.tile(np.linspace(60, 200, height)[:, None, None], (1, width, 3)).astype(np.uint8)
    for _ in range(25):
        color = tuple(rng.integers(0, 256, 3).tolist())
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        half = (int(rng.integers(8, width // 5)), int(rng.integers(8, height // 4)))
        if rng.random() < 0.5:
            cv2.rectangle(image, (x - half[0], y - half[1]), (x + half[0], y + half[1]), color, -1)
        else:
            cv2.ellipse(image, (x, y), half, float(rng.uniform(0, 180)), 0, 360, color, -1)
    return image


def thumbnails(images: list[Image]) -> Image:
    return np.array([make_thumbnail(image) for image in images])


SCENES = [make_scene(seed) for seed in range(60)]


def test_different_scenes_are_no_duplicates() -> None:
    assert find_duplicates(thumbnails(SCENES)) == []
    assert find_duplicates(thumbnails(SCENES[:30]), thumbnails(SCENES[30:])) == []


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_turned_image_is_found_with_its_orientation(orientation: str) -> None:
    """The operations of NumPy are the reference for the names."""
    image = SCENES[3]
    reference = {
        "unchanged": image,
        "flip left-right": np.fliplr(image),
        "flip top-bottom": np.flipud(image),
        "rotate 90": np.rot90(image),
        "rotate 180": np.rot90(image, 2),
        "rotate 270": np.rot90(image, 3),
        "transpose": np.swapaxes(image, 0, 1),
        "transverse": np.rot90(np.swapaxes(image, 0, 1), 2),
    }
    first = [np.ascontiguousarray(reference[orientation])]
    (pair,) = find_duplicates(thumbnails(first), thumbnails(SCENES))
    assert (pair.first, pair.second, pair.orientation) == (0, 3, orientation)
    assert pair.similarity > 0.95
    assert np.array_equal(turn(thumbnails([image]), orientation)[0].shape, (32, 32))


def compress(image: Image) -> Image:
    return np.asarray(cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1), np.uint8)


def halve(image: Image) -> Image:
    return np.asarray(cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2)), np.uint8)


CHANGES: dict[str, Callable[[Image], Any]] = {
    "jpeg": compress,
    "half size": halve,
    "stretched": lambda image: cv2.resize(image, (300, 300)),
    "bright": lambda image: np.clip(image * 1.2 + 20, 0, 255).astype(np.uint8),
    "gray": lambda image: np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2),
    "noise": lambda image: np.clip(image + np.random.default_rng(1).normal(0, 12, image.shape), 0, 255).astype(
        np.uint8
    ),
    "blur": lambda image: cv2.GaussianBlur(image, (0, 0), 2),
    "crop": lambda image: image[3:-3, 4:-4],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_image_is_found(change: str) -> None:
    changed = [CHANGES[change](image) for image in SCENES[:20]]
    pairs = find_duplicates(thumbnails(changed), thumbnails(SCENES))
    assert {(pair.first, pair.second) for pair in pairs} == {(index, index) for index in range(20)}
    assert {pair.orientation for pair in pairs} == {"unchanged"}


def test_pair_within_a_set_is_reported_once() -> None:
    images = [*SCENES[:3], SCENES[1], np.ascontiguousarray(np.fliplr(SCENES[0]))]
    pairs = find_duplicates(thumbnails(images))
    assert {(pair.first, pair.second, pair.orientation) for pair in pairs} == {
        (1, 3, "unchanged"),
        (0, 4, "flip left-right"),
    }


def test_many_copies_are_one_group() -> None:
    images = thumbnails([SCENES[0]] * 40 + [SCENES[1]] * 2 + [SCENES[2]])
    assert group_duplicates(find_duplicates(images)) == [list(range(40)), [40, 41]]


def test_groups_are_connected_pairs() -> None:
    pairs = [DuplicatePair(first, second, 1, "unchanged") for first, second in ((0, 1), (5, 7), (1, 2), (7, 9), (2, 4))]
    assert group_duplicates(pairs) == [[0, 1, 2, 4], [5, 7, 9]]
    assert group_duplicates([]) == []


def test_uniform_and_no_images_are_no_duplicates() -> None:
    uniform = thumbnails([np.full((50, 70, 3), value, np.uint8) for value in (0, 9, 255, 255)])
    assert find_duplicates(uniform) == [] and find_duplicates(uniform, thumbnails(SCENES[:2])) == []
    empty = np.zeros((0, 32, 32), np.uint8)
    assert find_duplicates(empty) == find_duplicates(uniform, empty) == find_duplicates(empty, uniform) == []


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 900, 3), (900, 1, 3), (31, 33, 3)])
def test_thumbnail_of_any_size(shape: tuple[int, ...]) -> None:
    thumbnail = make_thumbnail(np.full(shape, 77, np.uint8))
    assert thumbnail.shape == (32, 32) and set(thumbnail.ravel().tolist()) == {77}


@pytest.mark.skipif(not SHARED.is_dir(), reason="HKD_TEST_DATA is not set")
def test_real_images_of_different_sources_are_no_duplicates() -> None:
    """And every JPEG copy at half size, turned, is found."""
    streets = [read_image(one.path) for one in read_coco(SHARED / "inria" / "test.json", SHARED / "inria")[::4]]
    folder = SHARED / "openimages_people"
    others = [read_image(one.path) for one in read_coco(folder / "annotations.json", folder)[::4]]
    assert find_duplicates(thumbnails(streets), thumbnails(others)) == []
    copies = [np.ascontiguousarray(np.rot90(compress(halve(image)))) for image in streets]
    pairs = find_duplicates(thumbnails(copies), thumbnails(streets))
    assert {(pair.first, pair.second) for pair in pairs if pair.orientation == "rotate 90"} == {
        (index, index) for index in range(len(streets))
    }
    assert len(pairs) == len(streets)


def write_image(path: Path, image: Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def write_data(root: Path) -> None:
    """Write a dataset with two duplicates within train and one of val in train, and another one with one of val."""
    for index in range(6):
        write_image(root / "images" / "train" / f"{index}.jpg", SCENES[index])
        write_image(root / "images" / "val" / f"{index}.png", SCENES[10 + index])
    write_image(root / "images" / "train" / "copy.png", halve(SCENES[2]))
    write_image(root / "images" / "val" / "turned.jpg", np.ascontiguousarray(np.rot90(SCENES[4], 3)))
    write_image(root / "other" / "street.jpg", np.ascontiguousarray(np.fliplr(SCENES[12])))
    for split in ("train", "val"):
        (root / "labels" / split).mkdir(parents=True)
        for path in (root / "images" / split).iterdir():
            (root / "labels" / split / f"{path.stem}.txt").write_text("0 0.5 0.5 0.2 0.5\n")
    (root / "my.yaml").write_text("train: images/train\nval: images/val\nnames: [person]\n")
    (root / "other.yaml").write_text("test: other\nnames: [person]\n")


@pytest.mark.slow
def test_check_reports_duplicates_between_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "my.yaml", "--check", "--against", "other.yaml"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(
        r"^  (\w+ (?:in )?\S+(?: test)?) {2,}(.*)$", printed[printed.index("near-duplicates") :], re.MULTILINE
    )
    assert dict(rows) == {
        "within train": "2 of 7 images; groups: 1",
        "within val": "none",
        "val in train": "1 of 7 images; flipped or rotated pairs: 1",
        "train in other.yaml test": "none",
        "val in other.yaml test": "1 of 7 images; flipped or rotated pairs: 1",
    }
    searches = {one["search"]: one for one in json.loads(Path("runs/check/my/duplicates.json").read_text())}
    (pair,) = searches["val in train"]["pairs"]
    assert (Path(pair["first"]).name, Path(pair["second"]).name) == ("turned.jpg", "4.jpg")
    assert pair["orientation"] == "rotate 270"
    assert [sorted(Path(name).name for name in group) for group in searches["within train"]["groups"]] == [
        ["2.jpg", "copy.png"]
    ]
    page = Path("runs/check/my/index.html").read_text()
    assert "Near-duplicates" in page and page.count("data:image/jpeg") == 2 + 3  # contact sheets and pairs


@pytest.mark.slow
def test_against_an_unknown_dataset_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "my.yaml", "--check", "--against", "gone.yaml"]) == 1
    assert capsys.readouterr().err.startswith("hkd-train: gone.yaml: no such file") and not Path("runs").exists()
    (tmp_path / "other" / "street.jpg").write_bytes(b"x")
    assert main(["--data", "my.yaml", "--check", "--against", "other.yaml"]) == 1
    assert re.match(r"hkd-train: .*street.jpg: not a readable image.*\n$", capsys.readouterr().err)
    assert main(["--data", "my.yaml", "--against", "other.yaml"]) == 2
    assert capsys.readouterr().err == "hkd-train: --against: requires --check. Add --check.\n"


def insert_exif(jpeg: bytes, orientation: int, order: Literal["little", "big"]) -> bytes:
    """Insert an EXIF segment with the orientation after two other tags."""
    entries = [(0x0100, 4, 1, 640), (0x0101, 4, 1, 480), (0x0112, 3, 1, orientation)]
    tiff = (b"II*\0" if order == "little" else b"MM\0*") + (8).to_bytes(4, order) + len(entries).to_bytes(2, order)
    for tag, cls, count, value in entries:
        width = 2 if cls == 3 else 4
        tiff += tag.to_bytes(2, order) + cls.to_bytes(2, order) + count.to_bytes(4, order)
        tiff += value.to_bytes(width, order) + bytes(4 - width)
    segment = b"Exif\0\0" + tiff + bytes(4)
    return jpeg[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + jpeg[2:]


@pytest.mark.slow
def test_check_reports_exif_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    for name, orientation in (("0.jpg", 3), ("1.jpg", 1)):
        path = tmp_path / "images" / "train" / name
        path.write_bytes(insert_exif(path.read_bytes(), orientation, "big"))
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "my.yaml", "--check"]) == 0
    assert re.findall(r"rotated by EXIF +(\d+) images", capsys.readouterr().out) == ["1"]
