"""An ONNX graph without one of its outputs."""

from pathlib import Path

from hkd_det.packages import import_package


def without_output(source: Path, name: str, target: Path) -> None:
    """Write `source` to `target` without the output `name`; what only it needs is no runtime's work. Needs onnx.

    nvinfer takes the first side of every output for the batch and gives memory for the rest: of a number a
    picture, [B], nothing is left, and TensorRT would write to no address.
    """
    # Not on a device.
    onnx = import_package(
        "onnx", "onnx", "DeepStream's files are made where the weights are, with it: pip install onnx"
    )
    model = onnx.load(source)
    kept = [output for output in model.graph.output if output.name != name]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.checker.check_model(model)
    onnx.save(model, target)
