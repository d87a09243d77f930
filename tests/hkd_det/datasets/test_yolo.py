"""YOLO folders: what is read, and what is refused with the file's and the line's name."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets.yolo import get_label_path, read_yolo
from hkd_det.errors import DataError, HkdError


def yolo(root: Path, labels: str | None = "0 0.5 0.5 0.2 0.5\n1 0.1 0.1 0.1 0.1\n") -> Path:
    """One picture of 100 x 60 under images/train, its labels beside it."""
    for folder in ("images/train", "labels/train"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(root / "images/train/a.jpg"), np.zeros((60, 100, 3), np.uint8))
    if labels is not None:
        (root / "labels/train/a.txt").write_text(labels)
    return root / "images" / "train"


def test_shares_become_pixels_and_other_classes_are_left_out(tmp_path: Path) -> None:
    (sample,) = read_yolo(yolo(tmp_path), {0: "person", 1: "dog"})
    assert sample.size_hw == (60, 100) and sample.image_id == "a.jpg"
    np.testing.assert_allclose(sample.ground_truth.boxes_xyxy, [[40, 15, 60, 45]])
    (dog,) = read_yolo(tmp_path / "images" / "train", {0: "person", 1: "dog"}, "dog")
    np.testing.assert_allclose(dog.ground_truth.boxes_xyxy, [[5, 3, 15, 9]])


def test_boxes_are_cut_at_the_border_and_empty_ones_ignored(tmp_path: Path) -> None:
    (sample,) = read_yolo(yolo(tmp_path, "0 1.05 0.5 0.4 0.5\n0 0.5 0.0 1.2 0.5\n0 0.5 0.5 0 0.5\n"), {0: "person"})
    np.testing.assert_allclose(
        sample.ground_truth.boxes_xyxy, [[85, 15, 100, 45], [0, 0, 100, 15], [50, 15, 50, 45]], atol=1e-4
    )
    assert sample.ground_truth.ignore.tolist() == [False, False, True]


def test_class_numbers_may_have_gaps_and_names_any_case(tmp_path: Path) -> None:
    (sample,) = read_yolo(yolo(tmp_path, "\ufeff7 0.5 0.5 0.2 0.5\n2 0.5 0.5 0.2 0.5\n"), {2: "dog", 7: "Person"})
    assert len(sample.ground_truth) == 1


def test_pictures_of_one_name_in_two_folders_have_ids_of_their_own(tmp_path: Path) -> None:
    source = yolo(tmp_path)
    (source / "more").mkdir()
    (source / "a.jpg").rename(source / "more" / "a.jpg")
    found = read_yolo(yolo(tmp_path), {0: "person", 1: "dog"})
    assert [(sample.image_id, len(sample.ground_truth)) for sample in found] == [("a.jpg", 1), ("more/a.jpg", 0)]


def test_a_list_that_is_none(tmp_path: Path) -> None:
    source = yolo(tmp_path)
    (tmp_path / "list.txt").write_text("images/train/a.jpg\nimages/b.jpg\nimages/c.jpg\n")
    with pytest.raises(DataError, match=r"b\.jpg: no such picture, and 1 others of the 3"):
        read_yolo(tmp_path / "list.txt", {0: "person"})
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no pictures"):
        read_yolo(tmp_path / "list.txt", {0: "person"})
    (tmp_path / "zeros").write_bytes(bytes(9))
    for no_list in (source / "a.jpg", tmp_path / "zeros"):
        with pytest.raises(DataError, match="not a text file"):
            read_yolo(no_list, {0: "person"})


def test_a_picture_without_labels_shows_nobody(tmp_path: Path) -> None:
    assert len(read_yolo(yolo(tmp_path, labels=None), {0: "person"})[0].ground_truth) == 0
    assert len(read_yolo(yolo(tmp_path, labels="\n"), {0: "person"})[0].ground_truth) == 0


def test_a_text_file_may_list_the_pictures(tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "train.txt").write_text("./images/train/a.jpg\n\n")
    assert len(read_yolo(tmp_path / "train.txt", {0: "person", 1: "dog"})[0].ground_truth) == 1


def test_labels_lie_where_the_last_images_folder_says() -> None:
    assert get_label_path(Path("/data/images/set/images/a.b.jpg")) == Path("/data/images/set/labels/a.b.txt")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0 0.5 0.5 0.2\n", "line 1"),
        ("\n0 0.5 x 0.2 0.5\n", "line 2"),
        ("0 0.5 0.5 nan 0.5\n", "finite"),
        ("7 0.5 0.5 0.2 0.5\n", "class 7"),
        ("0.5 0.5 0.5 0.2 0.5\n", r"class 0\.5"),
        ("0 0.5 0.5 0.2 0.5 0.9\n", "line 1"),
        ("0 0.5 0.5 -0.2 0.5\n", "negative"),
        ("0 320 240 50 90\n", "are they pixels"),
        ("0 1e308 0.5 0.2 0.2\n", "are they pixels"),
        ("0 1.2 0.5 0.2 0.2\n", "outside its picture"),
        ("0 0.5 -0.3 0.2 0.2\n", "outside its picture"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, labels: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_yolo(yolo(tmp_path, labels), {0: "person", 1: "dog"})
    assert "a.txt, line" in str(caught.value)


def test_empty_folders_missing_folders_and_false_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_yolo(tmp_path / "none", {0: "person"})
    with pytest.raises(DataError, match="holds no pictures"):
        read_yolo(tmp_path, {0: "person"})
    with pytest.raises(DataError, match="say `category"):
        read_yolo(yolo(tmp_path), {0: "cat", 1: "dog"})
    (tmp_path / "images/train/b.jpg").write_text("not a picture")
    with pytest.raises(DataError, match=r"b\.jpg"):
        read_yolo(tmp_path / "images/train", {0: "person", 1: "dog"})


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="0123456789.e-+ naif\n", max_size=60))
def test_any_label_text_raises_nothing_but_our_errors(tmp_path: Path, text: str) -> None:
    source = yolo(tmp_path, text)
    try:
        read_yolo(source, {0: "person", 1: "dog"})
    except HkdError as error:
        assert "a.txt" in str(error)
