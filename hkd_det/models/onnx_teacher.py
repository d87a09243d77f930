"""An ONNX detector of any origin as teacher. It provides detections only."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hkd_det.models.base import DetectionBatch, FeatureInfo
from hkd_det.onnxrt.detector import OnnxDetector, open_onnx_detector


class OnnxTeacher(nn.Module):
    """The teacher part of the `BaseDetector` interface for an ONNX file. It has no gradients and no parameters.

    Args:
        model: The opened ONNX file.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"detections"})

    def __init__(self, model: OnnxDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> DetectionBatch:
        """Run the model.

        Args:
            images (Tensor[B, 3, H, W]): RGB, 0 to 255, uint8 or float.

        Returns:
            Detections in input pixels, on the device of the images.
        """
        arrays = images.detach().permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
        detections = self.model(list(arrays))
        return DetectionBatch(
            tuple(torch.from_numpy(item.boxes_xyxy).to(images.device) for item in detections),
            tuple(torch.from_numpy(item.scores).to(images.device) for item in detections),
        )

    def postprocess(self, outputs: Any, max_det: int = 100) -> DetectionBatch:
        """Return the `max_det` best detections per image.

        Args:
            outputs: Return value of `forward`.
            max_det: Maximum number of detections per image.

        Returns:
            Detections in descending order of score.
        """
        return DetectionBatch(
            tuple(boxes[:max_det] for boxes in outputs.boxes_xyxy), tuple(scores[:max_det] for scores in outputs.scores)
        )

    def feature_info(self) -> list[FeatureInfo]:
        """Return no layers: an ONNX file has no feature maps that can be recorded."""
        return []


def is_onnx_file(path: Path) -> bool:
    """Return whether a model file is an ONNX file, by its suffix."""
    return path.suffix == ".onnx"


def load_onnx_teacher(path: Path, device: torch.device, config_path: Path | None = None) -> OnnxTeacher:
    """Open an ONNX detector on a torch device, with the thread count of torch.

    Args:
        path: The .onnx file.
        device: Device to run on.
        config_path: YAML file that describes inputs and outputs, for files that hkd-export did not write.

    Returns:
        The teacher.

    Raises:
        HkdError: As `open_onnx_detector`.
    """
    return OnnxTeacher(open_onnx_detector(path, str(device), config_path, torch.get_num_threads()))
