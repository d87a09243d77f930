"""What training reads: what is painted lies where its scale says, however small it was decoded or packed."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.datasets import read_image
from hkd_det.errors import DataError
from hkd_det.train.image_cache import CachedImages, DirectoryCache

fixtures_stay = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, size_hw: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    """A black picture with one white rectangle."""
    picture = np.zeros((*size_hw, 3), np.uint8)
    cv2.rectangle(picture, box[:2], (box[2] - 1, box[3] - 1), (255, 255, 255), cv2.FILLED)
    cv2.imwrite(str(path), picture)
    return path


def opened(path: Path, largest_hw: tuple[float, float], room_bytes: int = 2**20) -> CachedImages:
    folder = path.parent / "kept"
    folder.mkdir(exist_ok=True)
    return CachedImages([path], largest_hw, DirectoryCache(folder), room_bytes)


@settings(fixtures_stay, max_examples=80)
@given(
    st.sampled_from([".jpg", ".png"]),
    st.tuples(*[st.integers(40, 700)] * 2),
    st.tuples(*[st.floats(20, 800)] * 2),
    st.floats(0.05, 1),
)
def test_boxes_scale_with_the_picture(
    tmp_path: Path, suffix: str, size_hw: tuple[int, int], largest_hw: tuple[float, float], part: float
) -> None:
    height, width = size_hw
    box = (width // 4, height // 4, width - width // 8, height - height // 8)
    path = write(tmp_path / f"a{suffix}", size_hw, box)
    pictures = opened(path, largest_hw)
    pictures.cache.clear()
    frame_hw = (largest_hw[0] * part, largest_hw[1] * part)
    fit = min(1.0, frame_hw[0] / height, frame_hw[1] / width)
    for _ in range(2):  # packed now, and kept
        decoded = pictures.read(0, frame_hw)
        rows, columns = decoded.image.shape[:2]
        assert rows >= height * fit - 1 and columns >= width * fit - 1
        across, down = decoded.scale_xy
        white = decoded.image.mean(2) > 127
        where = np.flatnonzero(white.any(0))[[0, -1]], np.flatnonzero(white.any(1))[[0, -1]]
        found = np.array([where[0][0], where[1][0], where[0][1] + 1, where[1][1] + 1])
        np.testing.assert_allclose(np.array(box) * [across, down, across, down], found, atol=1)


def test_a_jpeg_is_decoded_no_larger_than_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", (401, 603), (10, 10, 50, 50))
    pictures = opened(path, (400, 600))
    shapes = {frame: pictures.read(0, frame).image.shape[:2] for frame in [(400, 600), (200, 300), (100, 150)]}
    assert shapes == {(400, 600): (401, 603), (200, 300): (201, 302), (100, 150): (101, 151)}
    assert pictures.read(0, (10, 10)).image.shape[:2] == (51, 76)
    assert not list((tmp_path / "kept").iterdir())  # the file itself is good enough


def test_a_jpeg_far_too_large_is_packed_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", (800, 1200), (10, 10, 50, 50))
    pictures = opened(path, (100, 200))
    first = pictures.read(0, (100, 200))
    assert first.image.shape == (100, 150, 3)
    path.unlink()
    again = opened(path, (100, 200)).read(0, (100, 200))  # another worker
    np.testing.assert_array_equal(first.image, again.image)
    assert first.scale_xy == again.scale_xy == (0.125, 0.125)


def test_packing_changes_little_and_is_the_same_without_room(tmp_path: Path) -> None:
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8), (300, 200))
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), smooth)
    without_room = opened(path, (400, 600), room_bytes=100).read(0, (400, 600)).image
    assert not list((tmp_path / "kept").iterdir())
    pictures = opened(path, (400, 600))
    packed, kept = (pictures.read(0, (400, 600)).image for _ in range(2))
    np.testing.assert_array_equal(packed, without_room)
    np.testing.assert_array_equal(packed, kept)
    assert cv2.PSNR(packed, read_image(path)) > 38


def test_no_more_is_kept_than_there_is_room(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{number}.png", (60, 80), (10, 10, 50, 50)) for number in range(6)]
    folder = tmp_path / "kept"
    folder.mkdir()
    pictures = CachedImages(paths, (60, 80), DirectoryCache(folder), 2**20)
    pictures.read(0, (60, 80))
    size = next(folder.iterdir()).stat().st_size
    pictures = CachedImages(paths, (60, 80), DirectoryCache(folder), 3 * size)
    for index in range(6):
        pictures.read(index, (60, 80))
    assert {kept.name for kept in folder.iterdir()} == {f"{number}.packed" for number in range(4)}


def test_one_process_keeps_them_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", (60, 80), (10, 10, 50, 50))
    pictures = CachedImages([path], (60, 80), {}, 2**20)
    first = pictures.read(0, (60, 80)).image
    path.unlink()
    np.testing.assert_array_equal(pictures.read(0, (60, 80)).image, first)


def test_a_full_disk_ends_the_keeping_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.png", (60, 80), (10, 10, 50, 50))
    pictures = opened(path, (60, 80))

    def full(_path: Path, _raw: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(2):
        assert pictures.read(0, (60, 80)).image.shape == (60, 80, 3)
    assert not list((tmp_path / "kept").iterdir())


def test_broken_pictures_name_the_file(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.jpg", (60, 80), (10, 10, 50, 50)).read_bytes()
    for name, raw in {"cut.jpg": whole[:300], "text.png": b"hello", "empty.jpg": b"", "head.jpg": whole[:2]}.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=name):
            opened(tmp_path / name, (60, 80)).read(0, (60, 80))
    with pytest.raises(DataError, match="gone"):
        opened(tmp_path / "gone.jpg", (60, 80)).read(0, (60, 80))


@settings(fixtures_stay, max_examples=100)
@given(st.sampled_from([".jpg", ".png"]), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1))
def test_a_mutated_picture_is_read_or_refused(tmp_path: Path, suffix: str, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(cv2.imencode(suffix, np.zeros((40, 60, 3), np.uint8))[1].tobytes())
    for at, value in changes:
        raw[at % len(raw)] = value
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(raw))
    try:
        decoded = opened(path, (20, 30), room_bytes=0).read(0, (20, 30))
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert decoded.image.ndim == 3 and min(decoded.scale_xy) > 0
