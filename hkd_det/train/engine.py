"""Exponential moving average of a detector's weights: what is validated, saved as best and exported.

Validation: a detector's end-to-end answers on a data set, as the exported model would give them; its miss rate.

What each epoch of a run gave: for the log line, `results.csv` and the report's curves.
"""

import copy
import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hkd_det.datasets import Sample, read_image
from hkd_det.files import write_text
from hkd_det.letterbox import Letterbox
from hkd_det.metrics.citypersons import SETUPS, evaluate_detections
from hkd_det.models.base import BaseDetector
from hkd_det.structures import Detections
from hkd_det.train.config import TrainConfig


class ModelEma:
    """`average` follows a detector with decay rising from 0 to `decay` over the first steps.

    Make it before taps are put into the detector: they would be copied along.
    """

    def __init__(self, detector: BaseDetector, decay: float) -> None:
        self.module = copy.deepcopy(detector).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, detector: BaseDetector) -> None:
        """Move a step towards the detector; running statistics included, whole numbers copied."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        current: dict[str, Tensor] = detector.state_dict()
        for name, mean in self.module.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(current[name].to(mean.dtype), 1 - decay)
            else:
                mean.copy_(current[name])


def evaluate_miss_rate(config: TrainConfig, samples: Sequence[Sample], detector: BaseDetector) -> float:
    """MR^-2 of the run's setup, a fraction."""
    found = predict_dataset(detector, samples, config.imgsz_hw, bf16=config.precision == "bf16")
    return evaluate_detections(samples, found, [SETUPS[config.setup]])[config.setup].value


@torch.no_grad()
def predict_dataset(
    detector: BaseDetector, samples: Sequence[Sample], imgsz_hw: tuple[int, int], bf16: bool, batch: int = 8
) -> list[Detections]:
    """Detections of every sample, in order, in pixels of its picture; every score counts."""
    device = next(detector.parameters()).device
    found: list[Detections] = []
    for start in tqdm(range(0, len(samples), batch), desc="validate", unit="batch", leave=False):
        pictures = [read_image(sample.path) for sample in samples[start : start + batch]]
        letterboxes = [Letterbox((picture.shape[0], picture.shape[1]), imgsz_hw) for picture in pictures]
        inputs = np.stack([letterbox.apply(picture) for letterbox, picture in zip(letterboxes, pictures, strict=True)])
        tensor = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            boxes, scores = detector.predict(tensor)
        for letterbox, box, score in zip(letterboxes, boxes.float().cpu().numpy(), scores.cpu().numpy(), strict=True):
            found.append(Detections(letterbox.boxes_to_source(box), score))
    return found


@dataclass(frozen=True)
class EpochRecord:
    """Epoch (from 1), mean loss terms, validation miss rate MR^-2 of the run's setup (fraction), training speed.

    figures: what else the steps told, as means: an arbiter's angle and weights. eligible: whether it may become
    best.pt: a student that shrinks must have done so.
    """

    epoch: int
    losses: dict[str, float]
    miss_rate: float
    images_per_s: float
    metrics: dict[str, float] = field(default_factory=dict)
    meets_target: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return asdict(self)

    def log_line(self, epochs: int, setup: str) -> str:
        """The epoch in one line for the user."""
        loss = sum(self.losses.values())
        return (
            f"epoch {self.epoch}/{epochs}  loss {loss:.3f}  MR^-2 {setup} {100 * self.miss_rate:.2f} %  "
            f"{self.images_per_s:.1f} pictures/s"
        )


def write_history(path: Path, history: Sequence[EpochRecord]) -> None:
    """`results.csv`: a row an epoch; a loss term or figure that an epoch did not have is left empty."""
    names = list(dict.fromkeys(name for record in history for name in record.losses | record.metrics))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["epoch", *names, "miss_rate", "images_per_s"], lineterminator="\n")
    writer.writeheader()
    for record in history:
        writer.writerow(
            {
                "epoch": record.epoch,
                **record.losses,
                **record.metrics,
                "miss_rate": record.miss_rate,
                "images_per_s": record.images_per_s,
            }
        )
    write_text(path, text.getvalue())
