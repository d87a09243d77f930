"""Image reading: damaged, oversized and 16-bit files."""

import base64
import io
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hkd_det import image as image_module
from hkd_det.errors import DataError
from hkd_det.image import MAX_PIXELS, decode_image, read_image, read_image_header
from hkd_det.image_header import is_truncated_png, parse_image_header

PNG = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (9, 12, 3)).astype(np.uint8))[1].tobytes()

# 64 x 48 pixels, the left half red; no package of the project writes HEIC.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ACJpbG9jAAAAAERAAAEAAQAAAAABoQABAAAAAAAAAEYAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRt"
    "AAAAAAABAAAA/WlwcnAAAADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5j"
    "bHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBp"
    "eGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAE5tZGF0AAAAQigBr1jm9Oq//841//mz8h7mv/X/+yr1XrZE/4Fd"
    "UktNAlqTJ3mPkOJEAugKw2zFg26bt14T3qzk97tLG4DaFOEhqA=="
)


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


def test_file_that_is_not_an_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("text.jpg", "empty.jpg", "none.jpg"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


@pytest.mark.parametrize("options", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_OPTIMIZE, 1)])
@pytest.mark.parametrize("fill", ["zeros", "ones", "random", "removed"])
def test_jpeg_with_damaged_middle_is_an_error(options: tuple[int, ...], fill: str) -> None:
    raw = cv2.imencode(".jpg", make_scene(), options)[1].tobytes()
    assert decode_image(raw, Path("a.jpg")).shape == (240, 320, 3)
    middle, length = len(raw) // 2, 1024
    replacement = {
        "zeros": bytes(length),
        "ones": b"\xff" * length,
        "random": np.random.default_rng(1).bytes(length),
        "removed": b"",
    }[fill]
    for reduction in (1, 4):
        with pytest.raises(DataError, match=r"a\.jpg: not a readable image \(damaged"):
            decode_image(raw[:middle] + replacement + raw[middle + length :], Path("a.jpg"), reduction)


def test_jpeg_with_a_few_extraneous_bytes_is_read() -> None:
    """Some cameras append bytes to the pixel data."""
    raw = cv2.imencode(".jpg", make_scene())[1].tobytes()
    padded = raw[:-2] + bytes(4) + raw[-2:]
    np.testing.assert_array_equal(decode_image(padded, Path("a.jpg")), decode_image(raw, Path("a.jpg")))
    with pytest.raises(DataError, match="not a readable image"):
        decode_image(raw[:-2] + bytes(100) + raw[-2:], Path("a.jpg"))


def test_jpeg_of_any_color_space_equals_opencv() -> None:
    for mode in ("RGB", "L", "CMYK"):
        buffer = io.BytesIO()
        Image.fromarray(make_scene()).convert(mode).save(buffer, "JPEG")
        expected = cv2.imdecode(np.frombuffer(buffer.getvalue(), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(decode_image(buffer.getvalue(), Path("a.jpg")), expected)


@pytest.mark.parametrize("progressive", [0, 1])
def test_jpeg_without_simplejpeg_has_the_same_pixels(progressive: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reductions = (1, 2, 4, 8)
    image = make_scene()[:233, :315]
    color = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_PROGRESSIVE, progressive))[1].tobytes()
    gray = cv2.imencode(".jpg", image[..., 0])[1].tobytes()
    files = [color, gray, color[:2] + make_thumbnail_segment(gray) + color[2:] + b"appended"]
    expected = [decode_image(raw, Path("a.jpg"), reduction) for raw in files for reduction in reductions]
    monkeypatch.setattr(image_module, "simplejpeg", None)
    decoded = [decode_image(raw, Path("a.jpg"), reduction) for raw in files for reduction in reductions]
    for one, other in zip(decoded, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_jpeg_without_simplejpeg_only_truncation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "simplejpeg", None)
    raw = cv2.imencode(".jpg", make_scene())[1].tobytes()
    segment, middle = make_thumbnail_segment(encode_jpeg((16, 16))), len(raw) // 2
    for complete in (raw, raw[:2] + segment + raw[2:]):
        for ratio in (0.02, 0.3, 0.6, 0.9, 0.99):
            with pytest.raises(DataError, match=r"a\.jpg: not a readable image \(damaged"):
                decode_image(complete[: int(len(complete) * ratio)], Path("a.jpg"))
    damaged = raw[:middle] + bytes(1024) + raw[middle + 1024 :]
    assert decode_image(damaged, Path("a.jpg")).shape == (240, 320, 3)


def make_scene() -> np.ndarray:
    return cv2.resize(np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8), (320, 240))


def make_oversized_files() -> dict[str, bytes]:
    """Return small files whose headers state more than `MAX_PIXELS` pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    tags = [(0x0100, 30_000), (0x0101, 30_000)]
    tiff = (
        b"II" + struct.pack("<HIH", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
    )
    frame = struct.pack("<I", 10) + bytes(4) + (16_382).to_bytes(3, "little") * 2
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + frame
    gif = b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(20)
    raw = bytearray(cv2.imencode(".bmp", np.zeros((4, 6, 3), np.uint8))[1].tobytes())
    raw[18:26] = (100_000).to_bytes(4, "little") * 2
    jpeg = cv2.imencode(".jpg", np.zeros((2048, 2048), np.uint8))[1].tobytes()
    size = (2048).to_bytes(2, "big") * 2
    return {
        "a.png": png,
        "a.tif": tiff + bytes(4),
        "a.webp": webp,
        "a.gif": gif,
        "a.bmp": bytes(raw),
        "a.jpg": jpeg.replace(size, (32_000).to_bytes(2, "big") * 2),
    }


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.gif", "a.bmp", "a.jpg"])
def test_image_with_too_many_pixels_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(make_oversized_files()[name])
    header = parse_image_header(path.read_bytes())
    assert header and header.stored_hw[0] * header.stored_hw[1] > MAX_PIXELS
    monkeypatch.setattr(cv2, "imdecode", pytest.fail)
    for read in (read_image, read_image_header):
        with pytest.raises(
            DataError, match=rf"{name}: too large: \d+ x \d+ pixels, expected at most 134 million pixels"
        ):
            read(path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_image_is_scaled_by_its_used_bits(tmp_path: Path, bits: int, suffix: str) -> None:
    image = make_scene()
    path = tmp_path / f"a{suffix}"
    cv2.imwrite(str(path), np.round(image[..., ::-1] / 255 * (2**bits - 1)).astype(np.uint16))
    assert np.abs(read_image(path).astype(int) - image).max() <= 1


def test_hot_pixel_of_12_bit_image_is_ignored(tmp_path: Path) -> None:
    image = make_scene().astype(np.uint16) * 16
    image[3, 5] = 65_535
    cv2.imwrite(str(tmp_path / "a.png"), image)
    assert np.percentile(read_image(tmp_path / "a.png"), 99) > 200


def test_16_bit_gray_image_is_stretched(tmp_path: Path) -> None:
    """A thermal image uses a narrow range of values far from 0."""
    gray = 7000 + cv2.cvtColor(make_scene(), cv2.COLOR_RGB2GRAY).astype(np.uint16) * 3
    gray[0, 0] = 0  # a dead pixel
    cv2.imwrite(str(tmp_path / "a.png"), gray)
    image = read_image(tmp_path / "a.png")
    assert image.min() == 0 and image.max() == 255 and image.std() > 30
    cv2.imwrite(str(tmp_path / "b.png"), np.full((9, 9), 500, np.uint16))
    assert np.unique(read_image(tmp_path / "b.png")).size == 1


def test_floating_point_image_is_an_error(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.tif"), np.zeros((9, 9, 3), np.float32))
    with pytest.raises(DataError, match=r"a\.tif: expected 8 or 16 bits per value, got float32"):
        read_image(tmp_path / "a.tif")


def test_format_that_opencv_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + bytes(20))
    with pytest.raises(DataError, match=r"OpenCV .* cannot decode \.jxl\)\. Convert it to JPEG or PNG"):
        read_image(tmp_path / "a.jxl")


def test_heic_of_a_phone_is_read() -> None:
    pytest.importorskip("pi_heif")
    image = decode_image(HEIC, Path("a.heic"))
    assert image.shape == (48, 64, 3)
    assert np.abs(image[:, :28].mean((0, 1)) - (200, 60, 60)).max() < 12 and image[:, 36:].mean() < 45
    for damaged in (HEIC[:-50], HEIC[:200] + bytes(40) + HEIC[240:]):
        with pytest.raises(DataError, match=r"a\.heic: not a readable image"):
            decode_image(damaged, Path("a.heic"))


def test_heic_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(DataError, match=r"cannot decode HEIC\)\. Run pip install 'hkd-det\[heic\]'"):
        decode_image(HEIC, Path("a.heic"))


def test_only_a_complete_png_is_complete() -> None:
    assert not is_truncated_png(PNG) and not is_truncated_png(PNG + b"and more")
    assert all(is_truncated_png(PNG[:length]) for length in range(8, len(PNG)))
    assert not is_truncated_png(b"") and not is_truncated_png(b"\xff\xd8 is not a PNG")


def test_png_chunk_longer_than_the_file_is_truncated() -> None:
    """OpenCV would allocate 2 GiB and take half a minute."""
    offset = PNG.index(b"IDAT") - 4
    assert is_truncated_png(PNG[:offset] + bytes.fromhex("7fffff7f") + PNG[offset + 4 :])
