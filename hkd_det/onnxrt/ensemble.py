"""Ensembles of ONNX detectors: their boxes are fused as in weighted boxes fusion (Solovyev et al. 2021).

An ensemble is a YAML file. Paths are relative to it:

    models:
      - {model: yolox_nano.onnx, model_config: yolox.yaml}
      - {model: picodet_s.onnx}        # described by picodet_s.yaml or by its metadata
    iou: 0.55
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hkd_det.config import check_range, dataclass_from_dict
from hkd_det.errors import UsageError
from hkd_det.files import read_yaml
from hkd_det.onnxrt.detector import OnnxDetector, open_onnx_detector
from hkd_det.structures import Detections, box_iou

DEFAULT_IOU = 0.55
MAX_DETECTIONS = 300  # boxes per model and image that are fused


@dataclass(frozen=True)
class EnsembleMember:
    """A detector of an ensemble.

    Attributes:
        model: ONNX file.
        model_config: YAML file that describes it, or "" to look next to or inside the file.
    """

    model: str
    model_config: str = ""


@dataclass(frozen=True)
class EnsembleConfig:
    """Contents of an ensemble file.

    Attributes:
        models: The detectors.
        iou: Boxes are fused if their IoU is larger, 0 to 1.
    """

    models: tuple[EnsembleMember, ...]
    iou: float = DEFAULT_IOU

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("models: expected at least one `{model: FILE.onnx}`.")
        check_range("iou", self.iou, 0, 1)


class OnnxEnsemble:
    """Several open ONNX detectors that are used as one.

    Args:
        detectors: The detectors.
        iou: Boxes are fused if their IoU is larger.
    """

    def __init__(self, detectors: Sequence[OnnxDetector], iou: float) -> None:
        self.detectors, self.iou = tuple(detectors), iou

    def __call__(self, images_rgb: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect persons in images of any size.

        Args:
            images_rgb (list of array[H, W, 3]): RGB, uint8.

        Returns:
            Fused detections per image, in pixels of that image.
        """
        per_model = [detector(images_rgb) for detector in self.detectors]
        return [fuse_detections(detections, self.iou)[0] for detections in zip(*per_model, strict=True)]


def open_onnx_ensemble(path: Path, device: str = "cpu", threads: int | None = None) -> OnnxEnsemble:
    """Open the detectors of an ensemble file.

    Args:
        path: YAML file.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads per operator (default: one per physical core).

    Returns:
        The open ensemble.

    Raises:
        DataError: The file is not readable, or a model is missing or invalid.
        UsageError: The file is not an ensemble, or a setting is out of range.
        UnavailableError: ONNX Runtime or the device is not available.
    """
    config = dataclass_from_dict(EnsembleConfig, read_yaml(path), f"{path}:")
    detectors = []
    for member in config.models:
        description = path.parent / member.model_config if member.model_config else None
        detectors.append(open_onnx_detector(path.parent / member.model, device, description, threads))
    return OnnxEnsemble(detectors, config.iou)


def fuse_detections(detections: Sequence[Detections], iou: float = DEFAULT_IOU) -> tuple[Detections, NDArray[np.int64]]:
    """Fuse the detections of several models in one image.

    A box joins the cluster whose fused box it overlaps most, if the IoU is larger than `iou`. Only the best box of each
    model counts, so that duplicates do not change the result. The fused box is the mean of the boxes, weighted by the
    scores. Its score is the sum of the scores, divided by the number of models.

    Args:
        detections: Detections of each model.
        iou: IoU above which a box joins a cluster.

    Returns:
        detections: Fused detections in descending order of score.
        num_models: For each of them, the number of models that found it.
    """
    boxes = np.concatenate([item.boxes_xyxy[:MAX_DETECTIONS] for item in detections])
    scores = np.concatenate([item.scores[:MAX_DETECTIONS] for item in detections]).astype(np.float64)
    models = np.repeat(np.arange(len(detections)), [len(item.scores[:MAX_DETECTIONS]) for item in detections])
    fused, sums = np.zeros((len(boxes), 4)), np.zeros(len(boxes))  # sums of the scores
    found_by = np.zeros((len(boxes), len(detections)), bool)
    num_clusters = 0
    for row in np.argsort(-scores, kind="stable"):
        overlaps = box_iou(boxes[row, None], fused[:num_clusters])[0]
        cluster = int(overlaps.argmax()) if num_clusters and overlaps.max() > iou else num_clusters
        num_clusters = max(num_clusters, cluster + 1)
        if found_by[cluster, models[row]]:
            continue
        found_by[cluster, models[row]] = True
        sums[cluster] += scores[row]
        fused[cluster] += (boxes[row] - fused[cluster]) * (scores[row] / sums[cluster])
    order = np.argsort(-sums[:num_clusters], kind="stable")
    mean_scores = (sums[order] / max(1, len(detections))).astype(np.float32)
    return Detections(fused[order].astype(np.float32), mean_scores), found_by.sum(1)[order]
