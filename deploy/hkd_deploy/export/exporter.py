"""What an exported file says of itself: the keys the field's readers know, and ours under `hkd.`.

Writing ONNX: the deployed graph with its description inside, in one step.

From a training's best.pt to an ONNX file that has shown that it says the same. Needs torch.
"""

import json
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from hkd_deploy.export.diagnose import locate_difference
from hkd_deploy.export.graph import ExportModule, min_input_hw
from hkd_deploy.export.options import ExportOptions
from hkd_deploy.export.parity import Parity, ParityError, Reference
from hkd_deploy.export.verify import ExportedModel, Verification
from hkd_deploy.model_metadata import METADATA_FORMAT, PREPROCESS, PREPROCESS_FLOAT01, PREPROCESS_IN_GRAPH
from hkd_det.datasets.catalog import dataset_license
from hkd_det.errors import HkdError
from hkd_det.files import atomic_write
from hkd_det.letterbox import STRIDE
from hkd_det.models.checkpoint import DetectorCheckpoint, get_family, weights_sha256
from hkd_det.models.zoo import count_params_and_flops
from hkd_det.structures import Detections, Sample
from hkd_det.train.engine import predict_dataset


def make_metadata(checkpoint: DetectorCheckpoint, options: ExportOptions) -> dict[str, str]:
    """Every key with its text; `hkd_deploy.model_metadata.Manifest` reads them."""
    weight = count_params_and_flops(checkpoint.build(), options.imgsz_hw)
    return {
        "description": f"hkd-det {checkpoint.model}, pedestrian detector, {'raw' if options.raw else 'end to end'}",
        "author": "hkd-det",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": version("hkd-det"),
        "license": f"{get_family(checkpoint.spec).license} (code); weights: as {_get_weights_license(checkpoint)}",
        "task": "detect",
        "stride": str(STRIDE),
        "batch": str(options.batch or "dynamic"),
        "imgsz": str(list(options.imgsz_hw)),
        "channels": "3",
        "names": "{0: 'person'}",
        "hkd.format": str(METADATA_FORMAT),
        "hkd.model": checkpoint.model,
        "hkd.parameters": str(weight.num_params),
        "hkd.flops": str(weight.flops),
        "hkd.preprocess": json.dumps(_describe_preprocess(options)),
        "hkd.max_imgsz": str(list(options.max_hw)),
        "hkd.dynamic": _format_bool(options.dynamic_size),
        "hkd.raw": _format_bool(options.raw),
        "hkd.weights_sha256": weights_sha256(checkpoint.weights),
        "hkd.data": str(checkpoint.config["data"]),
        **_make_eval_metadata(checkpoint),
    }


def _describe_preprocess(options: ExportOptions) -> dict[str, object]:
    if options.letterbox_hw:
        return PREPROCESS_IN_GRAPH
    return PREPROCESS if options.preprocess else PREPROCESS_FLOAT01


def _make_eval_metadata(checkpoint: DetectorCheckpoint) -> dict[str, str]:
    """How good the weights were when they were chosen, and on what."""
    if "setup" not in checkpoint.config:  # nobody judged it
        return {}
    return {
        "hkd.epoch": str(checkpoint.epoch),
        "hkd.miss_rate": f"{checkpoint.miss_rate:.6f}",
        "hkd.miss_rate_dataset": f"{checkpoint.config['data']}, val, {checkpoint.config['setup']}, trained weights in torch",
    }


def _get_weights_license(checkpoint: DetectorCheckpoint) -> str:
    """In words, as far as is known: the data's yaml may not have come along with the weights."""
    try:
        terms = dataset_license(str(checkpoint.config["data"]))
    except HkdError:
        terms = ""
    return f"the owners of {checkpoint.config['data']} allow: {terms}" if terms else "their training data allows"


def _format_bool(value: bool) -> str:
    return "true" if value else "false"


OPSET = 17  # what ONNX Runtime 1.16, TensorRT 8.6 and OpenVINO 2024 all read


IR_VERSION = 8  # what goes with it


def export_onnx(checkpoint: DetectorCheckpoint, path: Path, options: ExportOptions) -> None:
    """Export a trained detector, FP32. The metadata holds the keys the field's readers know and ours under `hkd.`."""
    deployed = ExportModule(checkpoint.build(), options).eval()
    names = get_output_names(options)
    with atomic_write(path) as aside:
        with warnings.catch_warnings():
            # The tracer warns of shapes that become constants: where they should, nothing free depends on them.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                deployed,
                (_make_example_input(options),),
                str(aside),
                input_names=["images"],
                output_names=names,
                dynamic_axes=_get_dynamic_axes(options, names),
                opset_version=OPSET,
                dynamo=False,
            )
        model = onnx.load(aside)
        model.ir_version = min(model.ir_version, IR_VERSION)
        onnx.helper.set_model_props(model, make_metadata(checkpoint, options))
        onnx.checker.check_model(model)
        onnx.save(model, aside)


def get_output_names(options: ExportOptions) -> list[str]:
    """What the graph gives, in order."""
    return ["boxes", "logits"] if options.raw else ["boxes", "scores", "count"]


def _make_example_input(options: ExportOptions) -> Tensor:
    """The smallest input: what the tracer makes a constant of (how many are chosen) is there in every larger one."""
    height, width = min_input_hw(options.imgsz_hw) if options.dynamic_size else options.imgsz_hw
    if options.preprocess:
        return torch.zeros(options.batch or 1, height, width, 3, dtype=torch.uint8)
    return torch.zeros(options.batch or 1, 3, height, width)


def _get_dynamic_axes(options: ExportOptions, names: list[str]) -> dict[str, dict[int, str]]:
    axes: dict[str, dict[int, str]] = {name: {} for name in ("images", *names)}
    if options.batch is None:
        for free in axes.values():
            free[0] = "batch"
    if options.dynamic_size or options.letterbox_hw:
        rows = 1 if options.preprocess else 2
        axes["images"] |= {rows: "height", rows + 1: "width"}
    if options.dynamic_size and options.raw:
        for name in names:
            axes[name][1] = "points"
    return axes


__all__ = ["ParityError", "export_and_verify", "export_detector", "torch_reference"]


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
