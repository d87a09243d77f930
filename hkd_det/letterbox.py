"""Letterbox: resize an image to the model input and map boxes back. Parse `--imgsz`.

Training, validation, export, benchmark, demo and ONNX detectors use these functions.

`resize` halves an image while it is larger than twice the result, and is bilinear from there. Bilinear interpolation
alone skips pixels below half size, and cv2.INTER_AREA is slow unless the ratio is an integer.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.errors import UsageError, import_package
from hkd_det.structures import clip_boxes

PAD_VALUE = 114
MAX_LINEAR_REDUCTION = 2
STRIDE = 32  # all models of this project downsample their input by 32

Align = Literal["top-left", "center", "stretch"]
Interpolation = Literal["auto", "area", "linear", "antialias"]


@dataclass(frozen=True)
class Letterbox:
    """Geometry of a resized image inside the model input.

    Attributes:
        source_hw: Height and width of the source image in pixels.
        input_hw: Height and width of the model input in pixels.
        align: Position of the resized image: "top-left" (default), or "center" with half of the padding on each
            side. Both keep the aspect ratio. "stretch" fills the input and changes the aspect ratio.
        pad_value: Gray value of the padding, 0 to 255.
        interpolation: "auto" is `resize`, as in training. "area" averages pixel areas at every reduction. "linear" is
            always bilinear, as in YOLOX, Ultralytics and MMDetection. "antialias" is the bilinear filter of Pillow,
            whose width grows with the reduction, as in torchvision and the DETR family; it requires Pillow.
    """

    source_hw: tuple[int, int]
    input_hw: tuple[int, int]
    align: Align = "top-left"
    pad_value: int = PAD_VALUE
    interpolation: Interpolation = "auto"

    @property
    def scale(self) -> float:
        """Input pixels per source pixel if the aspect ratio is kept."""
        return min(self.input_hw[0] / self.source_hw[0], self.input_hw[1] / self.source_hw[1])

    @property
    def content_hw(self) -> tuple[int, int]:
        """Height and width of the resized image, at least one pixel."""
        if self.align == "stretch":
            return self.input_hw
        height, width = (
            min(limit, max(1, round(side * self.scale)))
            for side, limit in zip(self.source_hw, self.input_hw, strict=True)
        )
        return height, width

    @property
    def content_offset(self) -> tuple[int, int]:
        """Top and left position of the resized image in the input."""
        if self.align != "center":
            return 0, 0
        (height, width), (input_height, input_width) = self.content_hw, self.input_hw
        return (input_height - height) // 2, (input_width - width) // 2

    def apply(self, image_rgb: NDArray[np.uint8], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Resize and pad an image.

        Args:
            image_rgb (array[H, W, 3]): uint8, of the size `source_hw`.
            out (array[h, w, 3]): uint8, of the size `input_hw`. Receives the result (default: a new array).

        Returns:
            array[h, w, 3]: uint8, of the size `input_hw`.
        """
        (top, left), (height, width) = self.content_offset, self.content_hw
        bottom, right = top + height, left + width
        canvas = np.empty((*self.input_hw, 3), dtype=np.uint8) if out is None else out
        canvas[:top] = self.pad_value
        canvas[bottom:] = self.pad_value
        canvas[top:bottom, :left] = self.pad_value
        canvas[top:bottom, right:] = self.pad_value
        content = canvas[top:bottom, left:right]
        if (height, width) == self.source_hw:
            content[:] = image_rgb
        elif self.interpolation == "auto":
            resize(image_rgb, (height, width), content)
        elif self.interpolation == "antialias":
            pillow = import_package("PIL.Image", "Pillow", "Run pip install pillow.")
            content[:] = pillow.fromarray(image_rgb).resize((width, height), pillow.Resampling.BILINEAR)
        else:
            by_area = self.interpolation == "area" and height < self.source_hw[0]
            flag = cv2.INTER_AREA if by_area else cv2.INTER_LINEAR
            cv2.resize(image_rgb, (width, height), content, interpolation=flag)
        return canvas

    def boxes_to_source(self, boxes_xyxy: NDArray[np.floating]) -> NDArray[np.float32]:
        """Map boxes from the model input to the source image and clip them.

        Args:
            boxes_xyxy (array[N, 4]): xyxy, input pixels.

        Returns:
            array[N, 4]: xyxy, source pixels.
        """
        boxes = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        boxes = (boxes - self._compute_offset_xyxy()) / self._compute_scale_xyxy()
        return clip_boxes(boxes, self.source_hw).astype(np.float32)

    def _compute_offset_xyxy(self) -> NDArray[np.float32]:
        top, left = self.content_offset
        return np.array([left, top, left, top], dtype=np.float32)

    def _compute_scale_xyxy(self) -> NDArray[np.float32]:
        # Use the rounded size, not `scale`: for an image 3 pixels wide the two differ by up to a sixth.
        scale_y, scale_x = (content / source for content, source in zip(self.content_hw, self.source_hw, strict=True))
        return np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32)


def resize(
    image_rgb: NDArray[np.uint8], size_hw: tuple[int, int], out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Halve the sides of an image while they are larger than twice the result, then resize it bilinearly.

    Args:
        image_rgb (array[H, W, 3]): uint8.
        size_hw: Height and width of the result in pixels.
        out (array[h, w, 3]): uint8, of the size `size_hw`. Receives the result (default: a new array).

    Returns:
        array[h, w, 3]: uint8, of the size `size_hw`.
    """
    height, width = (_halve(*sides) for sides in zip(image_rgb.shape[:2], size_hw, strict=True))
    while image_rgb.shape[:2] != (height, width):
        rows, columns = image_rgb.shape[:2]
        next_hw = max(rows // 2, height), max(columns // 2, width)
        if rows % height or columns % width:  # halves would have fractions of pixels
            next_hw = height, width
        image_rgb = cv2.resize(image_rgb, next_hw[::-1], interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    return cv2.resize(image_rgb, size_hw[::-1], out, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)


def _halve(source: int, target: int) -> int:
    """Return the length of a side that is halved, rounded down, while it is larger than twice the target."""
    while source > MAX_LINEAR_REDUCTION * target:
        source //= 2
    return source


def parse_imgsz(text: str) -> tuple[int, int]:
    """Parse the value of `--imgsz`.

    Args:
        text: "640" for a square, or "640x512" for width x height.

    Returns:
        Height and width in pixels.

    Raises:
        UsageError: The text is not a size, or a side is not a multiple of 32.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--imgsz {text}: expected pixels as 640 or 640x512 (width x height).")
    width, height = int(parts[0]), int(parts[-1])
    if width % STRIDE or height % STRIDE:
        nearest = "x".join(str(max(STRIDE, round(int(part) / STRIDE) * STRIDE)) for part in parts)
        raise UsageError(
            f"--imgsz {text}: width and height must be multiples of {STRIDE}. The nearest size is {nearest}."
        )
    return height, width


def format_imgsz(size_hw: tuple[int, int]) -> str:
    """Format a size as the value of `--imgsz`.

    Args:
        size_hw: Height and width in pixels.

    Returns:
        "640x512" (width x height) for (512, 640).
    """
    return f"{size_hw[1]}x{size_hw[0]}"
