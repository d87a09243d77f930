"""Size and orientation of image files of all formats, compared with Pillow."""

import io
import json
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError
from hkd_det.image import decode_image, read_image, read_image_header
from hkd_det.image_header import JPEG2000_SIZE, ImageHeader, parse_image_header

SCENE = cv2.resize(np.random.default_rng(0).integers(0, 255, (3, 4, 3)).astype(np.uint8), (48, 32))
EXIF_FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WebP": ".webp", "TIFF": ".tif", "AVIF": ".avif"}
OTHER_FORMATS = {"BMP": ".bmp", "GIF": ".gif", "PPM": ".ppm", "JPEG2000": ".jp2", "MPO": ".mpo"}


def skip_without_decoder(name: str, raw: bytes) -> None:
    """Skip formats that older builds of OpenCV cannot decode."""
    if name in ("AVIF", "GIF") and cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR) is None:
        pytest.skip(f"OpenCV {cv2.__version__} cannot decode {name}")


def encode(name: str, orientation: int | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    Image.fromarray(SCENE).save(buffer, name, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", EXIF_FORMATS)
def test_image_with_orientation_is_upright(tmp_path: Path, name: str, orientation: int) -> None:
    raw = encode(name, orientation)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB"))
    header = parse_image_header(raw)
    assert header == ImageHeader(name, (32, 48), orientation)
    assert header.size_hw == upright.shape[:2]
    path = tmp_path / f"a{EXIF_FORMATS[name]}"
    path.write_bytes(raw)
    assert read_image_header(path) == header
    skip_without_decoder(name, raw)
    image = read_image(path)
    assert image.shape == upright.shape and np.abs(image.astype(int) - upright).mean() < 3


@pytest.mark.parametrize("name", [*EXIF_FORMATS, *OTHER_FORMATS])
def test_image_without_exif_is_read(name: str) -> None:
    raw = encode(name)
    header = parse_image_header(raw)
    assert header and header.size_hw == (32, 48) and header.orientation == 1
    skip_without_decoder(name, raw)
    assert decode_image(raw, Path("a")).shape == (32, 48, 3)


def test_variants_of_formats_have_the_same_size() -> None:
    raws = [encode("WebP", lossless=True), encode("PNG", optimize=True), encode("TIFF", big_tiff=True)]
    raws += [encode("JPEG", progressive=True), encode("JPEG2000", no_jp2=True)]
    raws += [b"P6 # width\n48\n# height\n32 255\n" + SCENE.tobytes()]
    for raw in raws:
        header = parse_image_header(raw)
        assert header and header.stored_hw == (32, 48)
        np.testing.assert_allclose(decode_image(raw, Path("a")).mean(), SCENE.mean(), atol=2)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_of_both_byte_orders_is_read(order: str) -> None:
    entries = [(0x0100, 4, 640), (0x0101, 4, 480), (0x0112, 3, 6)]
    tiff = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(entries))
    for tag, kind, value in entries:
        tiff += struct.pack(order + ("HHIHxx" if kind == 3 else "HHII"), tag, kind, 1, value)
    segment = b"Exif\0\0" + tiff + bytes(4)
    jpeg = encode("JPEG")
    raw = jpeg[:2] + b"\xff\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]  # padded marker
    assert parse_image_header(raw) == ImageHeader("JPEG", (32, 48), 6)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_invalid_orientation_is_upright(orientation: int) -> None:
    header = parse_image_header(encode("JPEG", orientation))
    assert header and header.orientation == 1


def test_size_of_jpeg2000_is_that_of_codestream() -> None:
    raw = encode("JPEG2000")
    offset = raw.index(JPEG2000_SIZE) + 8
    header = parse_image_header(raw[:offset] + struct.pack(">II", 30_000, 30_000) + raw[offset + 8 :])
    assert header and header.stored_hw == (30_000, 30_000)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(st.sampled_from([*EXIF_FORMATS, *OTHER_FORMATS]), st.data())
def test_any_bytes_have_a_header_or_none(name: str, data: st.DataObject) -> None:
    raw = bytearray(encode(name, 6 if name in EXIF_FORMATS else None))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, min(500, len(raw)) - 1))] = data.draw(st.integers(0, 255))
    header = parse_image_header(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    assert header is None or (min(header.stored_hw) > 0 and 1 <= header.orientation <= 8)


def test_labels_of_turned_images_refer_to_the_upright_image(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name, suffix in EXIF_FORMATS.items():
        (tmp_path / "images" / f"{name}{suffix}").write_bytes(encode(name, 6))
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.25 0.5 0.5 0.25")
    (tmp_path / "data.yaml").write_text("train: images\nnames: {0: person}\n")
    samples = load_dataset(str(tmp_path / "data.yaml"), "train")
    assert len(samples) == len(EXIF_FORMATS)
    for sample in samples:
        assert sample.size_hw == (48, 32)
        assert sample.ground_truth.boxes_xyxy.tolist() == [[0, 18, 16, 30]]


def test_annotated_size_of_stored_pixels_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "turned.jpg").write_bytes(encode("JPEG", 6))
    path = tmp_path / "data.yaml"
    path.write_text("format: coco\ntrain: {images: ., annotations: all.json}\n")
    image = {"id": 1, "file_name": "turned.jpg", "width": 48, "height": 32}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "all.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"turned\.jpg: .*got 32 x 48: its EXIF orientation turns it\. Annotate"):
        load_dataset(str(path), "train")
    content["images"] = [{**image, "width": 32, "height": 48}]
    (tmp_path / "all.json").write_text(json.dumps(content))
    assert load_dataset(str(path), "train")[0].size_hw == (48, 32)


def test_file_without_header_is_an_error(tmp_path: Path) -> None:
    for name, raw in (("empty.png", b""), ("text.jpg", b"hello"), ("cut.png", encode("PNG")[:12])):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=rf"{name}: not a readable image"):
            read_image_header(tmp_path / name)
    with pytest.raises(DataError, match=r"none\.png: no such image"):
        read_image_header(tmp_path / "none.png")
