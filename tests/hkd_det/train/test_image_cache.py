"""Image cache: scale, size and content of the images that training reads."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hkd_det.datasets import read_image
from hkd_det.errors import DataError
from hkd_det.train.image_cache import CachedImages, DirectoryCache

shared_fixtures = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_image(path: Path, size_hw: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    """Write a black image with one white rectangle."""
    image = np.zeros((*size_hw, 3), np.uint8)
    cv2.rectangle(image, box[:2], (box[2] - 1, box[3] - 1), (255, 255, 255), cv2.FILLED)
    cv2.imwrite(str(path), image)
    return path


def open_images(path: Path, max_hw: tuple[float, float], capacity_bytes: int = 2**20) -> CachedImages:
    cache_dir = path.parent / "cache"
    cache_dir.mkdir(exist_ok=True)
    return CachedImages([path], max_hw, DirectoryCache(cache_dir), capacity_bytes)


@settings(shared_fixtures, max_examples=80)
@given(
    st.sampled_from([".jpg", ".png"]),
    st.tuples(*[st.integers(40, 700)] * 2),
    st.tuples(*[st.floats(20, 800)] * 2),
    st.floats(0.05, 1),
)
def test_scale_maps_file_pixels_to_decoded_pixels(
    tmp_path: Path, suffix: str, size_hw: tuple[int, int], max_hw: tuple[float, float], part: float
) -> None:
    height, width = size_hw
    box = (width // 4, height // 4, width - width // 8, height - height // 8)
    path = write_image(tmp_path / f"a{suffix}", size_hw, box)
    images = open_images(path, max_hw)
    images.cache.clear()
    frame_hw = (max_hw[0] * part, max_hw[1] * part)
    fit = min(1.0, frame_hw[0] / height, frame_hw[1] / width)
    for _ in range(2):  # encoded now, and read from the cache
        decoded = images.read(0, frame_hw)
        rows, columns = decoded.image.shape[:2]
        assert rows >= height * fit - 1 and columns >= width * fit - 1
        scale_x, scale_y = decoded.scale_xy
        white = decoded.image.mean(2) > 127
        (x1, x2), (y1, y2) = np.flatnonzero(white.any(0))[[0, -1]], np.flatnonzero(white.any(1))[[0, -1]]
        extent = np.array([x1, y1, x2 + 1, y2 + 1])
        np.testing.assert_allclose(np.array(box) * [scale_x, scale_y, scale_x, scale_y], extent, atol=1)


def test_jpeg_is_decoded_at_the_smallest_sufficient_size(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg", (401, 603), (10, 10, 50, 50))
    images = open_images(path, (400, 600))
    shapes = {frame: images.read(0, frame).image.shape[:2] for frame in [(400, 600), (200, 300), (100, 150)]}
    assert shapes == {(400, 600): (401, 603), (200, 300): (201, 302), (100, 150): (101, 151)}
    assert images.read(0, (10, 10)).image.shape[:2] == (51, 76)
    assert not list((tmp_path / "cache").iterdir())  # the file itself is used


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("frame_hw", [(400, 300), (100, 75), (40, 30)])
def test_image_turned_by_exif_has_upright_scale(tmp_path: Path, suffix: str, frame_hw: tuple[int, int]) -> None:
    """The stored pixels lie on their side; the white rectangle is at the upper left of the upright image."""
    upright = np.zeros((400, 300, 3), np.uint8)
    upright[40:200, 30:90] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.rot90(upright)).save(path, exif=exif)
    decoded = open_images(path, (400, 300)).read(0, frame_hw)
    scale_x, scale_y = decoded.scale_xy
    assert decoded.image.shape[0] > decoded.image.shape[1] and scale_x == pytest.approx(scale_y, rel=0.02)
    white = decoded.image.mean(2) > 127
    rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(np.array([30, 40, 90, 200]) * ([scale_x, scale_y] * 2), extent, atol=1)


def test_far_too_large_jpeg_is_encoded_once(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg", (800, 1200), (10, 10, 50, 50))
    images = open_images(path, (100, 200))
    first = images.read(0, (100, 200))
    assert first.image.shape == (100, 150, 3)
    path.unlink()
    again = open_images(path, (100, 200)).read(0, (100, 200))  # another worker
    np.testing.assert_array_equal(first.image, again.image)
    assert first.scale_xy == again.scale_xy == (0.125, 0.125)


def test_encoding_is_close_to_source_and_same_without_cache(tmp_path: Path) -> None:
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8), (300, 200))
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), smooth)
    uncached = open_images(path, (400, 600), capacity_bytes=100).read(0, (400, 600)).image
    assert not list((tmp_path / "cache").iterdir())
    images = open_images(path, (400, 600))
    encoded, cached = (images.read(0, (400, 600)).image for _ in range(2))
    np.testing.assert_array_equal(encoded, uncached)
    np.testing.assert_array_equal(encoded, cached)
    assert cv2.PSNR(encoded, read_image(path)) > 38


def test_cache_stays_within_its_capacity(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{number}.png", (60, 80), (10, 10, 50, 50)) for number in range(6)]
    folder = tmp_path / "cache"
    folder.mkdir()
    images = CachedImages(paths, (60, 80), DirectoryCache(folder), 2**20)
    images.read(0, (60, 80))
    size = next(folder.iterdir()).stat().st_size
    images = CachedImages(paths, (60, 80), DirectoryCache(folder), 3 * size)
    for index in range(6):
        images.read(index, (60, 80))
    assert {entry.name for entry in folder.iterdir()} == {f"{number}.bin" for number in range(4)}


def test_single_process_caches_in_memory(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", (60, 80), (10, 10, 50, 50))
    images = CachedImages([path], (60, 80), {}, 2**20)
    first = images.read(0, (60, 80)).image
    path.unlink()
    np.testing.assert_array_equal(images.read(0, (60, 80)).image, first)


def test_full_disk_disables_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(tmp_path / "a.png", (60, 80), (10, 10, 50, 50))
    images = open_images(path, (60, 80))

    def raise_disk_full(_path: Path, _raw: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", raise_disk_full)
    for _ in range(2):
        assert images.read(0, (60, 80)).image.shape == (60, 80, 3)
    assert not list((tmp_path / "cache").iterdir())


def test_broken_image_error_names_the_file(tmp_path: Path) -> None:
    complete = write_image(tmp_path / "whole.jpg", (60, 80), (10, 10, 50, 50)).read_bytes()
    for name, raw in {
        "cut.jpg": complete[:300],
        "text.png": b"hello",
        "empty.jpg": b"",
        "head.jpg": complete[:2],
    }.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=name):
            open_images(tmp_path / name, (60, 80)).read(0, (60, 80))
    with pytest.raises(DataError, match="gone"):
        open_images(tmp_path / "gone.jpg", (60, 80)).read(0, (60, 80))


@settings(shared_fixtures, max_examples=100)
@given(st.sampled_from([".jpg", ".png"]), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1))
def test_mutated_image_is_read_or_raises_data_error(
    tmp_path: Path, suffix: str, changes: list[tuple[int, int]]
) -> None:
    raw = bytearray(cv2.imencode(suffix, np.zeros((40, 60, 3), np.uint8))[1].tobytes())
    for at, value in changes:
        raw[at % len(raw)] = value
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(raw))
    try:
        decoded = open_images(path, (20, 30), capacity_bytes=0).read(0, (20, 30))
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert decoded.image.ndim == 3 and min(decoded.scale_xy) > 0
