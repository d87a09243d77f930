"""Letterbox: fit a picture of any size into the model's input, and take boxes back.

One implementation serves training's validation, export's parity check, bench and demo.
The picture keeps its aspect ratio, is scaled up or down, and lies at the top left; the rest is
filled with grey 114. (Top left, not centred: the way back is then one division.)
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

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
