"""YOLO directories: valid and invalid labels and image lists."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets.yolo import read_yolo
from hkd_det.datasets.yolo_labels import get_label_path
from hkd_det.errors import DataError, HkdError


def write_dataset(root: Path, labels: str | None = "0 0.5 0.5 0.2 0.5\n1 0.1 0.1 0.1 0.1\n") -> Path:
    """Write one image of 100 x 60 pixels with labels, and return its directory."""
    for folder in ("images/train", "labels/train"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(root / "images/train/a.jpg"), np.zeros((60, 100, 3), np.uint8))
    if labels is not None:
        (root / "labels/train/a.txt").write_text(labels)
    return root / "images" / "train"


def test_ratios_become_pixels_and_other_classes_are_omitted(tmp_path: Path) -> None:
    (sample,) = read_yolo(write_dataset(tmp_path), {0: "person", 1: "dog"})
    assert sample.size_hw == (60, 100) and sample.image_id == "a.jpg"
    np.testing.assert_allclose(sample.ground_truth.boxes_xyxy, [[40, 15, 60, 45]])
    (dog,) = read_yolo(tmp_path / "images" / "train", {0: "person", 1: "dog"}, "dog")
    np.testing.assert_allclose(dog.ground_truth.boxes_xyxy, [[5, 3, 15, 9]])


def test_boxes_are_clipped_and_empty_ones_ignored(tmp_path: Path) -> None:
    (sample,) = read_yolo(
        write_dataset(tmp_path, "0 1.05 0.5 0.4 0.5\n0 0.5 0.0 1.2 0.5\n0 0.5 0.5 0 0.5\n"), {0: "person"}
    )
    np.testing.assert_allclose(
        sample.ground_truth.boxes_xyxy, [[85, 15, 100, 45], [0, 0, 100, 15], [50, 15, 50, 45]], atol=1e-4
    )
    assert sample.ground_truth.ignore.tolist() == [False, False, True]


def test_class_ids_have_gaps_and_names_any_case(tmp_path: Path) -> None:
    (sample,) = read_yolo(
        write_dataset(tmp_path, "\ufeff7 0.5 0.5 0.2 0.5\n2 0.5 0.5 0.2 0.5\n"), {2: "dog", 7: "Person"}
    )
    assert len(sample.ground_truth) == 1


def test_equal_file_names_have_different_image_ids(tmp_path: Path) -> None:
    source = write_dataset(tmp_path)
    (source / "more").mkdir()
    (source / "a.jpg").rename(source / "more" / "a.jpg")
    samples = read_yolo(write_dataset(tmp_path), {0: "person", 1: "dog"})
    assert [(sample.image_id, len(sample.ground_truth)) for sample in samples] == [("a.jpg", 1), ("more/a.jpg", 0)]


def test_invalid_image_list_is_rejected(tmp_path: Path) -> None:
    source = write_dataset(tmp_path)
    (tmp_path / "list.txt").write_text("images/train/a.jpg\nimages/b.jpg\nimages/c.jpg\n")
    with pytest.raises(DataError, match=r"b\.jpg: no such image, and 1 others of the 3"):
        read_yolo(tmp_path / "list.txt", {0: "person"})
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DataError, match="expected images"):
        read_yolo(tmp_path / "list.txt", {0: "person"})
    (tmp_path / "zeros").write_bytes(bytes(9))
    for path in (source / "a.jpg", tmp_path / "zeros"):
        with pytest.raises(DataError, match="not a text file"):
            read_yolo(path, {0: "person"})


def test_image_without_labels_has_no_persons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no label file for 1 of 1 images.*labels/train/a\.txt"):
        read_yolo(write_dataset(tmp_path, labels=None), {0: "person"})
    assert len(read_yolo(write_dataset(tmp_path, labels="\n"), {0: "person"})[0].ground_truth) == 0


def test_text_file_lists_images(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / "train.txt").write_text("./images/train/a.jpg\n\n")
    assert len(read_yolo(tmp_path / "train.txt", {0: "person", 1: "dog"})[0].ground_truth) == 1


def test_label_path_replaces_the_last_images_directory() -> None:
    assert get_label_path(Path("/data/images/set/images/a.b.jpg")) == Path("/data/images/set/labels/a.b.txt")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0 0.5 0.5 0.2\n", "line 1"),
        ("\n0 0.5 x 0.2 0.5\n", "line 2"),
        ("0 0.5 0.5 nan 0.5\n", "finite"),
        ("7 0.5 0.5 0.2 0.5\n", "class: .* got 7"),
        ("0.5 0.5 0.5 0.2 0.5\n", r"class: .* got 0\.5"),
        ("0 0.5 0.5 0.2 0.5 0.9\n", "line 1"),
        ("0 0.5 0.5 -0.2 0.5\n", "expected a box with a width"),
        ("0 320 240 50 90\n", "Divide pixels"),
        ("0 1e308 0.5 0.2 0.2\n", "Divide pixels"),
        ("0 1.2 0.5 0.2 0.2\n", "expected a box inside its image"),
        ("0 0.5 -0.3 0.2 0.2\n", "expected a box inside its image"),
    ],
)
def test_invalid_line_is_named(tmp_path: Path, labels: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_yolo(write_dataset(tmp_path, labels), {0: "person", 1: "dog"})
    assert "a.txt, line" in str(caught.value)


def test_missing_directory_and_invalid_image_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such image directory"):
        read_yolo(tmp_path / "none", {0: "person"})
    with pytest.raises(DataError, match="expected images"):
        read_yolo(tmp_path, {0: "person"})
    with pytest.raises(DataError, match="Set `category: NAME`"):
        read_yolo(write_dataset(tmp_path), {0: "cat", 1: "dog"})
    (tmp_path / "images/train/b.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"b\.jpg"):
        read_yolo(tmp_path / "images/train", {0: "person", 1: "dog"})


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="0123456789.e-+ naif\n", max_size=60))
def test_any_label_text_raises_only_hkd_errors(tmp_path: Path, text: str) -> None:
    source = write_dataset(tmp_path, text)
    try:
        read_yolo(source, {0: "person", 1: "dog"})
    except HkdError as error:
        assert "a.txt" in str(error)
