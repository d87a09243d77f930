"""Training augmentations: random scale, crop, mosaic, horizontal flip and color jitter, applied to images and boxes.

Why not `torchvision.transforms.v2`: it resizes the whole image in float before it crops, which takes three times as
long as decoding. Here the crop window is cut out first, and only the window is resized, in uint8, by OpenCV.
Brightness and contrast go through a lookup table of 256 values.

Each crop filters the boxes again. A person becomes an ignore region if less than `MIN_AREA_RATIO` of the box is inside
the image, if less than `MIN_VISIBLE_RATIO` is visible, or if it is lower than `MIN_HEIGHT_PX`. Neither a detection nor
a miss of such a person is an error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from hkd_det.letterbox import PAD_VALUE, resize
from hkd_det.structures import box_area, clip_boxes

MIN_AREA_RATIO = 0.35  # area inside the image / area of the full box
MIN_VISIBLE_RATIO = (
    0.2  # visible area inside the image / area of the full box; the protocols' widest setup uses it, too
)
MIN_HEIGHT_PX = 8.0
MIN_SIDE_PX = 1.0

SCALE_RANGE = (0.6, 1.6)  # relative to the image fitted into the output
# A mosaic tile has about half the sides of the output: a scale of about 2 keeps the usual size of persons.
MOSAIC_SCALE_RANGE = (0.8, 2.4)
MOSAIC_CENTER_RANGE = (0.3, 0.7)  # point at which the four tiles meet, as a ratio of the output sides
# Largest scale that an image loader is called with, relative to the output.
MAX_FRAME_SCALE = max(SCALE_RANGE[1], MOSAIC_SCALE_RANGE[1] * MOSAIC_CENTER_RANGE[1])

FLIP_PROB, GRAYSCALE_PROB = 0.5, 0.05
JITTER_RANGE = 0.3  # brightness, contrast and saturation factors are sampled from 1 - 0.3 to 1 + 0.3
LUMA_RGB = (0.299, 0.587, 0.114)


@dataclass(frozen=True, eq=False)
class AugmentedImage:
    """One training image with its N boxes.

    Attributes:
        image (uint8 array[H, W, 3]): RGB.
        boxes_xyxy (array[N, 4]): Full-body boxes, xyxy, pixels of `image`.
        visible_xyxy (array[N, 4]): Boxes of the visible parts, xyxy, pixels of `image`.
        ignore (bool array[N]): True for an ignore region.
    """

    image: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.float32]
    visible_xyxy: NDArray[np.float32]
    ignore: NDArray[np.bool_]


# Loads an image that is at least as large as if it were fitted into the given (height, width).
ImageLoader = Callable[[tuple[float, float]], AugmentedImage]


def augment(image_loaders: Sequence[ImageLoader], size_hw: tuple[int, int], rng: np.random.Generator) -> AugmentedImage:
    """Apply random scale, crop, flip and color jitter to one image, or to a mosaic of four.

    Args:
        image_loaders: One loader, or four for a mosaic.
        size_hw: Output height and width, pixels.
        rng: Source of all random numbers.

    Returns:
        The augmented image of size `size_hw` and its remaining boxes.
    """
    if len(image_loaders) > 1:
        augmented = _make_mosaic(image_loaders, size_hw, rng)
    else:
        augmented = _random_scaled_crop(image_loaders[0], size_hw, SCALE_RANGE, rng)
    if rng.random() < FLIP_PROB:
        augmented = horizontal_flip(augmented)
    brightness, contrast, saturation = rng.uniform(1 - JITTER_RANGE, 1 + JITTER_RANGE, size=3)
    if rng.random() < GRAYSCALE_PROB:
        saturation = 0.0
    return replace(augmented, image=color_jitter(augmented.image, brightness, contrast, saturation))


def horizontal_flip(augmented: AugmentedImage) -> AugmentedImage:
    """Mirror an image and its boxes left to right.

    Args:
        augmented: The image to mirror; it is not modified.

    Returns:
        The mirrored image and boxes.
    """
    width = augmented.image.shape[1]

    def flip_boxes(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)

    return AugmentedImage(
        cv2.flip(augmented.image, 1),
        flip_boxes(augmented.boxes_xyxy),
        flip_boxes(augmented.visible_xyxy),
        augmented.ignore,
    )


def filter_boxes(augmented: AugmentedImage) -> AugmentedImage:
    """Clip boxes to the image. Drop boxes outside it. Mark small, truncated or occluded boxes as ignored.

    Args:
        augmented: An image whose boxes may reach beyond its borders.

    Returns:
        The same image with the remaining boxes.
    """
    full = augmented.boxes_xyxy.astype(np.float64)
    clipped = clip_boxes(full, augmented.image.shape[:2])
    visible = np.clip(augmented.visible_xyxy, clipped[:, [0, 1, 0, 1]], clipped[:, [2, 3, 2, 3]])
    full_area = np.maximum(box_area(full), 1e-6)
    area_ratio, visible_ratio = box_area(clipped) / full_area, box_area(visible) / full_area
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = (sides >= MIN_SIDE_PX).all(1)
    ignore = (
        augmented.ignore
        | (area_ratio < MIN_AREA_RATIO)
        | (visible_ratio < MIN_VISIBLE_RATIO)
        | (sides[:, 1] < MIN_HEIGHT_PX)
    )
    return AugmentedImage(
        augmented.image, clipped[keep].astype(np.float32), visible[keep].astype(np.float32), ignore[keep]
    )


def color_jitter(
    image_rgb: NDArray[np.uint8], brightness: float, contrast: float, saturation: float
) -> NDArray[np.uint8]:
    """Scale brightness, contrast and saturation as `torchvision.transforms.ColorJitter` does, in this order.

    Args:
        image_rgb (uint8 array[H, W, 3]): RGB.
        brightness: Factor, at least 0; 1 keeps the image.
        contrast: Factor, at least 0; 1 keeps the image.
        saturation: Factor, at least 0; 1 keeps the image, 0 gives a grayscale image.

    Returns:
        uint8 [H, W, 3].
    """
    bright = np.clip(np.arange(256) * brightness, 0, 255)
    mean_luma = np.dot(LUMA_RGB, cv2.mean(cv2.LUT(image_rgb, bright.astype(np.uint8)))[:3])
    table = np.clip(np.rint(contrast * bright + (1 - contrast) * mean_luma), 0, 255).astype(np.uint8)
    adjusted = cv2.LUT(image_rgb, table)
    gray = cv2.cvtColor(cv2.cvtColor(adjusted, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(adjusted, saturation, gray, 1 - saturation, 0)


@dataclass(frozen=True)
class _CropSpan:
    """A crop along one axis: where source pixels go in the output.

    Starts and lengths are whole pixels on both sides, so `scale` is exact.

    Attributes:
        source_start: First source pixel.
        source_length: Number of source pixels.
        target_start: First output pixel.
        target_size: Number of output pixels.
    """

    source_start: int
    source_length: int
    target_start: int
    target_size: int

    @classmethod
    def sample(cls, source_size: int, target_room: int, scale: float, rng: np.random.Generator) -> "_CropSpan":
        """Sample a random window of a long side, or a random position for a short one.

        Args:
            source_size: Side of the source image, pixels.
            target_room: Side of the output, pixels.
            scale: Output pixels per source pixel.
            rng: Source of random numbers.

        Returns:
            The span: a window if the scaled side is longer than the output, else the whole side.
        """
        if source_size * scale <= target_room:
            size = max(1, round(source_size * scale))
            return cls(0, source_size, int(rng.integers(target_room - size, endpoint=True)), size)
        length = min(source_size, max(1, round(target_room / scale)))
        return cls(int(rng.integers(source_size - length, endpoint=True)), length, 0, target_room)

    @property
    def scale(self) -> float:
        return self.target_size / self.source_length

    @property
    def offset(self) -> float:
        return self.target_start - self.source_start * self.scale


def _random_scaled_crop(
    image_loader: ImageLoader, size_hw: tuple[int, int], scale_range: tuple[float, float], rng: np.random.Generator
) -> AugmentedImage:
    """Fit an image into `size_hw`, multiply by a random scale, and crop a random window of `size_hw`."""
    zoom = rng.uniform(*scale_range)
    frame_hw = (size_hw[0] * zoom, size_hw[1] * zoom)
    source = image_loader(frame_hw)
    height, width = source.image.shape[:2]
    scale = min(frame_hw[0] / height, frame_hw[1] / width)
    rows = _CropSpan.sample(height, size_hw[0], scale, rng)
    columns = _CropSpan.sample(width, size_hw[1], scale, rng)
    canvas = np.full((*size_hw, 3), PAD_VALUE, np.uint8)
    window = source.image[
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
            source.boxes_xyxy * scales_xyxy + shifts_xyxy,
            source.visible_xyxy * scales_xyxy + shifts_xyxy,
            source.ignore,
        )
    )


def _make_mosaic(
    image_loaders: Sequence[ImageLoader], size_hw: tuple[int, int], rng: np.random.Generator
) -> AugmentedImage:
    """Combine four images around a random center, each cropped to its quadrant (YOLOv4)."""
    height, width = size_hw
    center_y, center_x = (int(side * rng.uniform(*MOSAIC_CENTER_RANGE)) for side in size_hw)
    corners = [(0, 0), (0, center_x), (center_y, 0), (center_y, center_x)]
    canvas = np.empty((height, width, 3), np.uint8)
    tiles = []
    for image_loader, (top, left) in zip(image_loaders, corners, strict=True):
        tile_hw = (center_y if top == 0 else height - center_y, center_x if left == 0 else width - center_x)
        tile = _random_scaled_crop(image_loader, tile_hw, MOSAIC_SCALE_RANGE, rng)
        canvas[top : top + tile_hw[0], left : left + tile_hw[1]] = tile.image
        shift = np.array([left, top, left, top], np.float32)
        tiles.append(replace(tile, boxes_xyxy=tile.boxes_xyxy + shift, visible_xyxy=tile.visible_xyxy + shift))
    return AugmentedImage(
        canvas,
        np.concatenate([tile.boxes_xyxy for tile in tiles]),
        np.concatenate([tile.visible_xyxy for tile in tiles]),
        np.concatenate([tile.ignore for tile in tiles]),
    )
