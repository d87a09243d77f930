"""Label files of YOLO images: where they are found, and problems between images and label files."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from hkd_det.datasets.base import DatasetError
from hkd_det.datasets.yolo import read_yolo
from hkd_det.errors import DataError

NAMES = {0: "person", 1: "car"}
ROW = "0 0.5 0.5 0.2 0.5\n"


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = ".png" if path.suffix == ".png" else ".jpg"
    path.write_bytes(cv2.imencode(encoding, np.zeros((60, 100, 3), np.uint8))[1].tobytes())


def write_files(root: Path, *names: str) -> None:
    """Write images, and label files with one person."""
    for name in names:
        if name.endswith(".txt"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(ROW)
        else:
            write_image(root / name)


def read(source: Path) -> tuple[list[int], dict[str, DatasetError]]:
    """Return the number of boxes of each image, and the problems by kind."""
    errors: list[DataError] = []
    samples = read_yolo(source, NAMES, "", errors.append)
    return [len(sample.ground_truth) for sample in samples], {
        error.kind: error for error in errors if isinstance(error, DatasetError)
    }


@pytest.mark.parametrize(
    ("image", "label", "source"),
    [
        ("images/train/a.jpg", "labels/train/a.txt", "images/train"),
        ("images/a.jpg", "images/a.txt", "images"),
        ("train/a.jpg", "train/a.txt", "train"),
        ("Images/a.jpg", "Labels/a.txt", "Images"),
        ("IMAGES/Train/a.jpg", "LABELS/train/a.txt", "IMAGES/Train"),
        ("images/a.jpg", "label/a.txt", "images"),
        ("img/a.jpg", "labels/a.txt", "img"),
        ("images/site/frames/a.jpg", "images/site/labels/a.txt", "images/site/frames"),
        ("train/a.jpg", "labels/train/a.txt", "train"),
        ("train/a.jpg", "train/labels/a.txt", "train"),
        ("images/A.JPG", "labels/a.TXT", "images"),
        ("images/a.jpg", "labels/a.jpg.txt", "images"),
    ],
)
def test_label_file_is_found(tmp_path: Path, image: str, label: str, source: str) -> None:
    write_image(tmp_path / image)
    (tmp_path / label).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / label).write_text(ROW)
    assert read(tmp_path / source) == ([1], {})


def test_no_label_file_is_an_error_with_counts(tmp_path: Path) -> None:
    write_files(tmp_path, "images/train/a.jpg", "images/train/b.jpg", "labels/train/x.txt", "labels/train/y.txt")
    (tmp_path / "labels/train/classes.txt").write_text("person\ncar\n")
    counts, problems = read(tmp_path / "images/train")
    assert counts == [0, 0] and set(problems) == {"no_labels", "label_without_image"}
    assert "2 of 2 images" in str(problems["no_labels"]) and "2 label files are not read" in str(problems["no_labels"])
    with pytest.raises(DataError, match="no label file for 2 of 2"):
        read_yolo(tmp_path / "images/train", NAMES)


def test_label_files_in_another_directory_are_counted(tmp_path: Path) -> None:
    write_files(tmp_path, "images/train/a.jpg", "texts/a.txt", "texts/b.txt")
    assert "2 label files are not read" in str(read(tmp_path / "images/train")[1]["no_labels"])


def test_label_file_without_image_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path, "images/a.jpg", "images/b_1.jpg", "images/b_2.jpg", "labels/a.txt", "labels/b.txt")
    counts, problems = read(tmp_path / "images")
    assert counts == [1, 0, 0]
    error = problems["label_without_image"]
    assert error.is_error and error.file.endswith("b.txt") and "2 of 3 images have no label file" in str(error)
    assert not problems["image_without_label"].is_error
    with pytest.raises(DataError, match=r"b\.txt: label file without an image"):
        read_yolo(tmp_path / "images", NAMES)


def test_superfluous_label_file_does_not_stop_training(tmp_path: Path) -> None:
    write_files(tmp_path, "images/a.jpg", "labels/a.txt", "labels/cam2/b.txt")
    assert read(tmp_path / "images")[1]["label_without_image"].is_error
    assert len(read_yolo(tmp_path / "images", NAMES)) == 1


def test_labels_of_images_of_another_list_are_no_problem(tmp_path: Path) -> None:
    write_files(tmp_path, "images/a.jpg", "images/b.jpg", "labels/a.txt", "labels/b.txt")
    (tmp_path / "train.txt").write_text("images/a.jpg\n")
    assert read(tmp_path / "train.txt") == ([1], {})


def test_label_file_of_two_images_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path, "images/lot.jpg", "images/lot.png", "images/way.jpg", "labels/lot.txt", "labels/way.txt")
    _, problems = read(tmp_path / "images")
    assert set(problems) == {"shared_label_file"} and problems["shared_label_file"].count == 2
    with pytest.raises(DataError, match=r"lot\.txt: label file of 2 images"):
        read_yolo(tmp_path / "images", NAMES)


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    write_files(tmp_path, "images/a.jpg", "labels/a.txt")
    for name in ("images/._a.jpg", "images/__MACOSX/._a.jpg", "labels/._a.txt", "images/@eaDir/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"Mac OS X")
    assert read(tmp_path / "images") == ([1], {})


def test_linked_directories_are_read_once(tmp_path: Path) -> None:
    write_files(tmp_path, "images/a.jpg", "store/b.jpg", "labels/a.txt", "labels/cam/b.txt")
    (tmp_path / "images/cam").symlink_to(tmp_path / "store", target_is_directory=True)
    assert read(tmp_path / "images") == ([1, 1], {})
    (tmp_path / "store/loop").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "images/up").symlink_to(tmp_path, target_is_directory=True)
    counts, problems = read(tmp_path / "images")
    assert counts == [1, 1] and set(problems) == {"repeated_directory"}
    assert not problems["repeated_directory"].is_error


def test_repeated_images_are_read_once(tmp_path: Path) -> None:
    write_files(tmp_path, "images/a.jpg", "images/b.jpg", "labels/a.txt", "labels/b.txt")
    lines = [
        "images/a.jpg",
        "./images/a.jpg",
        "images/../images/a.jpg",
        "images\\b.jpg",
        str(tmp_path / "images/b.jpg"),
    ]
    (tmp_path / "train.txt").write_text("\r\n".join(lines))
    counts, problems = read(tmp_path / "train.txt")
    assert counts == [1, 1] and problems["repeated_image"].count == 3 and not problems["repeated_image"].is_error
    counts = [len(one.ground_truth) for one in read_yolo([tmp_path / "images", tmp_path / "train.txt"], NAMES)]
    assert counts == [1, 1]


@pytest.mark.parametrize(
    "line",
    [
        ".\\images\\a.jpg",
        "images\\a.jpg",
        "data/images/a.jpg",
        "C:\\Users\\me\\set\\images\\a.jpg",
        "/home/me/set/images/a.jpg",
        "../set/images/a.jpg",
        "set/images/a.jpg",
    ],
)
def test_listed_path_of_another_machine_is_found(tmp_path: Path, line: str) -> None:
    write_files(tmp_path, "images/a.jpg", "labels/a.txt")
    (tmp_path / "train.txt").write_text(f"\ufeff{line}\r\n", encoding="utf-8")
    assert read(tmp_path / "train.txt") == ([1], {})


def test_unsupported_image_with_label_is_an_error(tmp_path: Path) -> None:
    write_files(
        tmp_path, "images/a.jfif", "images/b.JPE", "images/c.gif", "labels/a.txt", "labels/b.txt", "labels/c.txt"
    )
    counts, problems = read(tmp_path / "images")
    assert counts == [1, 1] and set(problems) == {"image_format"} and problems["image_format"].file.endswith("c.gif")


def test_repeated_boxes_are_read_once(tmp_path: Path) -> None:
    write_files(tmp_path, "images/a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text(ROW + "0 0.50 0.5 0.20 0.5\n0 0.3 0.5 0.2 0.5\n" + ROW)
    counts, problems = read(tmp_path / "images")
    assert counts == [2] and problems["repeated_box"].count == 2 and not problems["repeated_box"].is_error


def read_rows(root: Path, text: str, **options: int) -> list[list[float]]:
    """Return the boxes of one image, 0 to 1."""
    write_files(root, "images/a.jpg")
    (root / "labels").mkdir()
    (root / "labels/a.txt").write_text(text)
    (sample,) = read_yolo(root / "images", NAMES, **options)
    return (sample.ground_truth.boxes_xyxy / [100, 60, 100, 60]).round(4).tolist()


def test_polygons_and_boxes_are_read_row_by_row(tmp_path: Path) -> None:
    rows = (
        "0 0.1 0.2 0.4 0.2 0.3 0.9",
        "0 0.5 0.5 0.2 0.4",
        "0 0.6 0.1 0.9 0.2 0.8 0.7 0.5 0.6",
        "1 0.1 0.1 0.2 0.1 0.2 0.2",
    )
    assert read_rows(tmp_path, "\n".join(rows)) == [[0.1, 0.2, 0.4, 0.9], [0.4, 0.3, 0.6, 0.7], [0.5, 0.1, 0.9, 0.7]]


def test_pose_rows_are_read_as_boxes(tmp_path: Path) -> None:
    with_visibility = "0 0.5 0.5 0.2 0.4 0.45 0.4 2 0.55 0.6 1 0 0 0 0.5 0.5 2\n"
    assert read_rows(tmp_path / "a", with_visibility) == [[0.4, 0.3, 0.6, 0.7]]
    assert read_rows(tmp_path / "b", "0 0.5 0.5 0.2 0.4 0.45 0.4 0.55 0.6\n", num_keypoint_values=4) == [
        [0.4, 0.3, 0.6, 0.7]
    ]


def test_rows_of_corners_are_an_error(tmp_path: Path) -> None:
    rows = ["0 0.1 0.2 0.2 0.8", "0 0.4 0.3 0.5 0.9", "0 0.7 0.1 0.8 0.6"]
    with pytest.raises(DataError, match=r"3 of 3 boxes reach beyond their image.*corners"):
        read_rows(tmp_path, "\n".join(rows))
