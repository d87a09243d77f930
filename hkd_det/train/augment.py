"""What a training picture goes through: scale, crop, mosaic, mirror, light. Everything known of a person follows.

Not torchvision.transforms.v2: it resizes the whole picture in float before it crops, and took three times as long
as decoding. Here the window that is left is cut out first and only that is resized, in uint8, by OpenCV; light goes
through a table of 256 values.

After each cut people are judged anew by what is left of them: somebody cut to less than `LEAST_LEFT`, seen by less
than `LEAST_VISIBLE` or lower than `LEAST_HEIGHT_PX` becomes an ignore region, since nobody could be blamed for
missing or for finding them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det import boxes as box_math
from hkd_det.letterbox import PAD_VALUE

LEAST_LEFT = 0.35  # share of the whole person's area inside the view
LEAST_VISIBLE = 0.2  # share of it that is inside and not hidden: as the protocols' widest setup has it
LEAST_HEIGHT_PX = 8.0
LEAST_SIDE_PX = 1.0

SCALES = (0.6, 1.6)  # against the picture fitted into the view
# A tile is about half the view: people keep their usual size at a scale of about 2.
TILE_SCALES = (0.8, 2.4)
CENTRES = (0.3, 0.7)  # where a mosaic's tiles meet, as a share of its sides
LARGEST_FRAME = max(SCALES[1], TILE_SCALES[1] * CENTRES[1])  # against the view: no larger picture is ever asked for

MIRRORED, GREY = 0.5, 0.05  # chances
JITTER = 0.3  # brightness, contrast and saturation, up and down
LUMA_RGB = (0.299, 0.587, 0.114)


@dataclass(frozen=True, eq=False)
class View:
    """One training picture with its people, as the loader passes it on.

    picture: (H, W, 3) uint8 RGB. boxes_xyxy, visible_xyxy: [N, 4] float32, pixels of it: the whole person and the
    part that can be seen. ignore: [N] bool.
    """

    picture: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.float32]
    visible_xyxy: NDArray[np.float32]
    ignore: NDArray[np.bool_]


# A source is asked for its picture as large as it is when fitted into (height, width), or larger.
Source = Callable[[tuple[float, float]], View]


def training_view(sources: Sequence[Source], size_hw: tuple[int, int], chance: np.random.Generator) -> View:
    """One source, or four as a mosaic, at random scale, crop, mirror and light, in `size_hw`."""
    if len(sources) > 1:
        view = _mosaic(sources, size_hw, chance)
    else:
        view = _scaled_crop(sources[0], size_hw, SCALES, chance)
    if chance.random() < MIRRORED:
        view = mirrored(view)
    brightness, contrast, saturation = chance.uniform(1 - JITTER, 1 + JITTER, size=3)
    if chance.random() < GREY:
        saturation = 0.0
    return replace(view, picture=relit(view.picture, brightness, contrast, saturation))


def mirrored(view: View) -> View:
    """Left is right."""
    width = view.picture.shape[1]

    def turned(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)

    return View(cv2.flip(view.picture, 1), turned(view.boxes_xyxy), turned(view.visible_xyxy), view.ignore)


@dataclass(frozen=True)
class _Span:
    """Along one side: `length` source pixels from `start` on become `size` pixels of the view, from `at` on.

    Whole pixels at both ends, so that `scale` is exact.
    """

    start: int
    length: int
    at: int
    size: int

    @classmethod
    def drawn(cls, side: int, room: int, scale: float, chance: np.random.Generator) -> "_Span":
        """A random window if the scaled side is longer than the room, the whole side at a random place if not."""
        if side * scale <= room:
            size = max(1, round(side * scale))
            return cls(0, side, int(chance.integers(room - size, endpoint=True)), size)
        length = min(side, max(1, round(room / scale)))
        return cls(int(chance.integers(side - length, endpoint=True)), length, 0, room)

    @property
    def scale(self) -> float:
        return self.size / self.length

    @property
    def shift(self) -> float:
        return self.at - self.start * self.scale


def _scaled_crop(
    source: Source, size_hw: tuple[int, int], scales: tuple[float, float], chance: np.random.Generator
) -> View:
    """Fit the picture into `size_hw`, times a random scale, and take a random window of `size_hw` out of it."""
    zoom = chance.uniform(*scales)
    frame_hw = (size_hw[0] * zoom, size_hw[1] * zoom)
    view = source(frame_hw)
    height, width = view.picture.shape[:2]
    scale = min(frame_hw[0] / height, frame_hw[1] / width)
    rows = _Span.drawn(height, size_hw[0], scale, chance)
    columns = _Span.drawn(width, size_hw[1], scale, chance)
    canvas = np.full((*size_hw, 3), PAD_VALUE, np.uint8)
    window = view.picture[rows.start : rows.start + rows.length, columns.start : columns.start + columns.length]
    canvas[rows.at : rows.at + rows.size, columns.at : columns.at + columns.size] = resized(
        window, (rows.size, columns.size)
    )
    scales_xyxy, shifts_xyxy = np.array([[span.scale, span.shift] for span in (columns, rows, columns, rows)]).T
    return judged(
        View(
            canvas,
            view.boxes_xyxy * scales_xyxy + shifts_xyxy,
            view.visible_xyxy * scales_xyxy + shifts_xyxy,
            view.ignore,
        )
    )


def resized(picture_rgb: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) in another size, up or down."""
    # Bilinear skips pixels below half size only, and costs a fifth of INTER_AREA.
    down = max(before / after for before, after in zip(picture_rgb.shape, size_hw, strict=False))
    how = cv2.INTER_AREA if down > 2 else cv2.INTER_LINEAR
    return cv2.resize(picture_rgb, (size_hw[1], size_hw[0]), interpolation=how)


def _mosaic(sources: Sequence[Source], size_hw: tuple[int, int], chance: np.random.Generator) -> View:
    """Four pictures around a random centre, each cut to its quarter (YOLOv4)."""
    height, width = size_hw
    centre_y, centre_x = (int(side * chance.uniform(*CENTRES)) for side in size_hw)
    corners = [(0, 0), (0, centre_x), (centre_y, 0), (centre_y, centre_x)]
    canvas = np.empty((height, width, 3), np.uint8)
    tiles = []
    for source, (top, left) in zip(sources, corners, strict=True):
        tile_hw = (centre_y if top == 0 else height - centre_y, centre_x if left == 0 else width - centre_x)
        tile = _scaled_crop(source, tile_hw, TILE_SCALES, chance)
        canvas[top : top + tile_hw[0], left : left + tile_hw[1]] = tile.picture
        shift = np.array([left, top, left, top], np.float32)
        tiles.append(replace(tile, boxes_xyxy=tile.boxes_xyxy + shift, visible_xyxy=tile.visible_xyxy + shift))
    return View(
        canvas,
        np.concatenate([tile.boxes_xyxy for tile in tiles]),
        np.concatenate([tile.visible_xyxy for tile in tiles]),
        np.concatenate([tile.ignore for tile in tiles]),
    )


def judged(view: View) -> View:
    """Boxes cut at the borders; who is gone is dropped, who is too little left, seen too little or small is ignored."""
    whole = view.boxes_xyxy.astype(np.float64)
    cut = box_math.clip(whole, view.picture.shape[:2])
    seen = np.clip(view.visible_xyxy, cut[:, [0, 1, 0, 1]], cut[:, [2, 3, 2, 3]])
    area = np.maximum(box_math.area(whole), 1e-6)
    left, visible = box_math.area(cut) / area, box_math.area(seen) / area
    sides = cut[:, 2:] - cut[:, :2]
    kept = (sides >= LEAST_SIDE_PX).all(1)
    ignore = view.ignore | (left < LEAST_LEFT) | (visible < LEAST_VISIBLE) | (sides[:, 1] < LEAST_HEIGHT_PX)
    return View(view.picture, cut[kept].astype(np.float32), seen[kept].astype(np.float32), ignore[kept])


def relit(picture_rgb: NDArray[np.uint8], brightness: float, contrast: float, saturation: float) -> NDArray[np.uint8]:
    """A picture (H, W, 3) in other light: three factors from 0 on, 1 changes nothing; as torchvision's ColorJitter."""
    bright = np.clip(np.arange(256) * brightness, 0, 255)
    middle = np.dot(LUMA_RGB, cv2.mean(cv2.LUT(picture_rgb, bright.astype(np.uint8)))[:3])
    table = np.clip(np.rint(contrast * bright + (1 - contrast) * middle), 0, 255).astype(np.uint8)
    lit = cv2.LUT(picture_rgb, table)
    grey = cv2.cvtColor(cv2.cvtColor(lit, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(lit, saturation, grey, 1 - saturation, 0)
