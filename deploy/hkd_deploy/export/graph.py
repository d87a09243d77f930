"""The graph that is exported: pictures in, boxes in their pixels out; nothing left for the device to know."""

from torch import Tensor, nn

from hkd_deploy.export import two_stage
from hkd_deploy.export.options import GraphOptions
from hkd_deploy.export.resize import GraphLetterbox, padded, to_source
from hkd_deploy.export.suppress import suppressed
from hkd_det.models.family import PersonDetector
from hkd_det.models.faster_rcnn import FasterRcnn
from hkd_det.models.suppression import IOU
from hkd_det.models.yolo import YoloDetector

SCORE_FLOOR = 0.001  # below it a detection says nothing: the miss rate needs scores from here up
TOP = 300  # detections a picture at most
# No side of what the network sees is shorter where sizes are free: at 224 px even suppression's 1,000 candidates exist.
LEAST_SIDE = 224


class DeployedDetector(nn.Module):
    """A detector with preprocessing in front and the count of valid detections behind, as `options` ask for it."""

    def __init__(self, detector: PersonDetector, options: GraphOptions) -> None:
        super().__init__()
        self.detector = detector
        self.options = options
        self.letterbox = GraphLetterbox(options.imgsz_hw) if options.letterbox_hw else None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Pictures to boxes [B, K, 4] xyxy, scores [B, K] 0..1 falling, count [B] int64; K is 300.

        The first `count` rows of a picture have a score of at least `SCORE_FLOOR`. images: uint8 RGB [B, H, W, 3], or
        float RGB [B, 3, H, W] 0..1 without preprocessing. Boxes are in input pixels, or, where the graph letterboxes,
        in pixels of the picture and cut at its borders. Raw: boxes [B, A, 4] and logits [B, A] of all candidates.
        """
        if self.letterbox is not None:
            inputs, source_hw, content_hw = self.letterbox(images.float())
            boxes, scores = detections(self.detector, inputs)
            return to_source(boxes, source_hw, content_hw), scores, (scores >= SCORE_FLOOR).sum(1)
        # float before permute: TensorRT transposes no uint8.
        inputs = images.float().permute(0, 3, 1, 2) if self.options.preprocess else images * 255
        if self.options.dynamic_size:
            inputs = padded(inputs, least_hw(self.options.imgsz_hw))
        if self.options.raw:
            return candidates(self.detector, inputs)
        boxes, scores = detections(self.detector, inputs)
        return boxes, scores, (scores >= SCORE_FLOOR).sum(1)


def least_hw(imgsz_hw: tuple[int, int]) -> tuple[int, int]:
    """(height, width) pixels that a network of free size sees at least."""
    return min(LEAST_SIDE, imgsz_hw[0]), min(LEAST_SIDE, imgsz_hw[1])


def detections(detector: PersonDetector, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """`detect` by shapes that depend on no value: the best boxes [B, K, 4] input pixels and scores [B, K], falling."""
    match detector:
        case FasterRcnn():
            iou = detector.roi_heads.nms_thresh
        case YoloDetector(answers_once=False):
            iou = IOU
        case _:  # leaves its doubles out itself, or has none
            return detector.detect(pictures, TOP)
    boxes, logits = candidates(detector, pictures)
    return suppressed(boxes, logits.sigmoid(), TOP, iou)


def candidates(detector: PersonDetector, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [B, A, 4] input pixels and logits [B, A] of the branch that `detect` chooses from."""
    if isinstance(detector, FasterRcnn):
        return two_stage.candidates(detector, pictures)
    prediction = detector(pictures)
    branch = prediction.one or prediction.many
    return branch.boxes_xyxy, branch.logits
