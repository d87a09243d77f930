"""Building detectors from specs, and checkpoint files: best.pt has a detector, last.pt the state of a training run.

Loading a checkpoint runs no code (`weights_only`).
"""

import hashlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hkd_det.config import dataclass_from_dict
from hkd_det.errors import DataError, UsageError, first_error_line
from hkd_det.files import atomic_write
from hkd_det.models.base import BaseDetector, ModelSpec
from hkd_det.models.detector import HKDDetector
from hkd_det.models.faster_rcnn import FasterRCNN
from hkd_det.models.surgery import NO_CHANGES, ModelChanges
from hkd_det.models.ultralytics import UltralyticsDetector
from hkd_det.models.yolox import YOLOX

FAMILIES: dict[str, type[BaseDetector]] = {
    "hkd": HKDDetector,
    "yolo": UltralyticsDetector,
    "faster-rcnn": FasterRCNN,
    "yolox": YOLOX,
}

FORMAT_VERSION = 2


def get_family(spec: ModelSpec) -> type[BaseDetector]:
    """Return the detector class of a spec.

    Args:
        spec: Architecture description.
    """
    return next(family for family in FAMILIES.values() if family.spec_type is type(spec))


def build_from_spec(spec: ModelSpec, changes: ModelChanges = NO_CHANGES) -> BaseDetector:
    """Build a detector with fresh weights.

    Args:
        spec: Architecture.
        changes: Changes to apply to the architecture.

    Returns:
        The detector on the CPU, in training mode.

    Raises:
        UsageError: If the network cannot be built or a change does not fit it.
    """
    return get_family(spec)(spec, changes)


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    """Convert a spec to plain values, with its family under the key `family`.

    Args:
        spec: Architecture description.

    Returns:
        Mapping that can be saved as YAML or with `weights_only`.
    """
    name = next(name for name, family in FAMILIES.items() if family.spec_type is type(spec))
    return {"family": name, **asdict(spec)}


def spec_from_dict(values: dict[str, Any]) -> ModelSpec:
    """Convert the return value of `spec_to_dict` to a spec.

    Args:
        values: Plain values, with the family under the key `family`.

    Returns:
        The spec.

    Raises:
        KeyError: If there is no such family.
        UsageError: If a value is unknown or has the wrong type.
    """
    fields = {key: value for key, value in values.items() if key != "family"}
    return dataclass_from_dict(FAMILIES[values["family"]].spec_type, fields)


@dataclass(frozen=True, eq=False)
class DetectorCheckpoint:
    """A trained detector and its origin.

    Attributes:
        model: Name of the model, as given to --model.
        spec: Architecture.
        weights: State dictionary, on the CPU.
        config: Settings of the run (`TrainConfig.as_dict`).
        epoch: Number of finished epochs.
        miss_rate: Log-average miss rate on the validation split, 0 to 1.
        changes: Changes made to the architecture.
        path: File that contains the checkpoint, for error messages.
    """

    model: str
    spec: ModelSpec
    weights: dict[str, Tensor]
    config: dict[str, Any]
    epoch: int
    miss_rate: float
    changes: ModelChanges = NO_CHANGES
    path: Path = Path("best.pt")

    @classmethod
    def from_detector(
        cls, detector: BaseDetector, model: str, config: dict[str, Any], epoch: int, miss_rate: float
    ) -> "DetectorCheckpoint":
        """Create a checkpoint of a detector with its present weights.

        Args:
            detector: Detector to save.
            model: Name of the model.
            config: Configuration of the run.
            epoch: Finished epochs.
            miss_rate: MR^-2 on the validation split, a fraction.

        Returns:
            The checkpoint.
        """
        weights = {name: value.cpu() for name, value in detector.state_dict().items()}
        return cls(model, detector.spec, weights, config, epoch, miss_rate, detector.changes)

    def build(self) -> BaseDetector:
        """Build the detector with these weights, in evaluation mode on the CPU.

        Returns:
            The detector.

        Raises:
            DataError: The weights do not fit the architecture of the file.
        """
        try:
            detector = build_from_spec(self.spec, self.changes)
            detector.load_state_dict(self.weights)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, MemoryError, UsageError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise DataError(
                f"{self.path}: its weights do not fit its architecture ({reason}). Another version of hkd-det wrote "
                "it, or it is damaged. Export it with that version, or train again."
            ) from error
        return detector.eval()


def save_detector_checkpoint(path: Path, checkpoint: DetectorCheckpoint) -> None:
    """Write best.pt atomically.

    Args:
        path: Output file.
        checkpoint: Weights and metadata.
    """
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
    """Read best.pt.

    Args:
        path: The file.

    Returns:
        The checkpoint, with weights on the CPU.

    Raises:
        DataError: If the file is missing, damaged, or not a detector checkpoint of this version.
    """
    content = _read_checkpoint(path, "detector", "Provide the best.pt of a finished run.")
    try:
        for key, cls in {"model": str, "config": dict, "epoch": int, "miss_rate": float, "weights": dict}.items():
            if not isinstance(content[key], cls):
                raise TypeError(f"{key}: expected {cls.__name__}, got {type(content[key]).__name__}")
        return DetectorCheckpoint(
            content["model"],
            spec_from_dict(content["spec"]),
            content["weights"],
            content["config"],
            content["epoch"],
            content["miss_rate"],
            ModelChanges.from_dict(content["changes"]),
            path,
        )
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise DataError(
            f"{path}: written by another version of hkd-det ({first_error_line(error)}). "
            "Train or export it with that version."
        ) from error


def save_training_state(path: Path, state: dict[str, Any]) -> None:
    """Write last.pt atomically.

    Args:
        path: Output file.
        state: Everything that an exact resume needs.
    """
    _write_checkpoint(path, {"type": "state", **state})


def load_training_state(path: Path) -> dict[str, Any]:
    """Read last.pt.

    Args:
        path: The file.

    Returns:
        The dictionary given to `save_training_state`, with tensors on the CPU.

    Raises:
        DataError: If the file is missing, damaged, or not a training state of this version.
    """
    return _read_checkpoint(path, "state", "Provide the directory of an interrupted run.")


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Compute a SHA-256 of names and values of a state dictionary. It does not depend on the file format.

    Args:
        weights: State dictionary.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    # Through memory: on a full disk, torch.save raises an error that does not name the file.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT_VERSION, **content}, buffer)
    with atomic_write(path) as temp_path:
        temp_path.write_bytes(buffer.getbuffer())


def _read_checkpoint(path: Path, checkpoint_type: str, hint: str) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint. {hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for broken files
        raise DataError(f"{path}: not a checkpoint, or damaged. {hint}") from error
    if (
        not isinstance(content, dict)
        or content.get("type") != checkpoint_type
        or content.get("format") != FORMAT_VERSION
    ):
        actual = content.get("type") if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path}: expected an hkd-det {checkpoint_type} of format {FORMAT_VERSION}, got {actual!r}. {hint}"
        )
    return content
