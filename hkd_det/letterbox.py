"""Letterbox: fit a picture of any size into the model's input, and take boxes back.

One implementation serves training's validation, export's parity check, bench and demo.
The picture keeps its aspect ratio, is scaled up or down, and lies at the top left; the rest is
filled with grey 114. (Top left, not centred: the way back is then one division.)

The `--imgsz` flag: `640` is a square, `640x512` is width x height, as pictures are named.

Placement: how a picture lies in a foreign model's input, and how boxes come back.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.errors import UsageError
from hkd_det.onnxrt.model_config import OnnxModelConfig

PAD_VALUE = 114


@dataclass(frozen=True)
class Letterbox:
    """How a picture of `source_hw` lies in an input of `input_hw`: both (height, width) pixels."""

    source_hw: tuple[int, int]
    input_hw: tuple[int, int]

    @property
    def scale(self) -> float:
        """Input pixels per source pixel."""
        return min(self.input_hw[0] / self.source_hw[0], self.input_hw[1] / self.source_hw[1])

    @property
    def content_hw(self) -> tuple[int, int]:
        """Size of the scaled picture inside the input, at least one pixel."""
        height, width = (
            min(limit, max(1, round(side * self.scale)))
            for side, limit in zip(self.source_hw, self.input_hw, strict=True)
        )
        return height, width

    def apply(self, image_rgb: NDArray[np.uint8], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of `source_hw` to (h, w, 3) uint8 of `input_hw`, written to `out` where it is given."""
        height, width = self.content_hw
        canvas = np.empty((*self.input_hw, 3), dtype=np.uint8) if out is None else out
        content = canvas[:height, :width]
        canvas[height:] = PAD_VALUE
        canvas[:height, width:] = PAD_VALUE
        if (height, width) == self.source_hw:
            content[:] = image_rgb
        else:
            # INTER_AREA is what shrinking needs: bilinear skips pixels below half size and small people flicker.
            shrinks = height < self.source_hw[0]
            how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            cv2.resize(image_rgb, (width, height), content, interpolation=how)
        return canvas

    def boxes_to_source(self, boxes_xyxy: NDArray[np.floating]) -> NDArray[np.float32]:
        """[N, 4] boxes in input pixels to source pixels, cut at the picture's borders."""
        ratio = self._compute_scale_xyxy()
        height, width = self.source_hw
        boxes = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4) / ratio
        return np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)

    def boxes_to_input(self, boxes_xyxy: NDArray[np.floating]) -> NDArray[np.float32]:
        """[N, 4] boxes in source pixels to input pixels."""
        boxes = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        return (boxes * self._compute_scale_xyxy()).astype(np.float32)

    def _compute_scale_xyxy(self) -> NDArray[np.float32]:
        # The rounded size, not `scale`: a 3-pixel-wide picture may be off by a sixth.
        height, width = self.content_hw
        down, across = height / self.source_hw[0], width / self.source_hw[1]
        return np.array([across, down, across, down], dtype=np.float32)


STRIDE = 32  # every model here halves its input five times


def parse_imgsz(text: str) -> tuple[int, int]:
    """`"640"` or `"640x512"` (width x height) to (height, width) pixels, both multiples of 32."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--imgsz {text}: expected pixels as 640 or 640x512 (width x height)")
    width, height = int(parts[0]), int(parts[-1])
    if width % STRIDE or height % STRIDE:
        near = "x".join(str(max(STRIDE, round(int(part) / STRIDE) * STRIDE)) for part in parts)
        raise UsageError(f"--imgsz {text}: width and height must be multiples of {STRIDE}; the nearest is {near}")
    return height, width


def format_imgsz(size_hw: tuple[int, int]) -> str:
    """(height, width) to `"640x512"` (width x height)."""
    return f"{size_hw[1]}x{size_hw[0]}"


@dataclass(frozen=True)
class AlignedLetterbox:
    """A picture of `source_hw` in an input of `input_hw`: it fills `content_hw` from (top, left) on."""

    source_hw: tuple[int, int]
    input_hw: tuple[int, int]
    content_hw: tuple[int, int]
    top_left: tuple[int, int]

    @classmethod
    def from_resize_mode(
        cls, source_hw: tuple[int, int], input_hw: tuple[int, int], resize_mode: str
    ) -> "AlignedLetterbox":
        """`how`: top-left, centre or stretch."""
        if resize_mode == "stretch":
            return cls(source_hw, input_hw, input_hw, (0, 0))
        content_hw = Letterbox(source_hw, input_hw).content_hw
        if resize_mode == "top-left":
            return cls(source_hw, input_hw, content_hw, (0, 0))
        top, left = ((room - side) // 2 for room, side in zip(input_hw, content_hw, strict=True))
        return cls(source_hw, input_hw, content_hw, (top, left))

    def apply(self, image_rgb: NDArray[np.uint8], pad_value: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 of `source_hw` to (h, w, 3) of `input_hw`, grey `pad` around it."""
        canvas = np.full((*self.input_hw, 3), pad_value, np.uint8)
        (top, left), (height, width) = self.top_left, self.content_hw
        # Bilinear, up and down: as YOLOX, Ultralytics and mmdetection saw their pictures.
        resized = cv2.resize(image_rgb, (width, height), interpolation=cv2.INTER_LINEAR)
        canvas[top : top + height, left : left + width] = resized
        return canvas

    def boxes_to_source(self, boxes_xyxy: NDArray[np.floating]) -> NDArray[np.float32]:
        """[N, 4] boxes in input pixels to source pixels, cut at the picture's borders."""
        top, left = self.top_left
        down, across = (whole / part for whole, part in zip(self.source_hw, self.content_hw, strict=True))
        boxes = (boxes_xyxy - [left, top, left, top]) * [across, down, across, down]
        return box_math.clip_boxes(boxes, self.source_hw).astype(np.float32)


def normalize_input(
    images_rgb: NDArray[np.uint8], config: OnnxModelConfig, dtype: type[np.generic]
) -> NDArray[np.generic]:
    """[B, h, w, 3] uint8 RGB to the numbers, colours and layout that the model reads, of its type."""
    pictures: NDArray[Any] = images_rgb if config.color_order == "rgb" else images_rgb[..., ::-1]
    plain = config.input_scale == 255 and set(config.mean) == {0.0} and set(config.std) == {1.0}
    if not plain:
        mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
        pictures = (pictures.astype(np.float32) * np.float32(config.input_scale / 255) - mean) / std
    if config.layout == "NCHW":
        pictures = pictures.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pictures, dtype=dtype)
