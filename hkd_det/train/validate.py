"""Validation: a detector's end-to-end answers on a data set, as the exported model would give them; its miss rate."""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from hkd_det.datasets import Sample, read_picture
from hkd_det.detections import Detections
from hkd_det.letterbox import Letterbox
from hkd_det.metrics.citypersons import SETUPS, evaluate
from hkd_det.metrics.tables import DetectionTable, TruthTable
from hkd_det.models.family import PersonDetector
from hkd_det.train.config import TrainConfig


def miss_rate(config: TrainConfig, samples: Sequence[Sample], detector: PersonDetector) -> float:
    """MR^-2 of the run's setup, a fraction."""
    found = detect_all(detector, samples, config.imgsz_hw, bf16=config.precision == "bf16")
    truth = TruthTable.of([sample.truth for sample in samples])
    return evaluate(truth, DetectionTable.of(found), [SETUPS[config.setup]])[config.setup].value


@torch.no_grad()
def detect_all(
    detector: PersonDetector, samples: Sequence[Sample], imgsz_hw: tuple[int, int], bf16: bool, batch: int = 8
) -> list[Detections]:
    """Detections of every sample, in order, in pixels of its picture; every score counts."""
    device = next(detector.parameters()).device
    found: list[Detections] = []
    for start in tqdm(range(0, len(samples), batch), desc="validate", unit="batch", leave=False):
        pictures = [read_picture(sample.path) for sample in samples[start : start + batch]]
        letterboxes = [Letterbox((picture.shape[0], picture.shape[1]), imgsz_hw) for picture in pictures]
        inputs = np.stack([letterbox.apply(picture) for letterbox, picture in zip(letterboxes, pictures, strict=True)])
        tensor = torch.from_numpy(inputs).permute(0, 3, 1, 2).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            boxes, scores = detector.detect(tensor)
        for letterbox, box, score in zip(letterboxes, boxes.float().cpu().numpy(), scores.cpu().numpy(), strict=True):
            found.append(Detections(letterbox.to_source(box), score))
    return found
