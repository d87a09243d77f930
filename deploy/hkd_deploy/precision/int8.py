"""INT8 as Q/DQ nodes: what TensorRT, OpenVINO and ONNX Runtime all read, in one file.

Each layer that is reckoned in INT8 has a pair of QuantizeLinear and DequantizeLinear before its features and a
DequantizeLinear behind its weights; there are no others: runtimes fuse what lies between. Zero points are 0, weights
have one scale a channel, biases stay FP32: TensorRT refuses anything else. ONNX Runtime's quantiser puts them there.
"""

import importlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hkd_deploy.precision.calibration import TensorRanges
from hkd_deploy.precision.graph_regions import LAYER_OPS
from hkd_deploy.precision.model import import_onnx

# Of a scale of 0 nothing can be divided: a map that is silent in all of the calibration.
MIN_RANGE = 1e-6


def fold_norms(model: Any) -> Any:
    """The same model with what follows a convolution and is as linear (a normalisation) folded into its weights.

    torch has done so for a normalisation of its own kind, not for a frozen one's multiplication and addition.
    """
    onnx = import_onnx()
    runtime = importlib.import_module("onnxruntime")
    settings = runtime.SessionOptions()
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.log_severity_level = 4
    with TemporaryDirectory(prefix="hkd-precision-") as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save(model, before)
        settings.optimized_model_filepath = str(after)
        runtime.InferenceSession(str(before), settings, providers=["CPUExecutionProvider"])
        folded = onnx.load(after)
    folded.ir_version = min(folded.ir_version, model.ir_version)
    used = [entry for entry in folded.opset_import if entry.domain in {node.domain for node in folded.graph.node}]
    del folded.opset_import[:]  # it lists all domains it knows
    folded.opset_import.extend(used)
    return folded


def convert_to_int8(model: Any, layers: Iterable[str], tensor_ranges: TensorRanges) -> Any:
    """A copy of an FP32 model with `layers` (names of nodes) in INT8; reach: of what enters each of them."""
    quantization = importlib.import_module("onnxruntime.quantization")
    calibrate = importlib.import_module("onnxruntime.quantization.calibrate")
    onnx = import_onnx()
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    names = list(layers)
    if not names:
        return copied
    _duplicate_shared_weights(copied, set(names))
    ends = {name: np.float32(max(most, MIN_RANGE)) for name, most in tensor_ranges.items()}
    ranges = calibrate.TensorsData(
        quantization.CalibrationMethod.MinMax, {name: (np.array(-most), np.array(most)) for name, most in ends.items()}
    )
    with _silence_logging():
        quantizer = quantization.QDQQuantizer(
            onnx.shape_inference.infer_shapes(copied),
            per_channel=True,
            reduce_range=False,
            weight_qType=quantization.QuantType.QInt8,
            activation_qType=quantization.QuantType.QInt8,
            tensors_range=ranges,
            nodes_to_quantize=names,
            nodes_to_exclude=[],
            op_types_to_quantize=sorted(LAYER_OPS),
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": sorted(LAYER_OPS),
            },
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    made = quantizer.model.model
    onnx.helper.set_model_props(made, {entry.key: entry.value for entry in model.metadata_props})
    onnx.checker.check_model(made)
    return made


def _duplicate_shared_weights(model: Any, quantized_nodes: set[str]) -> None:
    """Give the quantised layers a copy of weights that others read, too: those others keep the exact ones."""
    readers = [node for node in model.graph.node if node.op_type in LAYER_OPS]
    theirs = {node.input[1] for node in readers if node.name not in quantized_nodes}
    shared = theirs.intersection(node.input[1] for node in readers if node.name in quantized_nodes)
    for tensor in [one for one in model.graph.initializer if one.name in shared]:
        copy = model.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = f"{tensor.name}_to_quantise"
    for node in readers:
        if node.name in quantized_nodes and node.input[1] in shared:
            node.input[1] = f"{node.input[1]}_to_quantise"


@contextmanager
def _silence_logging() -> Iterator[None]:
    """The quantiser advises, on the root logger, to do what has been done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
