"""An ONNX graph without one of its outputs."""

import importlib
from pathlib import Path

from hkd_det.errors import UnavailableError


def without_output(source: Path, name: str, target: Path) -> None:
    """Write `source` to `target` without the output `name`; what only it needs is no runtime's work. Needs onnx.

    nvinfer takes the first side of every output for the batch and gives memory for the rest: of a number a
    picture, [B], nothing is left, and TensorRT would write to no address.
    """
    try:
        onnx = importlib.import_module("onnx")  # not on a device
    except ModuleNotFoundError:
        raise UnavailableError(
            "onnx is not installed; DeepStream's files are made where the weights are, with it: pip install onnx"
        ) from None
    model = onnx.load(source)
    kept = [output for output in model.graph.output if output.name != name]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.checker.check_model(model)
    onnx.save(model, target)
