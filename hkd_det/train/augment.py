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

MIN_AREA_RATIO = 0.35  # share of the whole person's area inside the view
MIN_VISIBLE_RATIO = 0.2  # share of it that is inside and not hidden: as the protocols' widest setup has it
MIN_HEIGHT_PX = 8.0
MIN_SIDE_PX = 1.0

SCALE_RANGE = (0.6, 1.6)  # against the picture fitted into the view
# A tile is about half the view: people keep their usual size at a scale of about 2.
MOSAIC_SCALE_RANGE = (0.8, 2.4)
MOSAIC_CENTER_RANGE = (0.3, 0.7)  # where a mosaic's tiles meet, as a share of its sides
MAX_FRAME_SCALE = max(
    SCALE_RANGE[1], MOSAIC_SCALE_RANGE[1] * MOSAIC_CENTER_RANGE[1]
)  # against the view: no larger picture is ever asked for

FLIP_PROB, GRAYSCALE_PROB = 0.5, 0.05  # chances
JITTER_RANGE = 0.3  # brightness, contrast and saturation, up and down
LUMA_RGB = (0.299, 0.587, 0.114)


@dataclass(frozen=True, eq=False)
class AugmentedImage:
    """One training picture with its people, as the loader passes it on.

    picture: (H, W, 3) uint8 RGB. boxes_xyxy, visible_xyxy: [N, 4] float32, pixels of it: the whole person and the
    part that can be seen. ignore: [N] bool.
    """

    image: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.float32]
    visible_xyxy: NDArray[np.float32]
    ignore: NDArray[np.bool_]


# A source is asked for its picture as large as it is when fitted into (height, width), or larger.
ImageLoader = Callable[[tuple[float, float]], AugmentedImage]


def augment(image_loaders: Sequence[ImageLoader], size_hw: tuple[int, int], rng: np.random.Generator) -> AugmentedImage:
    """One source, or four as a mosaic, at random scale, crop, mirror and light, in `size_hw`."""
    if len(image_loaders) > 1:
        view = _make_mosaic(image_loaders, size_hw, rng)
    else:
        view = _random_scaled_crop(image_loaders[0], size_hw, SCALE_RANGE, rng)
    if rng.random() < FLIP_PROB:
        view = horizontal_flip(view)
    brightness, contrast, saturation = rng.uniform(1 - JITTER_RANGE, 1 + JITTER_RANGE, size=3)
    if rng.random() < GRAYSCALE_PROB:
        saturation = 0.0
    return replace(view, image=color_jitter(view.image, brightness, contrast, saturation))


def horizontal_flip(augmented: AugmentedImage) -> AugmentedImage:
    """Left is right."""
    width = augmented.image.shape[1]

    def turned(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)

    return AugmentedImage(
        cv2.flip(augmented.image, 1), turned(augmented.boxes_xyxy), turned(augmented.visible_xyxy), augmented.ignore
    )


@dataclass(frozen=True)
class _CropSpan:
    """Along one side: `length` source pixels from `start` on become `size` pixels of the view, from `at` on.

    Whole pixels at both ends, so that `scale` is exact.
    """

    source_start: int
    source_length: int
    target_start: int
    target_size: int

    @classmethod
    def sample(cls, source_size: int, room_px: int, scale: float, rng: np.random.Generator) -> "_CropSpan":
        """A random window if the scaled side is longer than the room, the whole side at a random place if not."""
        if source_size * scale <= room_px:
            size = max(1, round(source_size * scale))
            return cls(0, source_size, int(rng.integers(room_px - size, endpoint=True)), size)
        length = min(source_size, max(1, round(room_px / scale)))
        return cls(int(rng.integers(source_size - length, endpoint=True)), length, 0, room_px)

    @property
    def scale(self) -> float:
        return self.target_size / self.source_length

    @property
    def offset(self) -> float:
        return self.target_start - self.source_start * self.scale


def _random_scaled_crop(
    image_loader: ImageLoader, size_hw: tuple[int, int], scale_range: tuple[float, float], rng: np.random.Generator
) -> AugmentedImage:
    """Fit the picture into `size_hw`, times a random scale, and take a random window of `size_hw` out of it."""
    zoom = rng.uniform(*scale_range)
    frame_hw = (size_hw[0] * zoom, size_hw[1] * zoom)
    view = image_loader(frame_hw)
    height, width = view.image.shape[:2]
    scale = min(frame_hw[0] / height, frame_hw[1] / width)
    rows = _CropSpan.sample(height, size_hw[0], scale, rng)
    columns = _CropSpan.sample(width, size_hw[1], scale, rng)
    canvas = np.full((*size_hw, 3), PAD_VALUE, np.uint8)
    window = view.image[
        rows.source_start : rows.source_start + rows.source_length,
        columns.source_start : columns.source_start + columns.source_length,
    ]
    canvas[
        rows.target_start : rows.target_start + rows.target_size,
        columns.target_start : columns.target_start + columns.target_size,
    ] = resize(window, (rows.target_size, columns.target_size))
    scales_xyxy, shifts_xyxy = np.array([[span.scale, span.offset] for span in (columns, rows, columns, rows)]).T
    return filter_boxes(
        AugmentedImage(
            canvas,
            view.boxes_xyxy * scales_xyxy + shifts_xyxy,
            view.visible_xyxy * scales_xyxy + shifts_xyxy,
            view.ignore,
        )
    )


def resize(image_rgb: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) in another size, up or down."""
    # Bilinear skips pixels below half size only, and costs a fifth of INTER_AREA.
    down = max(before / after for before, after in zip(image_rgb.shape, size_hw, strict=False))
    how = cv2.INTER_AREA if down > 2 else cv2.INTER_LINEAR
    return cv2.resize(image_rgb, (size_hw[1], size_hw[0]), interpolation=how)


def _make_mosaic(
    image_loaders: Sequence[ImageLoader], size_hw: tuple[int, int], rng: np.random.Generator
) -> AugmentedImage:
    """Four pictures around a random centre, each cut to its quarter (YOLOv4)."""
    height, width = size_hw
    centre_y, centre_x = (int(side * rng.uniform(*MOSAIC_CENTER_RANGE)) for side in size_hw)
    corners = [(0, 0), (0, centre_x), (centre_y, 0), (centre_y, centre_x)]
    canvas = np.empty((height, width, 3), np.uint8)
    tiles = []
    for source, (top, left) in zip(image_loaders, corners, strict=True):
        tile_hw = (centre_y if top == 0 else height - centre_y, centre_x if left == 0 else width - centre_x)
        tile = _random_scaled_crop(source, tile_hw, MOSAIC_SCALE_RANGE, rng)
        canvas[top : top + tile_hw[0], left : left + tile_hw[1]] = tile.image
        shift = np.array([left, top, left, top], np.float32)
        tiles.append(replace(tile, boxes_xyxy=tile.boxes_xyxy + shift, visible_xyxy=tile.visible_xyxy + shift))
    return AugmentedImage(
        canvas,
        np.concatenate([tile.boxes_xyxy for tile in tiles]),
        np.concatenate([tile.visible_xyxy for tile in tiles]),
        np.concatenate([tile.ignore for tile in tiles]),
    )


def filter_boxes(augmented: AugmentedImage) -> AugmentedImage:
    """Boxes cut at the borders; who is gone is dropped, who is too little left, seen too little or small is ignored."""
    whole = augmented.boxes_xyxy.astype(np.float64)
    cut = box_math.clip_boxes(whole, augmented.image.shape[:2])
    seen = np.clip(augmented.visible_xyxy, cut[:, [0, 1, 0, 1]], cut[:, [2, 3, 2, 3]])
    area = np.maximum(box_math.box_area(whole), 1e-6)
    left, visible = box_math.box_area(cut) / area, box_math.box_area(seen) / area
    sides = cut[:, 2:] - cut[:, :2]
    kept = (sides >= MIN_SIDE_PX).all(1)
    ignore = augmented.ignore | (left < MIN_AREA_RATIO) | (visible < MIN_VISIBLE_RATIO) | (sides[:, 1] < MIN_HEIGHT_PX)
    return AugmentedImage(augmented.image, cut[kept].astype(np.float32), seen[kept].astype(np.float32), ignore[kept])


def color_jitter(
    image_rgb: NDArray[np.uint8], brightness: float, contrast: float, saturation: float
) -> NDArray[np.uint8]:
    """A picture (H, W, 3) in other light: three factors from 0 on, 1 changes nothing; as torchvision's ColorJitter."""
    bright = np.clip(np.arange(256) * brightness, 0, 255)
    middle = np.dot(LUMA_RGB, cv2.mean(cv2.LUT(image_rgb, bright.astype(np.uint8)))[:3])
    table = np.clip(np.rint(contrast * bright + (1 - contrast) * middle), 0, 255).astype(np.uint8)
    lit = cv2.LUT(image_rgb, table)
    grey = cv2.cvtColor(cv2.cvtColor(lit, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(lit, saturation, grey, 1 - saturation, 0)
