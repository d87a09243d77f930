"""Conversion to INT8: calibration on images of the user, and Q/DQ nodes that all runtimes accept.

Calibration measures the value range of each layer input. Each INT8 layer has a QuantizeLinear and DequantizeLinear pair
on its feature input and a DequantizeLinear on its weights. There are no other Q/DQ nodes; the runtimes fuse the
operators between them. All zero points are 0, weights have one scale per channel, and biases stay FP32, because
TensorRT rejects any other form. The nodes are inserted by the quantizer of ONNX Runtime.
"""

import contextlib
import importlib
import io
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.precision.graph import LAYER_OPS
from hkd_deploy.precision.model import Fp32Model, import_onnx, make_progress_bar, run_model
from hkd_det.config import check_range
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import HkdError, first_error_line
from hkd_det.image import read_image
from hkd_det.letterbox import Letterbox
from hkd_det.structures import Sample

CalibrationMethod = Literal["minmax", "entropy", "percentile"]
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = ("minmax", "entropy", "percentile")
SEED = 0
MIN_RECOMMENDED_IMAGES = 300  # with fewer images the ranges depend on the selection
MAX_HISTOGRAM_VALUES = 1 << 16  # values per feature map in a histogram; the maximum is taken over all values

TensorRanges = dict[str, float]  # value name to the largest absolute value that INT8 represents
MIN_RANGE = 1e-6  # lower limit of a range: a feature map of zeros would give a scale of 0
QUANTIZED_WEIGHT_SUFFIX = "_to_quantize"


def load_calibration_samples(data: str, count: int) -> list[Sample]:
    """Select images of a train split with a fixed seed; print a warning if they are few.

    Args:
        data: Dataset name or data YAML.
        count: Number of images. All images are returned if the split has fewer.

    Returns:
        The samples in dataset order.

    Raises:
        UsageError: If `count` is below 1.
        HkdError: If the dataset cannot be read.
    """
    check_range("--calib-images", count, 1)
    try:
        samples = load_dataset(data, "train")
    except HkdError as error:
        raise type(error)(
            f"calibration images: {first_error_line(error)}. Set --calib-data to another dataset."
        ) from error
    indices = sorted(Random(SEED).sample(range(len(samples)), min(count, len(samples))))
    if len(indices) < MIN_RECOMMENDED_IMAGES:
        warning = f"{len(indices)} calibration images; at least {MIN_RECOMMENDED_IMAGES} are recommended"
        print(f"hkd-export: warning: {warning}", file=sys.stderr)
    return [samples[index] for index in indices]


def make_network_input(metadata: ModelMetadata, image_rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Letterbox an image to the input size of a model. Graphs with a dynamic size accept this size as well.

    Args:
        metadata: Metadata of the model.
        image_rgb (uint8 array[H, W, 3]): RGB.

    Returns:
        batch (uint8 array[1, h, w, 3]): RGB.
    """
    return Letterbox((image_rgb.shape[0], image_rgb.shape[1]), metadata.imgsz_hw).apply(image_rgb)[None]


def calibrate(
    source: Fp32Model, layers: Sequence[str], samples: Sequence[Sample]
) -> dict[CalibrationMethod, TensorRanges]:
    """Run the FP32 model and measure the range of the feature input of each layer.

    `minmax` is the largest absolute value. `entropy` and `percentile` are the histogram methods of ONNX Runtime.

    Args:
        source: The FP32 model.
        layers: Node names of the layers.
        samples: Calibration images.

    Returns:
        Method to the range of each layer input.
    """
    names = sorted({node.input[0] for node in source.model.graph.node if node.name in set(layers)})
    entropy, percentile = _create_collector("entropy", 128), _create_collector("percentile", 2048)
    max_abs = dict.fromkeys(names, 0.0)
    images = (read_image(sample.path) for sample in samples)
    inputs = (make_network_input(source.model_metadata, image) for image in images)
    for values in run_model(source.model, names, make_progress_bar(inputs, "calibrating", "image", len(samples))):
        for name, value in values.items():
            max_abs[name] = max(max_abs[name], float(np.abs(value).max()))
        subset = {name: value.ravel()[:: max(1, value.size // MAX_HISTOGRAM_VALUES)] for name, value in values.items()}
        with contextlib.redirect_stdout(io.StringIO()):  # the collectors print on every call
            entropy.collect(subset)
            percentile.collect(subset)
    return {"minmax": max_abs, "entropy": _compute_ranges(entropy), "percentile": _compute_ranges(percentile)}


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
    # The nodes that replace an operator without a kernel, such as HardSwish, have no names.
    for index, node in enumerate(folded.graph.node):
        node.name = node.name or f"{node.op_type}_folded_{index}"
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


def _create_collector(method: str, num_bins: int) -> Any:
    """Create a histogram collector of ONNX Runtime with its default settings."""
    calibrate_module = importlib.import_module("onnxruntime.quantization.calibrate")
    return calibrate_module.HistogramCollector(
        method=method, symmetric=True, num_bins=num_bins, num_quantized_bins=128, percentile=99.999, scenario="same"
    )


def _compute_ranges(collector: Any) -> TensorRanges:
    with contextlib.redirect_stdout(io.StringIO()):
        limits = collector.compute_collection_result()
    return {name: float(max(abs(limit[0]), abs(limit[1]))) for name, limit in limits.items()}


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
