"""The graph that is exported: pictures in, boxes in their pixels out; nothing left for the device to know."""

from torch import Tensor, nn

from hkd_deploy.export import two_stage
from hkd_deploy.export.options import ExportOptions
from hkd_deploy.export.resize import LetterboxModule, pad_to_stride, scale_boxes_to_source
from hkd_deploy.export.suppress import cluster_nms
from hkd_det.models.family import BaseDetector
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.suppression import IOU_THRESHOLD
from hkd_det.models.yolo import UltralyticsDetector

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
            boxes, scores = predict_traceable(self.detector, inputs)
            return scale_boxes_to_source(boxes, source_hw, content_hw), scores, (scores >= MIN_SCORE).sum(1)
        # float before permute: TensorRT transposes no uint8.
        inputs = images.float().permute(0, 3, 1, 2) if self.options.preprocess else images * 255
        if self.options.dynamic_size:
            inputs = pad_to_stride(inputs, min_input_hw(self.options.imgsz_hw))
        if self.options.raw:
            return raw_outputs(self.detector, inputs)
        boxes, scores = predict_traceable(self.detector, inputs)
        return boxes, scores, (scores >= MIN_SCORE).sum(1)


def min_input_hw(imgsz_hw: tuple[int, int]) -> tuple[int, int]:
    """(height, width) pixels that a network of free size sees at least."""
    return min(MIN_SIDE, imgsz_hw[0]), min(MIN_SIDE, imgsz_hw[1])


def predict_traceable(detector: BaseDetector, images: Tensor) -> tuple[Tensor, Tensor]:
    """`detect` by shapes that depend on no value: the best boxes [B, K, 4] input pixels and scores [B, K], falling."""
    match detector:
        case FasterRCNN():
            iou = detector.roi_heads.nms_thresh
        case UltralyticsDetector(is_end2end=False):
            iou = IOU_THRESHOLD
        case _:  # leaves its doubles out itself, or has none
            return detector.predict(images, MAX_DET)
    boxes, logits = raw_outputs(detector, images)
    return cluster_nms(boxes, logits.sigmoid(), MAX_DET, iou)


def raw_outputs(detector: BaseDetector, images: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [B, A, 4] input pixels and logits [B, A] of the branch that `detect` chooses from."""
    if isinstance(detector, FasterRCNN):
        return two_stage.compute_faster_rcnn_outputs(detector, images)
    prediction = detector(images)
    branch = prediction.one or prediction.many
    return branch.boxes_xyxy, branch.logits
