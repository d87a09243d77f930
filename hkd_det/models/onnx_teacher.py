"""A black box as teacher: an ONNX detector of whatever origin, known by its boxes and scores alone."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.models.base import DetectionBatch, FeatureInfo
from hkd_det.onnxrt.detector import OnnxDetector, open_onnx_detector


class OnnxTeacher(nn.Module):
    """Pictures in, detections out; no gradients, no features, no parameters."""

    def __init__(self, model: OnnxDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> DetectionBatch:
        """What it finds in [B, 3, H, W] RGB pictures, 0..255, in pixels of them, on their device."""
        arrays = images.detach().permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
        found = self.model(list(arrays))
        return DetectionBatch(
            tuple(torch.from_numpy(one.boxes_xyxy).to(images.device) for one in found),
            tuple(torch.from_numpy(one.scores).to(images.device) for one in found),
        )

    def postprocess(self, outputs: Any, max_det: int = 100) -> DetectionBatch:
        """The best `top` a picture of what it found."""
        assert isinstance(outputs, DetectionBatch)
        return DetectionBatch(
            tuple(boxes[:max_det] for boxes in outputs.boxes_xyxy), tuple(scores[:max_det] for scores in outputs.scores)
        )

    def feature_info(self) -> list[FeatureInfo]:
        """None: nobody sees inside."""
        return []


def is_onnx_file(path: Path) -> bool:
    """Whether a teacher's file is taken as a black box, by its ending."""
    return path.suffix == ".onnx"


def load_onnx_teacher(path: Path, device: torch.device, config_path: Path | None = None) -> OnnxTeacher:
    """The ONNX detector at `path` on a torch device, on as many threads as torch has. Raises as `open_foreign` does."""
    return OnnxTeacher(open_onnx_detector(path, str(device), config_path, torch.get_num_threads()))
