"""From a training's best.pt to an ONNX file that has shown that it says the same. Needs torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from hkd_deploy.export.graph import DeployedDetector
from hkd_deploy.export.onnx_file import write_onnx
from hkd_deploy.export.options import GraphOptions
from hkd_deploy.export.parity import Parity, ParityError
from hkd_deploy.export.reference import Reference
from hkd_deploy.export.stages import explain
from hkd_deploy.export.verify import Form, Verification
from hkd_det.datasets.sample import Sample
from hkd_det.detections import Detections
from hkd_det.files import replacing
from hkd_det.train.checkpoint import DetectorCheckpoint
from hkd_det.train.validate import detect_all

__all__ = ["ParityError", "export", "trained_reference", "write_verified"]


def export(checkpoint: DetectorCheckpoint, path: Path, options: GraphOptions, verify_on: Sequence[Path]) -> Parity:
    """Write `path` and compare it with the trained detector on the pictures `verify_on`.

    The file appears under its name only if parity holds: ParityError otherwise.
    """
    reference = trained_reference(checkpoint, f"{checkpoint.model}'s weights", options)
    return write_verified(checkpoint, path, options, Verification(reference, verify_on))


def write_verified(
    checkpoint: DetectorCheckpoint, path: Path, options: GraphOptions, verification: Verification
) -> Parity:
    """Write `path` if the verification takes it; raises as it does."""
    with replacing(path) as aside:
        write_onnx(checkpoint, aside, options)
        parity = verification.take(Form(path, "onnxruntime", exact=True), aside)
        assert parity is not None  # an exact form is compared, or an error is raised
    return parity


def trained_reference(checkpoint: DetectorCheckpoint, name: str, options: GraphOptions) -> Reference:
    """The trained detector in torch, on the CPU.

    Answers are compared with the deployed graph's, miss rates with those of the detector as training validates it.
    """
    deployed = DeployedDetector(checkpoint.build(), options).eval()

    @torch.no_grad()
    def run(batch: NDArray[Any]) -> list[NDArray[Any]]:
        return [value.numpy() for value in deployed(torch.from_numpy(batch))]

    def detect(samples: Sequence[Sample]) -> list[Detections]:
        return detect_all(deployed.detector, samples, options.imgsz_hw, bf16=False)

    return Reference(name, "torch", options, run, detect, lambda path, batch: explain(deployed, path, batch))
