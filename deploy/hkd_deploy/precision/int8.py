"""Conversion to INT8 as Q/DQ nodes in a form that TensorRT, OpenVINO and ONNX Runtime accept.

Each INT8 layer has a QuantizeLinear and DequantizeLinear pair on its feature input and a DequantizeLinear on its
weights. There are no other Q/DQ nodes; the runtimes fuse the operators between them. All zero points are 0, weights
have one scale per channel, and biases stay FP32, because TensorRT rejects any other form. The nodes are inserted by the
quantizer of ONNX Runtime.
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

MIN_RANGE = 1e-6  # lower limit of a range: a feature map of zeros would give a scale of 0
QUANTIZED_WEIGHT_SUFFIX = "_to_quantize"


def fold_norms(model: Any) -> Any:
    """Return a copy of a model with linear operators after a convolution folded into its weights.

    The torch exporter folds BatchNorm2d, but not the multiplication and addition of a frozen normalization.

    Args:
        model: onnx.ModelProto. It is not modified.

    Returns:
        The onnx.ModelProto after the basic graph optimizations of ONNX Runtime.
    """
    onnx = import_onnx()
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with TemporaryDirectory(prefix="hkd-precision-") as temp_dir:
        source_path, folded_path = Path(temp_dir) / "source.onnx", Path(temp_dir) / "folded.onnx"
        onnx.save(model, source_path)
        options.optimized_model_filepath = str(folded_path)
        runtime.InferenceSession(str(source_path), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(folded_path)
    folded.ir_version = min(folded.ir_version, model.ir_version)
    # ONNX Runtime lists every operator domain that it supports; keep those that the model contains.
    domains = [entry for entry in folded.opset_import if entry.domain in {node.domain for node in folded.graph.node}]
    del folded.opset_import[:]
    folded.opset_import.extend(domains)
    return folded


def convert_to_int8(model: Any, layers: Iterable[str], tensor_ranges: TensorRanges) -> Any:
    """Return a copy of an FP32 model with some layers in INT8.

    Args:
        model: onnx.ModelProto. It is not modified.
        layers: Node names of the layers to quantize.
        tensor_ranges: Calibrated range of the feature input of each layer.

    Returns:
        The quantized onnx.ModelProto.
    """
    onnx = import_onnx()
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = list(layers)
    if not names:
        return copy
    _duplicate_shared_weights(copy, set(names))
    with _silence_logging():
        quantizer = _create_quantizer(onnx.shape_inference.infer_shapes(copy), names, tensor_ranges)
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    quantized = quantizer.model.model
    onnx.helper.set_model_props(quantized, {entry.key: entry.value for entry in model.metadata_props})
    onnx.checker.check_model(quantized)
    return quantized


def _create_quantizer(model: Any, names: list[str], tensor_ranges: TensorRanges) -> Any:
    quantization = importlib.import_module("onnxruntime.quantization")
    calibrate = importlib.import_module("onnxruntime.quantization.calibrate")
    limits = {name: np.float32(max(max_abs, MIN_RANGE)) for name, max_abs in tensor_ranges.items()}
    ranges = calibrate.TensorsData(
        quantization.CalibrationMethod.MinMax,
        {name: (np.array(-limit), np.array(limit)) for name, limit in limits.items()},
    )
    return quantization.QDQQuantizer(
        model,
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


def _duplicate_shared_weights(model: Any, quantized_nodes: set[str]) -> None:
    """Duplicate weights that both quantized and FP32 layers use, for the quantized layers."""
    layers = [node for node in model.graph.node if node.op_type in LAYER_OPS]
    float_weights = {node.input[1] for node in layers if node.name not in quantized_nodes}
    shared = float_weights.intersection(node.input[1] for node in layers if node.name in quantized_nodes)
    for tensor in [weight for weight in model.graph.initializer if weight.name in shared]:
        copy = model.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = f"{tensor.name}{QUANTIZED_WEIGHT_SUFFIX}"
    for node in layers:
        if node.name in quantized_nodes and node.input[1] in shared:
            node.input[1] = f"{node.input[1]}{QUANTIZED_WEIGHT_SUFFIX}"


@contextmanager
def _silence_logging() -> Iterator[None]:
    """Suppress the advice that the quantizer writes to the root logger."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled_level)
