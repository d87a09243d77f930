"""The graph that is exported: uint8 pictures in, boxes in input pixels out; nothing left for the device to know."""

from torch import Tensor, nn

from hkd_det.models.family import PersonDetector

SCORE_FLOOR = 0.001  # below it a detection says nothing: the miss rate needs scores from here up
TOP = 300  # detections a picture at most


class DeployedDetector(nn.Module):
    """A detector with preprocessing in front and the count of valid detections behind."""

    def __init__(self, detector: PersonDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, W, 3] uint8 RGB to boxes [B, K, 4] xyxy input pixels, scores [B, K] 0..1 falling, count [B] int64.

        The first `count` rows of a picture have a score of at least `SCORE_FLOOR`.
        """
        # float before permute: TensorRT transposes no uint8.
        boxes, scores = self.detector.detect(images.float().permute(0, 3, 1, 2), TOP)
        return boxes, scores, (scores >= SCORE_FLOOR).sum(1)
