"""`hkd_det.letterbox` and padding inside the graph, by operators that every runtime has, for pictures of any size.

A resize is two matrix products, one an axis, whose weights follow from the picture's shape: exact, where ONNX's own
Resize either leaves out pixels when it shrinks or, with antialiasing, is unknown to most runtimes.

The graph that is exported: pictures in, boxes in their pixels out; nothing left for the device to know.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.operators import shape_as_tensor

from hkd_deploy.export.options import ExportOptions
from hkd_det.letterbox import PAD_VALUE, STRIDE
from hkd_det.models.base import BaseDetector
from hkd_det.ops.boxes import clip_boxes_traceable


class LetterboxModule(nn.Module):
    """Pictures of any one size into inputs of `input_hw`, as `Letterbox` does it."""

    def __init__(self, input_hw: tuple[int, int]) -> None:
        super().__init__()
        self.input_hw = input_hw

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, W, 3] float RGB to inputs [B, 3, h, w] in whole grey levels, (H, W) [2] and their size inside [2]."""
        source_hw = shape_as_tensor(images)[1:3].float()
        inside_hw = compute_content_hw(source_hw, self.input_hw)
        shrinks = inside_hw[0] < source_hw[0]
        down, across = (
            _compute_resize_weights(
                torch.arange(images.shape[axis + 1]).float(), source_hw[axis], inside_hw[axis], size, shrinks
            )
            for axis, size in enumerate(self.input_hw)
        )
        lower = images.permute(0, 3, 2, 1) @ down.transpose(0, 1)  # [B, 3, W, h]
        resized = lower.transpose(2, 3) @ across.transpose(0, 1)  # [B, 3, h, w]
        rows, columns = (torch.arange(size).float() for size in self.input_hw)
        inside = (rows < inside_hw[0])[:, None] & (columns < inside_hw[1])
        return torch.where(inside, resized.round(), float(PAD_VALUE)), source_hw, inside_hw


def scale_boxes_to_source(boxes_xyxy: Tensor, source_hw: Tensor, content_hw: Tensor) -> Tensor:
    """Boxes [B, K, 4] in input pixels to pixels of pictures of source_hw [2], cut at their borders.

    inside_hw [2]: their size inside the input.
    """
    return clip_boxes_traceable(boxes_xyxy * (source_hw / content_hw).flip(0).repeat(2), source_hw)


def pad_to_stride(images: Tensor, min_hw: tuple[int, int]) -> Tensor:
    """[B, 3, H, W] pictures, grey added below and at the right up to multiples of 32, `least_hw` at least."""
    sides = shape_as_tensor(images)[2:]
    missing = torch.maximum((sides + STRIDE - 1) // STRIDE * STRIDE, torch.tensor(min_hw)) - sides
    return F.pad(images, (0, missing[1], 0, missing[0]), value=float(PAD_VALUE))  # type: ignore[arg-type]


def compute_content_hw(source_hw: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """Size [2] of the scaled picture inside the input, at least one pixel; whole numbers as float32."""
    limits = torch.tensor(input_hw).float()
    # By whole numbers, exact in float32: a scale would be off at halves.
    tall = limits[0] * source_hw[1] <= limits[1] * source_hw[0]
    side, source_side = torch.where(tall, limits[0], limits[1]), torch.where(tall, source_hw[0], source_hw[1])
    return torch.minimum((source_hw * side / source_side).round().clamp(min=1), limits)


def _compute_resize_weights(
    pixels: Tensor, source_size: Tensor, content_size: Tensor, input_size: int, is_downscale: Tensor
) -> Tensor:
    """What each of `size` input pixels takes of each source pixel: [size, len(pixels)]; nothing beyond `content`.

    Shares of the area where the picture shrinks (cv2.INTER_AREA), else linear between centres (INTER_LINEAR).
    """
    places = torch.arange(input_size).float()[:, None]
    start, end = places * source_size / content_size, (places + 1) * source_size / content_size
    area = (torch.minimum(end, pixels + 1) - torch.maximum(start, pixels)).clamp(min=0) * content_size / source_size
    centre = torch.minimum(((places + 0.5) * source_size / content_size - 0.5).clamp(min=0), source_size - 1)
    linear = (1 - (centre - pixels).abs()).clamp(min=0)
    return torch.where(places < content_size, torch.where(is_downscale, area, linear), 0.0)


MIN_SCORE = 0.001  # below it a detection says nothing: the miss rate needs scores from here up


MAX_DET = 300  # detections a picture at most


# No side of what the network sees is shorter where sizes are free: at 224 px even suppression's 1,000 candidates exist.
MIN_SIDE = 224


class ExportModule(nn.Module):
    """A detector with preprocessing in front and the count of valid detections behind, as `options` ask for it."""

    def __init__(self, detector: BaseDetector, options: ExportOptions) -> None:
        super().__init__()
        self.detector = detector
        self.options = options
        self.letterbox = LetterboxModule(options.imgsz_hw) if options.letterbox_hw else None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Pictures to boxes [B, K, 4] xyxy, scores [B, K] 0..1 falling, count [B] int64; K is 300.

        The first `count` rows of a picture have a score of at least `SCORE_FLOOR`. images: uint8 RGB [B, H, W, 3], or
        float RGB [B, 3, H, W] 0..1 without preprocessing. Boxes are in input pixels, or, where the graph letterboxes,
        in pixels of the picture and cut at its borders. Raw: boxes [B, A, 4] and logits [B, A] of all candidates.
        """
        if self.letterbox is not None:
            inputs, source_hw, content_hw = self.letterbox(images.float())
            boxes, scores = self.detector.predict_traceable(inputs, MAX_DET)
            return scale_boxes_to_source(boxes, source_hw, content_hw), scores, (scores >= MIN_SCORE).sum(1)
        # float before permute: TensorRT transposes no uint8.
        inputs = images.float().permute(0, 3, 1, 2) if self.options.preprocess else images * 255
        if self.options.dynamic_size:
            inputs = pad_to_stride(inputs, min_input_hw(self.options.imgsz_hw))
        if self.options.raw:
            return self.detector.raw_outputs(inputs)
        boxes, scores = self.detector.predict_traceable(inputs, MAX_DET)
        return boxes, scores, (scores >= MIN_SCORE).sum(1)


def min_input_hw(imgsz_hw: tuple[int, int]) -> tuple[int, int]:
    """(height, width) pixels that a network of free size sees at least."""
    return min(MIN_SIDE, imgsz_hw[0]), min(MIN_SIDE, imgsz_hw[1])
