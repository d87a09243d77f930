"""What training and distillation ask of a detector, whatever its family: ours, torchvision's, Ultralytics'."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from hkd_det.models.prediction import DetectionBatch
from hkd_det.models.surgery import NO_CHANGES, ModelChanges, PrunableLayer
from hkd_det.models.tap import FeatureInfo


class BaseDetector(nn.Module, ABC):
    """Pictures in, people out; built from a `spec` (a frozen dataclass of its family) and `changes` made to it since.

    `forward` takes [B, 3, H, W] uint8 or float RGB pictures, 0..255, H and W multiples of 32, and gives the family's
    own output: a `Prediction` of dense detectors, a `TwoStage` of two-stage ones.
    """

    spec: Any
    changes: ModelChanges = NO_CHANGES

    @abstractmethod
    def predict(self, images: Tensor, max_det: int = 300) -> tuple[Tensor, Tensor]:
        """End to end: the best boxes [B, K, 4] xyxy input pixels and scores [B, K], 0..1, falling; K at most `top`.

        Where a picture has fewer, scores of 0 fill up.
        """

    @abstractmethod
    def postprocess(self, outputs: Any, max_det: int = 100) -> DetectionBatch:
        """Finished detections, at most `top` a picture, from an output that this detector gave."""

    @abstractmethod
    def feature_info(self) -> list[FeatureInfo]:
        """The ends of the pyramid's levels, fine to coarse: what is distilled unless somebody chooses otherwise."""

    @abstractmethod
    def prunable_layers(self) -> list[PrunableLayer]:
        """The layers whose channels nobody outside their block sees: what a capacity-dynamic student sheds."""
