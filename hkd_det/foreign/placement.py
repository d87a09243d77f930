"""Placement: how a picture lies in a foreign model's input, and how boxes come back."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.foreign.description import OnnxModelConfig
from hkd_det.letterbox import Letterbox


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
