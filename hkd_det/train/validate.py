"""Validation: a detector's end-to-end answers on a data set, as the exported model would give them; its miss rate."""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from hkd_det.datasets import Sample, read_image
from hkd_det.detections import Detections
from hkd_det.letterbox import Letterbox
from hkd_det.metrics.citypersons import SETUPS, evaluate
from hkd_det.metrics.tables import DetectionTable, GroundTruthTable
from hkd_det.models.family import BaseDetector
from hkd_det.train.config import TrainConfig


def evaluate_miss_rate(config: TrainConfig, samples: Sequence[Sample], detector: BaseDetector) -> float:
    """MR^-2 of the run's setup, a fraction."""
    found = predict_dataset(detector, samples, config.imgsz_hw, bf16=config.precision == "bf16")
    truth = GroundTruthTable.from_samples([sample.ground_truth for sample in samples])
    return evaluate(truth, DetectionTable.from_detections(found), [SETUPS[config.setup]])[config.setup].value


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
