"""What a training picture goes through: scale, crop, mosaic, light, mirror. Boxes follow.

Built from torchvision.transforms.v2, which moves `BoundingBoxes` with the picture. Boxes stay uncut through
the transforms, so that the share of a person that is left can be told at the end: one cut to less than
`LEAST_LEFT` or smaller than `LEAST_HEIGHT_PX` becomes an ignore region, since nobody could be blamed for
missing or for finding it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from hkd_det.letterbox import PAD_VALUE

LEAST_LEFT = 0.35  # share of a box's area
LEAST_HEIGHT_PX = 8.0
LEAST_SIDE_PX = 1.0


@dataclass(frozen=True, eq=False)
class View:
    """One training picture with its boxes, as the loader passes it on.

    picture: [3, H, W] uint8 RGB. boxes_xyxy: [N, 4] float32, pixels of it. ignore: [N] bool.
    """

    picture: Tensor
    boxes_xyxy: Tensor
    ignore: Tensor


def view_from_arrays(
    picture_rgb: NDArray[np.uint8], boxes_xyxy: NDArray[np.float32], ignore: NDArray[np.bool_]
) -> View:
    """A picture (H, W, 3) uint8 and its truth as a view."""
    return View(
        torch.from_numpy(picture_rgb).permute(2, 0, 1),
        torch.from_numpy(np.array(boxes_xyxy, dtype=np.float32)),
        torch.from_numpy(np.array(ignore, dtype=bool)),
    )


def training_view(sources: Sequence[View], size_hw: tuple[int, int]) -> View:
    """One source, or four as a mosaic, at random scale, crop, mirror and light, in `size_hw`.

    All chance comes from torch's global generator.
    """
    view = _mosaic(sources, size_hw) if len(sources) > 1 else _scaled_crop(sources[0], size_hw, scale_range=(0.6, 1.6))
    picture, boxes = _LIGHT_AND_MIRROR(view.picture, _as_boxes(view))
    return _judged(View(picture, boxes.as_subclass(Tensor), view.ignore))


_LIGHT_AND_MIRROR = v2.Compose(
    [
        v2.RandomHorizontalFlip(0.5),
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
        v2.RandomGrayscale(0.05),
    ]
)


def _scaled_crop(view: View, size_hw: tuple[int, int], scale_range: tuple[float, float]) -> View:
    """Fit the picture into `size_hw`, times a random scale, and take a random window of `size_hw` out of it."""
    transform = v2.Compose(
        [
            v2.ScaleJitter(size_hw, scale_range, antialias=True),
            v2.RandomCrop(size_hw, pad_if_needed=True, fill=PAD_VALUE),
        ]
    )
    picture, boxes = transform(view.picture, _as_boxes(view))
    return View(picture, boxes.as_subclass(Tensor), view.ignore)


def _mosaic(sources: Sequence[View], size_hw: tuple[int, int]) -> View:
    """Four pictures around a random centre, each cut to its quarter (YOLOv4)."""
    height, width = size_hw
    centre_y = int(height * torch.empty(1).uniform_(0.3, 0.7))
    centre_x = int(width * torch.empty(1).uniform_(0.3, 0.7))
    corners = [(0, 0), (0, centre_x), (centre_y, 0), (centre_y, centre_x)]
    canvas = torch.empty((3, height, width), dtype=torch.uint8)
    boxes, ignore = [], []
    for source, (top, left) in zip(sources, corners, strict=True):
        tile_hw = (centre_y if top == 0 else height - centre_y, centre_x if left == 0 else width - centre_x)
        # A tile is about half the canvas: people keep their usual size at a scale of about 2.
        tile = _judged(_scaled_crop(source, tile_hw, scale_range=(0.8, 2.4)))
        canvas[:, top : top + tile_hw[0], left : left + tile_hw[1]] = tile.picture
        boxes.append(tile.boxes_xyxy + torch.tensor([left, top, left, top]))
        ignore.append(tile.ignore)
    return View(canvas, torch.cat(boxes), torch.cat(ignore))


def _as_boxes(view: View) -> tv_tensors.BoundingBoxes:
    height, width = view.picture.shape[-2:]
    return tv_tensors.BoundingBoxes(view.boxes_xyxy, format="XYXY", canvas_size=(height, width), clamping_mode=None)


def _judged(view: View) -> View:
    """Boxes cut at the borders; what is gone is dropped, what is too little left or too small is ignored."""
    height, width = view.picture.shape[-2:]
    whole = view.boxes_xyxy
    cut = whole.clamp(min=0).minimum(torch.tensor([width, height, width, height], dtype=whole.dtype))
    sides = cut[:, 2:] - cut[:, :2]
    left = sides.prod(1) / (whole[:, 2:] - whole[:, :2]).prod(1).clamp(min=1e-6)
    kept = sides.amin(1) >= LEAST_SIDE_PX
    ignore = view.ignore | (left < LEAST_LEFT) | (sides[:, 1] < LEAST_HEIGHT_PX)
    return View(view.picture, cut[kept], ignore[kept])
