"""A black box as teacher: an ONNX detector of whatever origin, known by its boxes and scores alone."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hkd_det.foreign.model import ForeignModel, open_foreign
from hkd_det.models.prediction import Found
from hkd_det.models.tap import Tap


class BlackBox(nn.Module):
    """Pictures in, detections out; no gradients, no features, no parameters."""

    def __init__(self, model: ForeignModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Found:
        """What it finds in [B, 3, H, W] RGB pictures, 0..255, in pixels of them, on their device."""
        arrays = pictures.detach().permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
        found = self.model(list(arrays))
        return Found(
            tuple(torch.from_numpy(one.boxes_xyxy).to(pictures.device) for one in found),
            tuple(torch.from_numpy(one.scores).to(pictures.device) for one in found),
        )

    def found(self, output: Any, top: int = 100) -> Found:
        """The best `top` a picture of what it found."""
        assert isinstance(output, Found)
        return Found(tuple(boxes[:top] for boxes in output.boxes_xyxy), tuple(scores[:top] for scores in output.scores))

    def taps(self) -> list[Tap]:
        """None: nobody sees inside."""
        return []


def is_black_box(path: Path) -> bool:
    """Whether a teacher's file is taken as a black box, by its ending."""
    return path.suffix == ".onnx"


def open_black_box(path: Path, device: torch.device, description: Path | None = None) -> BlackBox:
    """The ONNX detector at `path` on a torch device, on as many threads as torch has. Raises as `open_foreign` does."""
    return BlackBox(open_foreign(path, str(device), description, torch.get_num_threads()))
