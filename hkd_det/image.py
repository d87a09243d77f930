"""Image reading: every image is decoded upright, as 8-bit RGB, after its size is read from the header.

Annotated boxes refer to the upright image, as in labeling tools, Ultralytics and Detectron2. Python users pass arrays,
files and PIL images to a detector. PIL is optional and is never imported here before the caller has imported it.
"""

import importlib
import io
import mmap
import os
import re
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import DataError
from hkd_det.image_header import (
    ImageHeader,
    is_truncated_jpeg,
    is_truncated_png,
    parse_image_header,
)

try:
    import simplejpeg
except ImportError:  # a device that only runs a model: OpenCV decodes JPEG
    simplejpeg = None

if TYPE_CHECKING:
    from PIL.Image import Image

# Images that cannot be decoded (.jxl, or .heic without its extra) belong to the list: they are reported, not omitted.
IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl", ".mpo", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
# Formats that some builds of OpenCV cannot decode, by name or, without a known header, by suffix.
OPTIONAL_FORMATS = {"AVIF", "HEIC", "JPEG 2000", "GIF", "WebP", ".heic", ".heif", ".jxl"}
UPRIGHT_FORMATS = {"TIFF", "HEIC"}  # their decoders apply the orientation
MAX_PIXELS = 2**27  # 134 million, above the 108 million of phones; decoding takes at most 2 GB
REDUCED_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
# Cameras append a few bytes to the pixel data. A damaged JPEG has more, or ends before its last pixel.
MAX_EXTRANEOUS_BYTES = 16
EXTRANEOUS_BYTES = re.compile(r"(\d+) extraneous bytes")
CLIPPED_RATIO = 0.001  # brightest (and, for gray images, darkest) pixels that do not determine the range of values
BIT_DEPTHS = (8, 10, 12, 14, 16)
ImageInput: TypeAlias = Union[NDArray[np.uint8], str, os.PathLike[str], "Image"]


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image file.

    Args:
        path: Image file.

    Returns:
        array[H, W, 3]: RGB, uint8, upright.

    Raises:
        DataError: The file is missing, damaged, too large or not an image.
    """
    return decode_image(read_image_bytes(path), path)


def read_image_bytes(path: Path) -> bytes:
    """Read the encoded bytes of an image file.

    Args:
        path: Image file.

    Returns:
        The complete content of the file.

    Raises:
        DataError: The file is missing.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _make_missing_error(path) from None


def read_image_header(path: Path) -> ImageHeader:
    """Read the header of an image file without decoding the image.

    Args:
        path: Image file.

    Returns:
        Format, size and orientation.

    Raises:
        DataError: The file is missing, too large or not an image.
    """
    header = None
    try:
        with (
            path.open("rb") as file,
            suppress(ValueError),  # an empty file cannot be mapped
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw,
        ):
            header = parse_image_header(raw)
    except FileNotFoundError:
        raise _make_missing_error(path) from None
    return _check_header(header, path)


def decode_image(encoded: bytes, path: Path, reduction: int = 1) -> NDArray[np.uint8]:
    """Decode the bytes of an image file.

    Args:
        encoded: Content of the file.
        path: File name for error messages.
        reduction: 1, 2, 4 or 8. Divides both sides and rounds up, so pixel i covers the source pixels
            i * reduction to (i + 1) * reduction. Use it only for JPEG, where it saves most of the decoding
            time; for other formats OpenCV rounds down.

    Returns:
        array[H, W, 3]: RGB, uint8, upright.

    Raises:
        DataError: The bytes are not a readable image, or the image is too large.
    """
    header = _check_header(parse_image_header(encoded), path)
    try:
        image = _decode(encoded, path, header, reduction)
    # OpenCV returns None for a damaged file. It raises for an invalid size in the header, and without memory.
    except (MemoryError, cv2.error):
        image = None
    if image is None:
        raise _make_unreadable_error(path, header.format)
    return image if header.format in UPRIGHT_FORMATS else apply_orientation(image, header.orientation)


def apply_orientation(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn an image upright.

    Args:
        image (array[H, W, 3], uint8): Stored pixels.
        orientation: EXIF orientation, 1 (upright) to 8.

    Returns:
        The upright image.
    """
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def scale_to_uint8(image: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Scale 16-bit values to 8 bits by the range that the image uses.

    Industrial and thermal cameras store 10 to 14 bits in 16-bit files, so dividing by 256 gives a black image. The
    range of a color image is its bit depth: 8, 10, 12, 14 or 16. A gray image, which can be thermal, is stretched from
    its darkest to its brightest value.

    Args:
        image (array[H, W, 3], uint16): Image with three channels. It is overwritten.

    Returns:
        The image as uint8.
    """
    counts = cv2.calcHist([image.reshape(-1, 1)], [0], None, [2**16], [0, 2**16]).cumsum()
    low, high = (int(np.searchsorted(counts, ratio * counts[-1])) for ratio in (CLIPPED_RATIO, 1 - CLIPPED_RATIO))
    is_gray = all(np.array_equal(image[..., 0], image[..., channel]) for channel in (1, 2))
    if not is_gray:
        low, high = 0, 2 ** next(bits for bits in BIT_DEPTHS if high < 2**bits) - 1
    scale = 255 / max(1, high - low)
    return cv2.convertScaleAbs(np.maximum(image, low, out=image), alpha=scale, beta=-low * scale)


def _decode(encoded: bytes, path: Path, header: ImageHeader, reduction: int) -> NDArray[np.uint8] | None:
    """Return the stored pixels as RGB, or None if the file is damaged."""
    if header.format == "JPEG" and simplejpeg:
        try:
            return _decode_jpeg(encoded, header, reduction)
        except ValueError as error:
            if "subsampling" not in str(error):  # of the chroma: simplejpeg knows the common ones only
                return None
    if header.format == "HEIC":
        return _decode_heic(encoded)
    if is_truncated_png(encoded) or is_truncated_jpeg(encoded):
        return None
    flags = REDUCED_FLAGS[reduction] | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    if image is None:
        return None
    if image.ndim == 2:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    if image.dtype == np.uint16:
        image = scale_to_uint8(image)
    if image.dtype != np.uint8:
        raise DataError(f"{path}: expected 8 or 16 bits per value, got {image.dtype}. Convert the image.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # OpenCV 4.10 does not have IMREAD_COLOR_RGB


def _decode_jpeg(encoded: bytes, header: ImageHeader, reduction: int) -> NDArray[np.uint8]:
    """Decode a JPEG with simplejpeg. Its warnings are errors: OpenCV fills damaged parts and reports none."""
    height, width = (-(-side // reduction) if reduction > 1 else 0 for side in header.stored_hw)
    try:
        return simplejpeg.decode_jpeg(encoded, "RGB", min_height=height, min_width=width)
    except ValueError as error:
        extraneous = EXTRANEOUS_BYTES.search(str(error))
        if not extraneous or int(extraneous[1]) > MAX_EXTRANEOUS_BYTES:
            raise
        return simplejpeg.decode_jpeg(encoded, "RGB", min_height=height, min_width=width, strict=False)


def _decode_heic(encoded: bytes) -> NDArray[np.uint8] | None:
    """Decode a HEIC image of a phone, or return None without the extra `heic`."""
    try:
        import pi_heif  # noqa: PLC0415 - optional
    except ModuleNotFoundError:
        return None
    try:
        image = np.asarray(pi_heif.open_heif(io.BytesIO(encoded)))
    except (ValueError, OSError, RuntimeError, EOFError, SyntaxError):
        return None
    gray_or_rgb = image[..., :3] if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    return np.ascontiguousarray(gray_or_rgb)


def _check_header(header: ImageHeader | None, path: Path) -> ImageHeader:
    """Return the header, or raise the error of an unknown or a too large image before it is decoded."""
    if header is None:
        raise _make_unreadable_error(path, path.suffix.lower())
    height, width = header.stored_hw
    if height * width > MAX_PIXELS:
        raise DataError(
            f"{path}: too large: {width} x {height} pixels, expected at most {MAX_PIXELS // 10**6} million pixels. "
            "Reduce or remove it."
        )
    return header


def _make_missing_error(path: Path) -> DataError:
    return DataError(f"{path}: no such image. Check the directory of the dataset.")


def _make_unreadable_error(path: Path, image_format: str = "") -> DataError:
    problem, hint = "damaged, truncated, or not an image file", "Replace or remove it"
    if image_format in OPTIONAL_FORMATS:
        problem = f"damaged, or OpenCV {cv2.__version__} cannot decode {image_format}"
        hint = "Convert it to JPEG or PNG"
    if image_format in ("HEIC", ".heic", ".heif"):
        hint = "Run pip install 'hkd-det[heic]', or convert it to JPEG or PNG"
    return DataError(f"{path}: not a readable image ({problem}). {hint}.")


class ImageReference:
    """Reference to the image of detections that does not keep its pixels in memory.

    Args:
        image: Image of the detections. Of a file, the path is kept; of an array or PIL image, a weak reference.
        bgr: Whether an array is BGR.
    """

    def __init__(self, image: ImageInput, bgr: bool) -> None:
        self.bgr = bgr
        self._resolve: Callable[[], Any] = (lambda: image) if is_path(image) else weakref.ref(image)

    def resolve(self) -> ImageInput | None:
        """Return the image, or None if the program has released it."""
        return self._resolve()


def load_image(image: ImageInput, bgr: bool = False) -> NDArray[np.uint8]:
    """Return the pixels of an image.

    Args:
        image: uint8 array (H, W, 3), image file or PIL image. Files and PIL images are turned upright by their EXIF
            orientation.
        bgr: True if an array is BGR, as from `cv2.imread`. No effect on files and PIL images.

    Returns:
        array[H, W, 3]: RGB, uint8. An RGB array is returned as it is.

    Raises:
        ValueError: The argument is not an image.
        DataError: The file is missing or is not a readable image.
    """
    if is_path(image):
        path = Path(image)
        if not path.is_file():
            problem = "expected an image file, got a directory" if path.is_dir() else "no such image file"
            raise DataError(f"{path}: {problem}. Pass the path of an image file, or a list of paths.")
        return read_image(path)
    if _is_pil_image(image):
        return _convert_pil_image(image)
    check_image(image)
    pixels: NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if bgr else np.asarray(image)
    return pixels


def is_path(image: object) -> TypeGuard[str | os.PathLike[str]]:
    """Return whether an image is given by its path.

    Args:
        image: Image of any type.
    """
    return isinstance(image, (str, os.PathLike))


def check_image(image_rgb: object) -> None:
    """Check the type and shape of an image array.

    Args:
        image_rgb: Expected to be uint8[H, W, 3].

    Raises:
        ValueError: It is not.
    """
    if not isinstance(image_rgb, np.ndarray):
        raise ValueError(
            f"image: expected a uint8 array (H, W, 3), a path or a PIL image, got {type(image_rgb).__name__}."
        )
    if image_rgb.dtype != np.uint8 or image_rgb.ndim != 3 or image_rgb.shape[2] != 3:
        hint = _suggest_conversion(image_rgb)
        raise ValueError(f"image: expected uint8 (H, W, 3), got {image_rgb.dtype} {image_rgb.shape}. {hint}")
    if image_rgb.size == 0:
        raise ValueError(f"image: expected at least one pixel, got shape {image_rgb.shape}.")


def _suggest_conversion(array: NDArray[Any]) -> str:
    """Name the conversion of an array to uint8 (H, W, 3)."""
    if array.ndim == 4:
        return "Pass a list of images."
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        return "Convert a gray image with cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)."
    if array.ndim == 3 and array.shape[2] == 4:
        return "Remove the alpha channel: image[..., :3]."
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        return "Move the channels to the end: image.transpose(1, 2, 0)."
    return "Convert the values to uint8, 0 to 255."


def _is_pil_image(image: object) -> bool:
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(image, pil.Image)


def _convert_pil_image(image: Any) -> NDArray[np.uint8]:
    """Convert a PIL image as `read_image` reads its file."""
    image = importlib.import_module("PIL.ImageOps").exif_transpose(image)
    if not image.width * image.height:
        raise ValueError(f"image: expected at least one pixel, got {image.width} x {image.height}.")
    if image.mode == "F":
        raise ValueError("image: expected a PIL image of integers, got mode F. Convert the values to uint8, 0 to 255.")
    if image.mode.startswith("I"):  # 16 bits per value
        gray = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        return scale_to_uint8(np.repeat(gray[..., None], 3, axis=2))
    return np.asarray(image.convert("RGB"))
