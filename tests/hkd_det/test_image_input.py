"""Images from Python: a PIL image has the pixels of its file, and a wrong argument names the conversion."""

import gc
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from hkd_det.errors import DataError
from hkd_det.image import ImageReference, load_image, read_image

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
ORIENTATION = 0x0112


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_pil_image_equals_its_file(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(RGB).convert(mode).save(path)
    loaded = load_image(Image.open(path))
    assert loaded.dtype == np.uint8 and loaded.shape == (20, 30, 3)
    assert np.array_equal(loaded, read_image(path))
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(loaded, RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["image.png", "image.webp", "image.tif"])
def test_pil_image_is_upright(tmp_path: Path, name: str, orientation: int) -> None:
    stored = np.zeros((20, 30, 3), np.uint8)
    stored[:5, :7] = (255, 0, 0)  # top left before the image is turned
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / name, exif=exif, **({"lossless": True} if "webp" in name else {}))
    loaded = load_image(Image.open(tmp_path / name))
    assert loaded.shape == ((20, 30, 3) if orientation <= 4 else (30, 20, 3))
    # EXIF: the side of the upright image at which the first stored row and the first stored column are.
    is_bottom, is_right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    corner = loaded[-1 if is_bottom else 0, -1 if is_right else 0]
    assert corner.tolist() == [255, 0, 0] and loaded[..., 0].sum() == 255 * 35
    assert np.array_equal(loaded, read_image(tmp_path / name))


def test_pil_image_of_16_bits_equals_its_file(tmp_path: Path) -> None:
    path = tmp_path / "thermal.png"
    cv2.imwrite(str(path), np.arange(600, dtype=np.uint16).reshape(20, 30) * 4 + 7000)
    loaded = load_image(Image.open(path))
    assert np.array_equal(loaded, read_image(path)) and loaded.min() == 0 and loaded.max() == 255
    assert np.array_equal(load_image(Image.open(path).convert("I")), loaded)


def test_array_is_not_copied_and_bgr_is_reversed(tmp_path: Path) -> None:
    assert load_image(RGB) is RGB
    assert np.array_equal(load_image(RGB[..., ::-1], bgr=True), RGB)
    path = tmp_path / "image.png"
    Image.fromarray(RGB).save(path)
    assert np.array_equal(load_image(cv2.imread(str(path)), bgr=True), RGB)
    for image in (path, str(path), Image.open(path)):
        assert np.array_equal(load_image(image, bgr=True), RGB)  # not an array, so the color order is known


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5), np.uint8), "COLOR_GRAY2RGB"),
        (np.zeros((4, 5, 1), np.uint8), "COLOR_GRAY2RGB"),
        (np.zeros((4, 5, 4), np.uint8), r"image\[\.\.\., :3\]"),
        (np.zeros((3, 4, 5), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), "Pass a list of images"),
        (np.zeros((4, 5, 3)), "got float64 .* Convert the values to uint8, 0 to 255"),
        (Image.new("F", (4, 5)), "mode F"),
        (None, "expected a uint8 array .*, a path or a PIL image, got NoneType"),
    ],
)
def test_wrong_image_names_the_conversion(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(image)  # type: ignore[arg-type]


def test_wrong_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jpg: no such image file\."):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="expected an image file, got a directory"):
        load_image(str(tmp_path))
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(DataError, match=r"text\.jpg: not a readable image"):
        load_image(tmp_path / "text.jpg")


def test_reference_does_not_keep_the_pixels(tmp_path: Path) -> None:
    array, pil_image = RGB.copy(), Image.fromarray(RGB)
    references = [ImageReference(image, False) for image in (array, pil_image, tmp_path / "image.png")]
    assert [reference.resolve() is not None for reference in references] == [True] * 3
    del array, pil_image
    gc.collect()
    assert [reference.resolve() for reference in references] == [None, None, tmp_path / "image.png"]
