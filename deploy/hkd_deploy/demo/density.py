"""Crowd density: the number of persons over the last minute, and a heat map of where they are."""

from collections import deque
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_deploy.demo.linking import MAX_LINK_S
from hkd_det.errors import DataError
from hkd_det.files import atomic_write

DENSITY_WINDOW_S = 60
HEATMAP_SIDE = 160  # cells along the longer side of the image
HEATMAP_BLUR_CELLS = 1.5
HEATMAP_OPACITY = 0.65


class DensityWindow:
    """Number of persons over the last minute, in steps of a second."""

    def __init__(self) -> None:
        self._buckets: deque[tuple[int, float, float, int]] = deque(maxlen=DENSITY_WINDOW_S)
        self._last_s: float | None = None

    @property
    def mean(self) -> float:
        """Mean number of persons, weighted by time."""
        total_s = sum(bucket[2] for bucket in self._buckets)
        return sum(bucket[1] for bucket in self._buckets) / total_s if total_s else 0.0

    @property
    def maximum(self) -> int:
        """Maximum number of persons."""
        return max((bucket[3] for bucket in self._buckets), default=0)

    def add(self, timestamp_s: float, num_persons: int) -> None:
        """Add the number of persons of a frame. It is valid since the previous frame, at most for `MAX_LINK_S`.

        Args:
            timestamp_s: Time of the frame, seconds.
            num_persons: Number of persons.
        """
        step_s = 0.0 if self._last_s is None else min(max(timestamp_s - self._last_s, 0.0), MAX_LINK_S)
        self._last_s = timestamp_s
        second = int(timestamp_s)
        while self._buckets and not second - DENSITY_WINDOW_S < self._buckets[0][0] <= second:
            self._buckets.popleft()
        if self._buckets and self._buckets[-1][0] == second:
            _, person_s, total_s, maximum = self._buckets.pop()
        else:
            person_s, total_s, maximum = 0.0, 0.0, 0
        bucket = (second, person_s + step_s * num_persons, total_s + step_s, max(maximum, num_persons))
        self._buckets.append(bucket)


class HeatMap:
    """Time that people spend at each place of the image: the bottom centers of their boxes, weighted by seconds."""

    def __init__(self) -> None:
        self._seconds = np.zeros((0, 0), np.float32)
        self._last_s: float | None = None

    def add(self, boxes_xyxy: NDArray[np.float32], timestamp_s: float, image_hw: tuple[int, int]) -> None:
        """Add the persons of a frame. They are there since the previous frame, at most for `MAX_LINK_S`.

        Args:
            boxes_xyxy (array[N, 4]): Boxes, pixels. Those at the lower edge are omitted: the feet are not visible.
            timestamp_s: Time of the frame, seconds.
            image_hw: Height and width of the frame, pixels. The map keeps its cells if the size changes.
        """
        height, width = image_hw
        boxes_xyxy = boxes_xyxy[boxes_xyxy[:, 3] < height - 1]
        if not self._seconds.size:
            scale = HEATMAP_SIDE / max(image_hw)
            self._seconds = np.zeros((max(1, round(height * scale)), max(1, round(width * scale))), np.float32)
        step_s = 0.0 if self._last_s is None else min(max(timestamp_s - self._last_s, 0.0), MAX_LINK_S)
        self._last_s = timestamp_s
        rows, columns = self._seconds.shape
        y = np.clip(boxes_xyxy[:, 3] / height * rows, 0, rows - 1).astype(int)
        x = np.clip((boxes_xyxy[:, 0] + boxes_xyxy[:, 2]) / 2 / width * columns, 0, columns - 1).astype(int)
        np.add.at(self._seconds, (y, x), step_s)

    @property
    def person_seconds(self) -> float:
        """Sum of the map: the time that all persons together were in the image, seconds."""
        return float(self._seconds.sum())

    def draw(self, image_rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Draw the map over an image: blue for short times, red for the longest.

        Args:
            image_rgb (uint8[H, W, 3]): RGB.

        Returns:
            The image with the map, uint8[H, W, 3].
        """
        if not self._seconds.any():
            return image_rgb.copy()
        heat = cv2.GaussianBlur(self._seconds, (0, 0), HEATMAP_BLUR_CELLS)
        heat = np.sqrt(cv2.resize(heat, image_rgb.shape[1::-1], interpolation=cv2.INTER_LINEAR) / heat.max())
        color = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]
        opacity = (HEATMAP_OPACITY * np.clip(4 * heat, 0, 1))[..., None]
        return ((1 - opacity) * image_rgb + opacity * color).astype(np.uint8)

    def save(self, path: Path, image_rgb: NDArray[np.uint8]) -> None:
        """Save the map over an image.

        Args:
            path: The file: .png.
            image_rgb (uint8[H, W, 3]): RGB. Redact the people in it first, if they must not be visible.

        Raises:
            DataError: OpenCV cannot write the file.
        """
        with atomic_write(path) as temp_path:
            if not cv2.imwrite(str(temp_path), cv2.cvtColor(self.draw(image_rgb), cv2.COLOR_RGB2BGR)):
                raise DataError(f"{path.name}: OpenCV cannot write the image. Check the free disk space.")
