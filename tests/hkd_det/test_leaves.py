"""Boxes, detections, letterbox, files, sizes, errors: the leaves everything else stands on."""

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det import boxes as box_math
from hkd_det.datasets import read_image
from hkd_det.errors import DataError, UsageError, run_command
from hkd_det.files import atomic_write, atomic_write_dir, write_text
from hkd_det.letterbox import PAD_VALUE, Letterbox, format_imgsz, parse_imgsz
from hkd_det.structures import Detections

corners = st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 20)] * 2).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


@settings(deadline=None)
@given(st.lists(corners, min_size=1, max_size=4), st.lists(corners, min_size=1, max_size=4))
def test_overlaps_equal_counted_pixels(a: list[list[int]], b: list[list[int]]) -> None:
    def mask(box: list[int]) -> np.ndarray:
        canvas = np.zeros((60, 60), bool)
        canvas[box[1] : box[3], box[0] : box[2]] = True
        return canvas

    first, second = np.array(a, float), np.array(b, float)
    shared, overlap = box_math.box_intersection(first, second), box_math.box_iou(first, second)
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            together = int((mask(one) & mask(other)).sum())
            assert shared[i, j] == together
            assert overlap[i, j] == pytest.approx(together / (mask(one) | mask(other)).sum())
    np.testing.assert_array_equal(box_math.xyxy_from_xywh(box_math.xywh_from_xyxy(first)), first)


def test_empty_and_inverted_boxes_have_no_area() -> None:
    nothing = np.zeros((0, 4))
    assert box_math.box_iou(nothing, nothing).shape == (0, 0)
    assert box_math.box_area(np.array([[5.0, 5.0, 1.0, 9.0]])).tolist() == [0]
    point = np.array([[3.0, 3.0, 3.0, 3.0]])
    assert box_math.box_iou(point, point).tolist() == [[0]]


def test_detections_are_sorted_and_matched_in_length() -> None:
    found = Detections(np.arange(12, dtype=np.float64).reshape(3, 4), np.array([0.1, 0.9, 0.5]))
    np.testing.assert_allclose(found.scores, [0.9, 0.5, 0.1])
    assert found.boxes_xyxy[0].tolist() == [4, 5, 6, 7] and found.boxes_xyxy.dtype == np.float32
    assert len(found.filter(0.5)) == 2 and len(Detections.empty()) == 0
    with pytest.raises(ValueError, match="2 boxes but 1 scores"):
        Detections(np.zeros((2, 4)), np.zeros(1))


sides = st.integers(2, 400)


@settings(deadline=None)
@given(sides, sides, st.integers(1, 8), st.integers(1, 8), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_letterbox_there_and_back(height: int, width: int, rows: int, columns: int, shares: list[float]) -> None:
    letterbox = Letterbox((height, width), (32 * rows, 32 * columns))
    x1, x2 = sorted((shares[0] * width, shares[1] * width))
    y1, y2 = sorted((shares[2] * height, shares[3] * height))
    box = np.array([[x1, y1, x2, y2]])
    there = letterbox.boxes_to_input(box)
    np.testing.assert_allclose(letterbox.boxes_to_source(there), box, atol=1e-3)
    content_height, content_width = letterbox.content_hw
    assert 1 <= content_height <= 32 * rows and 1 <= content_width <= 32 * columns
    assert content_height == 32 * rows or content_width == 32 * columns
    assert (there <= np.array([content_width, content_height] * 2) + 1e-3).all()


@pytest.mark.parametrize("source_hw", [(32, 64), (20, 64), (90, 50), (7, 300), (96, 64)])
def test_letterbox_writes_into_a_row_of_a_batch_and_nowhere_else(source_hw: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*source_hw, 3), dtype=np.uint8)
    batch = np.full((3, 32, 64, 3), 7, np.uint8)
    letterbox = Letterbox(source_hw, (32, 64))
    assert np.shares_memory(letterbox.apply(picture[..., ::-1], batch[1]), batch)
    assert np.array_equal(batch[1], letterbox.apply(picture[..., ::-1].copy()))
    assert (batch[[0, 2]] == 7).all()


def test_letterbox_keeps_content_and_pads_with_grey() -> None:
    picture = np.zeros((20, 80, 3), np.uint8)
    picture[5:15, 20:40] = (255, 0, 0)
    fitted = Letterbox((20, 80), (64, 160)).apply(picture)
    assert fitted.shape == (64, 160, 3) and (fitted[40:] == PAD_VALUE).all()
    x1, y1, x2, y2 = Letterbox((20, 80), (64, 160)).boxes_to_input(np.array([[20, 5, 40, 15]]))[0].astype(int)
    assert (fitted[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] == (255, 0, 0)).all()
    same = Letterbox((64, 160), (64, 160)).apply(np.full((64, 160, 3), 9, np.uint8))
    assert (same == 9).all()


@pytest.mark.parametrize(("text", "size"), [("640", (640, 640)), ("640x512", (512, 640)), ("1024X512", (512, 1024))])
def test_imgsz_is_width_by_height(text: str, size: tuple[int, int]) -> None:
    assert parse_imgsz(text) == size
    assert parse_imgsz(format_imgsz(size)) == size


@pytest.mark.parametrize("text", ["", "x", "640x", "640x512x3", "-64", "0", "6.4", "100", "640x500", "٦٤"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--imgsz"):
        parse_imgsz(text)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "first")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_write(path) as aside:
            aside.write_text("half")
            assert aside.suffix == ".txt"
            raise error
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["file.txt"]
    write_text(path, "second")
    assert path.read_text() == "second" and path.stat().st_mode & 0o444


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    for text in ("first", "second"):
        with atomic_write_dir(path) as aside:
            (aside / f"{text}.txt").write_text(text)
        assert [p.name for p in path.iterdir()] == [f"{text}.txt"] and path.stat().st_mode & 0o055
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_write_dir(path) as aside:
            (aside / "half.txt").touch()
            raise error
    assert [p.name for p in path.iterdir()] == ["second.txt"] and [p.name for p in path.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--x: no"), 2, "hkd: --x: no"),
        (DataError("a.jpg: broken"), 1, "hkd: a.jpg: broken"),
        (OSError(28, "No space left on device", "b.pt"), 1, "hkd: b.pt: No space left on device"),
        (KeyboardInterrupt(), 130, "hkd: interrupted"),
    ],
)
def test_commands_end_in_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(_argv: Sequence[str] | None) -> int:
        raise error

    assert run_command("hkd", body, []) == code
    assert capsys.readouterr().err.strip() == line


def test_errors_of_our_own_making_are_not_hidden() -> None:
    def body(_argv: Sequence[str] | None) -> int:
        return int(math.sqrt(-1))

    with pytest.raises(ValueError):
        run_command("hkd", body, [])


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_truncated_picture_is_an_error_not_grey(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"whole{suffix}"
    picture = cv2.resize(np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8), (300, 200))
    cv2.imwrite(str(path), picture)
    read = read_image(path)
    assert read.shape == (200, 300, 3)
    np.testing.assert_allclose(read[:, :, ::-1].astype(int).mean((0, 1)), picture.mean((0, 1)), atol=2)
    raw = path.read_bytes()
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(raw[: int(len(raw) * share)])
        with pytest.raises(DataError, match="cut"):
            read_image(cut)


def test_a_jpeg_with_a_thumbnail_or_a_film_behind_it(tmp_path: Path) -> None:
    """A cut picture with a whole thumbnail in its header is cut; a whole one may have anything appended."""
    path = tmp_path / "a.jpg"
    small, large = (
        cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8))[1].tobytes()
        for side in (16, 64)
    )
    segment = b"\xff\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small  # markers may be padded with 0xFF
    whole = large[:2] + segment + large[2:]
    path.write_bytes(whole + b"film" * 5000)
    assert read_image(path).shape == (64, 64, 3)
    for length in (2, 2 + len(segment), len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.jpg: not a readable picture"):
            read_image(path)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([".jpg", ".png"]), st.data())
def test_a_mutated_picture_is_read_or_refused(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    raw = bytearray(cv2.imencode(suffix, np.zeros((4, 6, 3), np.uint8))[1].tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(raw))
    try:
        picture = read_image(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3


def test_a_picture_too_large_for_opencv_is_one_line(tmp_path: Path) -> None:
    raw = bytearray(cv2.imencode(".bmp", np.zeros((4, 6, 3), np.uint8))[1].tobytes())
    raw[18:26] = (100_000).to_bytes(4, "little") * 2  # width and height in a BMP's header
    (tmp_path / "a.bmp").write_bytes(bytes(raw))
    with pytest.raises(DataError, match=r"a\.bmp: not a readable picture"):
        read_image(tmp_path / "a.bmp")


def test_what_is_no_picture_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("text.jpg", "empty.jpg", "none.jpg"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)
