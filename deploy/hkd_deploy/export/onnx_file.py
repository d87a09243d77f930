"""Writing ONNX: the deployed graph with its description inside, in one step."""

import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor

from hkd_deploy.export.graph import ExportModule, min_input_hw
from hkd_deploy.export.metadata import make_metadata
from hkd_deploy.export.options import ExportOptions
from hkd_det.files import atomic_write
from hkd_det.train.checkpoint import DetectorCheckpoint

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
