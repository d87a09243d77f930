"""Placement: how a picture lies in a foreign model's input, and how boxes come back."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.foreign.description import Description
from hkd_det.letterbox import Letterbox


@dataclass(frozen=True)
class Placement:
    """A picture of `source_hw` in an input of `input_hw`: it fills `content_hw` from (top, left) on."""

    source_hw: tuple[int, int]
    input_hw: tuple[int, int]
    content_hw: tuple[int, int]
    top_left: tuple[int, int]

    @classmethod
    def of(cls, source_hw: tuple[int, int], input_hw: tuple[int, int], how: str) -> "Placement":
        """`how`: top-left, centre or stretch."""
        if how == "stretch":
            return cls(source_hw, input_hw, input_hw, (0, 0))
        content_hw = Letterbox(source_hw, input_hw).content_hw
        if how == "top-left":
            return cls(source_hw, input_hw, content_hw, (0, 0))
        top, left = ((room - side) // 2 for room, side in zip(input_hw, content_hw, strict=True))
        return cls(source_hw, input_hw, content_hw, (top, left))

    def apply(self, picture_rgb: NDArray[np.uint8], pad: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 of `source_hw` to (h, w, 3) of `input_hw`, grey `pad` around it."""
        canvas = np.full((*self.input_hw, 3), pad, np.uint8)
        (top, left), (height, width) = self.top_left, self.content_hw
        # Bilinear, up and down: as YOLOX, Ultralytics and mmdetection saw their pictures.
        resized = cv2.resize(picture_rgb, (width, height), interpolation=cv2.INTER_LINEAR)
        canvas[top : top + height, left : left + width] = resized
        return canvas

    def to_source(self, boxes_xyxy: NDArray[np.floating]) -> NDArray[np.float32]:
        """[N, 4] boxes in input pixels to source pixels, cut at the picture's borders."""
        top, left = self.top_left
        down, across = (whole / part for whole, part in zip(self.source_hw, self.content_hw, strict=True))
        boxes = (boxes_xyxy - [left, top, left, top]) * [across, down, across, down]
        return box_math.clip(boxes, self.source_hw).astype(np.float32)


def as_input(placed_rgb: NDArray[np.uint8], description: Description, kind: type[np.generic]) -> NDArray[np.generic]:
    """[B, h, w, 3] uint8 RGB to the numbers, colours and layout that the model reads, of its type."""
    pictures: NDArray[Any] = placed_rgb if description.colours == "rgb" else placed_rgb[..., ::-1]
    plain = description.white == 255 and set(description.mean) == {0.0} and set(description.std) == {1.0}
    if not plain:
        mean, std = np.array(description.mean, np.float32), np.array(description.std, np.float32)
        pictures = (pictures.astype(np.float32) * np.float32(description.white / 255) - mean) / std
    if description.layout == "NCHW":
        pictures = pictures.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pictures, dtype=kind)
