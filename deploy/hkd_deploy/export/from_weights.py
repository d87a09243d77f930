"""From a training's best.pt to an ONNX file that has shown that it says the same. Needs torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from hkd_deploy.export.graph import ExportModule
from hkd_deploy.export.onnx_file import export_onnx
from hkd_deploy.export.options import ExportOptions
from hkd_deploy.export.parity import Parity, ParityError
from hkd_deploy.export.reference import Reference
from hkd_deploy.export.stages import locate_difference
from hkd_deploy.export.verify import ExportedModel, Verification
from hkd_det.datasets.sample import Sample
from hkd_det.detections import Detections
from hkd_det.files import atomic_write
from hkd_det.train.checkpoint import DetectorCheckpoint
from hkd_det.train.validate import predict_dataset

__all__ = ["ParityError", "export_detector", "torch_reference", "export_and_verify"]


def export_detector(
    checkpoint: DetectorCheckpoint, path: Path, options: ExportOptions, image_paths: Sequence[Path]
) -> Parity:
    """Write `path` and compare it with the trained detector on the pictures `verify_on`.

    The file appears under its name only if parity holds: ParityError otherwise.
    """
    reference = torch_reference(checkpoint, f"{checkpoint.model}'s weights", options)
    return export_and_verify(checkpoint, path, options, Verification(reference, image_paths))


def export_and_verify(
    checkpoint: DetectorCheckpoint, path: Path, options: ExportOptions, verification: Verification
) -> Parity:
    """Write `path` if the verification takes it; raises as it does."""
    with atomic_write(path) as aside:
        export_onnx(checkpoint, aside, options)
        parity = verification.add(ExportedModel(path, "onnxruntime", is_exact=True), aside)
        assert parity is not None  # an exact form is compared, or an error is raised
    return parity


def torch_reference(checkpoint: DetectorCheckpoint, name: str, options: ExportOptions) -> Reference:
    """The trained detector in torch, on the CPU.

    Answers are compared with the deployed graph's, miss rates with those of the detector as training validates it.
    """
    deployed = ExportModule(checkpoint.build(), options).eval()

    @torch.no_grad()
    def run(batch: NDArray[Any]) -> list[NDArray[Any]]:
        return [value.numpy() for value in deployed(torch.from_numpy(batch))]

    def detect(samples: Sequence[Sample]) -> list[Detections]:
        return predict_dataset(deployed.detector, samples, options.imgsz_hw, bf16=False)

    return Reference(name, "torch", options, run, detect, lambda path, batch: locate_difference(deployed, path, batch))
