"""Image reading, and integrity checks of JPEG and PNG files."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_det.errors import DataError
from hkd_det.image import is_truncated_jpeg, is_truncated_png, parse_jpeg_size_hw, read_image

PNG = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (9, 12, 3)).astype(np.uint8))[1].tobytes()


def encode_jpeg(size_hw: tuple[int, int], *options: int) -> bytes:
    image = np.random.default_rng(0).integers(0, 255, (*size_hw, 3)).astype(np.uint8)
    return cv2.imencode(".jpg", image, options)[1].tobytes()


def make_thumbnail_segment(thumbnail: bytes) -> bytes:
    return b"\xff\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail  # markers can be padded with 0xFF


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_image_is_an_error(tmp_path: Path, suffix: str) -> None:
    path, cut_path = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    image = cv2.resize(np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8), (300, 200))
    cv2.imwrite(str(path), image)
    result = read_image(path)
    assert result.shape == (200, 300, 3)
    np.testing.assert_allclose(result[:, :, ::-1].astype(int).mean((0, 1)), image.mean((0, 1)), atol=2)
    raw = path.read_bytes()
    for ratio in (0.02, 0.3, 0.6, 0.9, 0.99):
        cut_path.write_bytes(raw[: int(len(raw) * ratio)])
        with pytest.raises(DataError, match="cut"):
            read_image(cut_path)


def test_jpeg_with_thumbnail_and_appended_video(tmp_path: Path) -> None:
    """A truncated image with a complete thumbnail is truncated; a complete image can have appended data."""
    path = tmp_path / "a.jpg"
    segment, large = make_thumbnail_segment(encode_jpeg((16, 16))), encode_jpeg((64, 64))
    complete = large[:2] + segment + large[2:]
    path.write_bytes(complete + b"video" * 5000)
    assert read_image(path).shape == (64, 64, 3)
    for length in (2, 2 + len(segment), len(complete) // 2, len(complete) - 2):
        path.write_bytes(complete[:length])
        with pytest.raises(DataError, match=r"a\.jpg: not a readable image"):
            read_image(path)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([".jpg", ".png"]), st.data())
def test_mutated_image_is_read_or_rejected(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    raw = bytearray(cv2.imencode(suffix, np.zeros((4, 6, 3), np.uint8))[1].tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(raw))
    try:
        image = read_image(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_image_too_large_for_opencv_is_an_error(tmp_path: Path) -> None:
    raw = bytearray(cv2.imencode(".bmp", np.zeros((4, 6, 3), np.uint8))[1].tobytes())
    raw[18:26] = (100_000).to_bytes(4, "little") * 2  # width and height in the header of a BMP
    (tmp_path / "a.bmp").write_bytes(bytes(raw))
    with pytest.raises(DataError, match=r"a\.bmp: not a readable image"):
        read_image(tmp_path / "a.bmp")


def test_file_that_is_not_an_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("text.jpg", "empty.jpg", "none.jpg"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(1, 300)] * 2), st.booleans(), st.integers(0, 20))
def test_jpeg_size_equals_decoded_size(size_hw: tuple[int, int], progressive: bool, restart: int) -> None:
    raw = encode_jpeg(size_hw, cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive), cv2.IMWRITE_JPEG_RST_INTERVAL, restart)
    assert parse_jpeg_size_hw(raw) == size_hw
    assert parse_jpeg_size_hw(raw[:2] + make_thumbnail_segment(encode_jpeg((8, 9))) + raw[2:]) == size_hw


@pytest.mark.parametrize("raw", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG" + encode_jpeg((4, 4)), b"text"])
def test_bytes_without_jpeg_header_have_no_size(raw: bytes) -> None:
    assert parse_jpeg_size_hw(raw) is None


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200) | st.integers(0, 700).map(lambda length: encode_jpeg((9, 12))[:length]))
def test_any_bytes_have_a_jpeg_size_or_none(raw: bytes) -> None:
    size_hw = parse_jpeg_size_hw(raw if raw.startswith(b"\xff\xd8") else b"\xff\xd8" + raw)
    assert size_hw is None or min(size_hw) > 0


@pytest.mark.parametrize("options", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_OPTIMIZE, 1)])
def test_jpeg_size_beyond_its_bytes_is_truncated(options: tuple[int, ...]) -> None:
    """OpenCV would fill 3 GB with gray. A uniform image, which compresses best, must pass."""
    raw = cv2.imencode(".jpg", np.zeros((2048, 2048), np.uint8), options)[1].tobytes()
    assert not is_truncated_jpeg(raw)
    size = (2048).to_bytes(2, "big") * 2
    assert raw.count(size) == 1 and is_truncated_jpeg(raw.replace(size, (32000).to_bytes(2, "big") * 2))


def test_only_a_complete_png_is_complete() -> None:
    assert not is_truncated_png(PNG) and not is_truncated_png(PNG + b"and more")
    assert all(is_truncated_png(PNG[:length]) for length in range(8, len(PNG)))
    assert not is_truncated_png(b"") and not is_truncated_png(b"\xff\xd8 is not a PNG")


def test_png_chunk_longer_than_the_file_is_truncated() -> None:
    """OpenCV would allocate 2 GiB and take half a minute."""
    offset = PNG.index(b"IDAT") - 4
    assert is_truncated_png(PNG[:offset] + bytes.fromhex("7fffff7f") + PNG[offset + 4 :])
