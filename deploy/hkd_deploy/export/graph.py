"""The exported graph: preprocessing, detector, and the number of valid detections.

Letterboxing uses two matrix products, one per axis, with weights computed from the image shape. The ONNX operator
Resize is not suitable: without antialiasing it skips pixels, and most runtimes do not support it with antialiasing.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.operators import shape_as_tensor

from hkd_deploy.model_metadata import MIN_DYNAMIC_SIDE, ExportOptions
from hkd_det.letterbox import MAX_LINEAR_REDUCTION, PAD_VALUE, STRIDE
from hkd_det.models.base import BaseDetector
from hkd_det.ops.boxes import clip_boxes_traceable

MIN_SCORE = 0.001  # lowest score of a valid detection; lower scores do not change the miss rate
MAX_DET = 300  # detections per image
MAX_HALVINGS = 12  # from 4,096 pixels to one


class LetterboxModule(nn.Module):
    """Letterbox images of any size in the graph, with the result of `hkd_det.letterbox.Letterbox`.

    Args:
        input_hw: (height, width) of the network input in pixels.
    """

    def __init__(self, input_hw: tuple[int, int]) -> None:
        super().__init__()
        self.input_hw = input_hw

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Resize and pad a batch of images of one size.

        Args:
            images (Tensor[B, H, W, 3]): RGB, 0 to 255.

        Returns:
            inputs (Tensor[B, 3, h, w]): RGB, 0 to 255, rounded.
            source_hw (Tensor[2]): H and W.
            content_hw (Tensor[2]): Size of the scaled image within the input, in pixels.
        """
        source_hw = shape_as_tensor(images)[1:3].float()
        content_hw = compute_content_hw(source_hw, self.input_hw)
        row_weights, column_weights = (
            _compute_resize_weights(
                torch.arange(images.shape[axis + 1]).float(), source_hw[axis], content_hw[axis], size
            )
            for axis, size in enumerate(self.input_hw)
        )
        rows_resized = images.permute(0, 3, 2, 1) @ row_weights.transpose(0, 1)  # [B, 3, W, h]
        resized = rows_resized.transpose(2, 3) @ column_weights.transpose(0, 1)  # [B, 3, h, w]
        rows, columns = (torch.arange(size).float() for size in self.input_hw)
        is_content = (rows < content_hw[0])[:, None] & (columns < content_hw[1])
        return torch.where(is_content, resized.round(), float(PAD_VALUE)), source_hw, content_hw


class ExportModule(nn.Module):
    """A detector with the preprocessing and outputs of the exported graph.

    Args:
        detector: The trained detector.
        options: Inputs and outputs of the graph.
    """

    def __init__(self, detector: BaseDetector, options: ExportOptions) -> None:
        super().__init__()
        self.detector = detector
        self.options = options
        self.letterbox = LetterboxModule(options.imgsz_hw) if options.letterbox_hw else None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the detector.

        Args:
            images (uint8 Tensor[B, H, W, 3]): RGB. Without `options.preprocess` float32 [B, 3, H, W], 0 to 1.

        Returns:
            boxes (Tensor[B, 300, 4]): xyxy, input pixels; image pixels, clipped, with `options.letterbox_hw`.
            scores (Tensor[B, 300]): 0 to 1, descending.
            count (int64 Tensor[B]): Number of rows with a score of at least `MIN_SCORE`.

            With `options.raw` only boxes [B, A, 4] and logits [B, A] of all candidates.
        """
        if self.letterbox is not None:
            inputs, source_hw, content_hw = self.letterbox(images.float())
            boxes, scores = self.detector.predict_traceable(inputs, MAX_DET)
            return scale_boxes_to_source(boxes, source_hw, content_hw), scores, (scores >= MIN_SCORE).sum(1)
        # Convert before the transpose: TensorRT does not transpose uint8.
        inputs = images.float().permute(0, 3, 1, 2) if self.options.preprocess else images * 255
        if self.options.dynamic_size:
            inputs = pad_to_stride(inputs, get_min_input_hw(self.options.imgsz_hw))
        if self.options.raw:
            return self.detector.raw_outputs(inputs)
        boxes, scores = self.detector.predict_traceable(inputs, MAX_DET)
        return boxes, scores, (scores >= MIN_SCORE).sum(1)


def get_min_input_hw(imgsz_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (height, width) of the network input in a graph with a dynamic size.

    Args:
        imgsz_hw: Largest (height, width) of the network input in pixels.
    """
    return min(MIN_DYNAMIC_SIDE, imgsz_hw[0]), min(MIN_DYNAMIC_SIDE, imgsz_hw[1])


def scale_boxes_to_source(boxes_xyxy: Tensor, source_hw: Tensor, content_hw: Tensor) -> Tensor:
    """Map boxes from the network input to the source image and clip them.

    Args:
        boxes_xyxy (Tensor[B, K, 4]): xyxy, input pixels.
        source_hw (Tensor[2]): Size of the source images.
        content_hw (Tensor[2]): Size of the scaled images within the input.

    Returns:
        boxes_xyxy (Tensor[B, K, 4]): xyxy, image pixels.
    """
    return clip_boxes_traceable(boxes_xyxy * (source_hw / content_hw).flip(0).repeat(2), source_hw)


def pad_to_stride(images: Tensor, min_hw: tuple[int, int]) -> Tensor:
    """Pad images with gray at the bottom and right to multiples of the stride.

    Args:
        images (Tensor[B, 3, H, W]): RGB, 0 to 255.
        min_hw: Smallest (height, width) of the result in pixels.

    Returns:
        padded (Tensor[B, 3, h, w]): RGB, 0 to 255.
    """
    sides = shape_as_tensor(images)[2:]
    missing = torch.maximum((sides + STRIDE - 1) // STRIDE * STRIDE, torch.tensor(min_hw)) - sides
    # F.pad is typed for int, but a traced graph needs tensors.
    return F.pad(images, (0, missing[1], 0, missing[0]), value=float(PAD_VALUE))  # type: ignore[arg-type]


def compute_content_hw(source_hw: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """Return the size of the scaled image within the network input.

    Args:
        source_hw (Tensor[2]): Size of the source image.
        input_hw: (height, width) of the network input.

    Returns:
        content_hw (Tensor[2]): Integers of at least 1 as float32.
    """
    limits = torch.tensor(input_hw).float()
    # Products and quotients of integers are exact in float32; a rounded scale factor would be off by one at halves.
    is_height_limited = limits[0] * source_hw[1] <= limits[1] * source_hw[0]
    side = torch.where(is_height_limited, limits[0], limits[1])
    source_side = torch.where(is_height_limited, source_hw[0], source_hw[1])
    return torch.minimum((source_hw * side / source_side).round().clamp(min=1), limits)


def _compute_resize_weights(pixels: Tensor, source_size: Tensor, content_size: Tensor, input_size: int) -> Tensor:
    """Return the weight of each source pixel in each input pixel along one axis, as in `hkd_det.letterbox.resize`.

    The side is halved while it is larger than twice the content; the result is interpolated bilinearly.

    Args:
        pixels (Tensor[N]): Indices of the source pixels.
        source_size (Tensor[]): N.
        content_size (Tensor[]): Number of input pixels that the image covers.
        input_size: Number of input pixels.

    Returns:
        weights (Tensor[input_size, N]): Rows sum to 1 within the content and to 0 in the padding.
    """
    reduced_size = source_size
    for _ in range(MAX_HALVINGS):
        is_too_large = reduced_size > MAX_LINEAR_REDUCTION * content_size
        reduced_size = torch.where(is_too_large, (reduced_size / 2).floor(), reduced_size)
    targets = torch.arange(input_size).float()[:, None]
    center = torch.minimum(((targets + 0.5) * reduced_size / content_size - 0.5).clamp(min=0), reduced_size - 1)
    low = center.floor()
    high = torch.minimum(low + 1, reduced_size - 1)
    ratio = center - low
    weights = (1 - ratio) * _compute_area_weights(low, pixels, source_size / reduced_size)
    weights = weights + ratio * _compute_area_weights(high, pixels, source_size / reduced_size)
    return torch.where(targets < content_size, weights, 0.0)


def _compute_area_weights(reduced_pixels: Tensor, pixels: Tensor, scale: Tensor) -> Tensor:
    """Return the share of each source pixel [N] in each pixel [M, 1] of the reduced side, as [M, N]."""
    start, end = reduced_pixels * scale, (reduced_pixels + 1) * scale
    return (torch.minimum(end, pixels + 1) - torch.maximum(start, pixels)).clamp(min=0) / scale
