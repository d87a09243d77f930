"""From a spec, or its plain values in a checkpoint, to a detector of its family.

Checkpoints: `best.pt` holds a detector, `last.pt` all that an exact resume needs. Loading runs no code.
"""

import hashlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hkd_det.config import dataclass_from_dict
from hkd_det.errors import DataError, UsageError
from hkd_det.files import atomic_write
from hkd_det.models.base import BaseDetector
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.surgery import NO_CHANGES, ModelChanges
from hkd_det.models.ultralytics import UltralyticsDetector, UltralyticsSpec

ModelSpec = HKDDetectorSpec | UltralyticsSpec | FasterRCNNSpec


FAMILIES: dict[str, type[ModelSpec]] = {"hkd": HKDDetectorSpec, "yolo": UltralyticsSpec, "faster-rcnn": FasterRCNNSpec}


def build_from_spec(spec: ModelSpec, changes: ModelChanges = NO_CHANGES) -> BaseDetector:
    """A detector with fresh weights."""
    match spec:
        case HKDDetectorSpec():
            return HKDDetector(spec, changes)
        case UltralyticsSpec():
            return UltralyticsDetector(spec, changes)
        case FasterRCNNSpec():
            return FasterRCNN(spec, changes)


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    """Plain values, the family among them."""
    family = next(name for name, kind in FAMILIES.items() if isinstance(spec, kind))
    return {"family": family, **asdict(spec)}


def spec_from_dict(values: dict[str, Any]) -> ModelSpec:
    """The inverse of `spec_as_dict`. Raises KeyError for a family there is not, UsageError for unknown values."""
    return dataclass_from_dict(
        FAMILIES[values["family"]], {key: value for key, value in values.items() if key != "family"}
    )


FORMAT_VERSION = 2


@dataclass(frozen=True, eq=False)
class DetectorCheckpoint:
    """A trained detector and where it comes from.

    changes: what was done to the network after it was built. config: the run's settings (`TrainConfig.as_dict`).
    miss_rate: log-average, fraction, on the validation split.
    """

    model: str
    spec: ModelSpec
    weights: dict[str, Tensor]
    config: dict[str, Any]
    epoch: int
    miss_rate: float
    changes: ModelChanges = NO_CHANGES

    @classmethod
    def from_detector(
        cls, detector: BaseDetector, model: str, config: dict[str, Any], epoch: int, miss_rate: float
    ) -> "DetectorCheckpoint":
        """A detector as it stands, its weights on the CPU."""
        weights = {name: value.cpu() for name, value in detector.state_dict().items()}
        return cls(model, detector.spec, weights, config, epoch, miss_rate, detector.changes)

    def build(self) -> BaseDetector:
        """The detector with these weights, in evaluation mode on the CPU."""
        detector = build_from_spec(self.spec, self.changes)
        detector.load_state_dict(self.weights)
        return detector.eval()


def save_detector_checkpoint(path: Path, checkpoint: DetectorCheckpoint) -> None:
    """Write `best.pt` in one step."""
    _write_checkpoint(
        path,
        {
            "type": "detector",
            "model": checkpoint.model,
            "spec": spec_to_dict(checkpoint.spec),
            "changes": asdict(checkpoint.changes),
            "weights": checkpoint.weights,
            "config": checkpoint.config,
            "epoch": checkpoint.epoch,
            "miss_rate": checkpoint.miss_rate,
        },
    )


def load_detector_checkpoint(path: Path) -> DetectorCheckpoint:
    """Read `best.pt`; DataError if it is missing, broken or something else."""
    content = _read_checkpoint(path, "detector", "give the best.pt of a finished run")
    try:
        changes = dict(content["changes"])
        return DetectorCheckpoint(
            content["model"],
            spec_from_dict(content["spec"]),
            content["weights"],
            content["config"],
            content["epoch"],
            content["miss_rate"],
            ModelChanges(changes["widths"], tuple(changes["separable"])),
        )
    except (KeyError, TypeError, UsageError) as error:
        raise DataError(f"{path}: written by another version of hkd-det ({error}); train or export it there") from error


def save_training_state(path: Path, state: dict[str, Any]) -> None:
    """Write `last.pt` in one step."""
    _write_checkpoint(path, {"type": "state", **state})


def load_training_state(path: Path) -> dict[str, Any]:
    """Read `last.pt`; DataError if it is missing, broken or something else."""
    return _read_checkpoint(path, "state", "give the folder of a run that was interrupted")


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """A hash of names and values: the same for the same detector, whatever file holds it."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    # Through memory: torch.save on a full disk raises an error of its own that names no file.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT_VERSION, **content}, buffer)
    with atomic_write(path) as aside:
        aside.write_bytes(buffer.getbuffer())


def _read_checkpoint(path: Path, checkpoint_type: str, hint: str) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; {hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken or foreign file
        raise DataError(f"{path}: not a readable checkpoint ({type(error).__name__}); {hint}") from error
    if (
        not isinstance(content, dict)
        or content.get("type") != checkpoint_type
        or content.get("format") != FORMAT_VERSION
    ):
        found = content.get("type") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: holds {found!r}, not an hkd-det {checkpoint_type} of format {FORMAT_VERSION}; {hint}")
    return content
