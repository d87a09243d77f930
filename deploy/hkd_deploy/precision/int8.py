"""Quantization to INT8: calibration, Q/DQ nodes that all runtimes accept, and a limit on the miss rate.

Calibration measures the value range of each layer input. Each INT8 layer has a QuantizeLinear and DequantizeLinear pair
on its feature input and a DequantizeLinear on its weights. There are no other Q/DQ nodes; the runtimes fuse the
operators between them. All zero points are 0, weights have one scale per channel, and biases stay FP32, because
TensorRT rejects any other form. Weights have values of -64 to 64: processors without VNNI (AVX2) add two products of
features and weights in 16 bits, and with values up to 127 the sum saturates in OpenVINO. The nodes are inserted by the
quantizer of ONNX Runtime.

If the miss rate exceeds the limit, each layer is quantized alone, and the noise in the output layers ranks the layers.
Bisection then finds the smallest number of most sensitive layers that must stay FP32. Each bisection step measures the
miss rate.
"""

import contextlib
import importlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.precision.graph import LAYER_OPS, GraphRegions, find_graph_regions, fold_norms
from hkd_deploy.precision.model import Fp32Model, ModelInput, import_onnx, make_progress_bar, run_model
from hkd_det.errors import DataError
from hkd_det.image import read_image
from hkd_det.structures import Sample

CalibrationMethod = Literal["minmax", "entropy", "percentile"]
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = ("minmax", "entropy", "percentile")
SEED = 0
MAX_HISTOGRAM_VALUES = 1 << 16  # values per feature map in a histogram; the maximum is taken over all values

TensorRanges = dict[str, float]  # value name to the largest absolute value that INT8 represents
MIN_RANGE = 1e-6  # lower limit of a range: a feature map of zeros would give a scale of 0
QUANTIZED_WEIGHT_SUFFIX = "_to_quantize"
MAX_EXCLUDED_RATIO = 0.5  # of all layers; with more excluded layers INT8 brings almost no speedup
NUM_RANKING_IMAGES = 8

# Returns the miss rate increase, in percentage points, of a model file; the text labels the progress bar.
MeasureMrIncrease = Callable[[Path, str], float]


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
    inputs = (source.make_inputs(image) for image in images)
    for values in run_model(source.model, names, make_progress_bar(inputs, "calibrating", "image", len(samples))):
        for name, value in values.items():
            max_abs[name] = max(max_abs[name], float(np.abs(value).max()))
        subset = {name: value.ravel()[:: max(1, value.size // MAX_HISTOGRAM_VALUES)] for name, value in values.items()}
        with contextlib.redirect_stdout(io.StringIO()):  # the collectors print on every call
            entropy.collect(subset)
            percentile.collect(subset)
    return {"minmax": max_abs, "entropy": _compute_ranges(entropy), "percentile": _compute_ranges(percentile)}


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
        reduce_range=True,
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


@dataclass(frozen=True)
class QuantizationTrial:
    """One measured selection of layers.

    Attributes:
        excluded_nodes: Node names of the layers that stay FP32.
        mr_increase: Miss rate increase over the FP32 model, in percentage points.
    """

    excluded_nodes: tuple[str, ...]
    mr_increase: float


@dataclass(frozen=True, eq=False)
class QuantizationResult:
    """A quantized model and its settings.

    Attributes:
        model: onnx.ModelProto.
        method: Calibration method.
        num_layers: Number of layers that can be quantized.
        trial: Excluded layers and miss rate increase.
    """

    model: Any
    method: CalibrationMethod
    num_layers: int
    trial: QuantizationTrial

    def to_metadata(self, data: str, num_images: int) -> dict[str, Any]:
        """Return the settings for the metadata of the file.

        Args:
            data: Calibration dataset.
            num_images: Number of calibration images.
        """
        return {
            "method": self.method,
            "num_layers": self.num_layers,
            **asdict(self.trial),
            "data": data,
            "num_images": num_images,
            "seed": SEED,
        }


def quantize(
    source: Fp32Model, calibration: Sequence[Sample], measure_mr_increase: MeasureMrIncrease, max_mr_increase: float
) -> QuantizationResult:
    """Quantize a model with as few excluded layers as the miss rate limit allows.

    All layers are quantized with each calibration method; the method with the lowest miss rate is selected. If its miss
    rate exceeds the limit, sensitive layers are excluded.

    Args:
        source: The FP32 model.
        calibration: Calibration images.
        measure_mr_increase: Function that measures a model file.
        max_mr_increase: Limit of the miss rate increase, in percentage points.

    Returns:
        The model with the fewest excluded layers within the limit. If no trial is within the limit, the trial with the
        lowest increase.

    Raises:
        DataError: If the graph has no layer that can be quantized.
    """
    folded = replace(source, model=fold_norms(source.model))
    regions = find_graph_regions(folded.model)
    if not regions.layers:
        raise DataError(f"{source.path}: no layer that INT8 can accelerate. Use the FP32 file.")
    ranges = calibrate(folded, regions.layers, calibration)
    with TemporaryDirectory(prefix="hkd-precision-") as temp_dir:

        def run_trial(method: CalibrationMethod, excluded_nodes: tuple[str, ...]) -> QuantizationTrial:
            path = Path(temp_dir) / "trial.onnx"
            import_onnx().save(_quantize_except(folded.model, regions, ranges[method], excluded_nodes), path)
            desc = f"int8 {method}" + (f", {len(excluded_nodes)} layers excluded" if excluded_nodes else "")
            return QuantizationTrial(excluded_nodes, measure_mr_increase(path, desc))

        trials = {method: run_trial(method, ()) for method in CALIBRATION_METHODS}
        method = min(CALIBRATION_METHODS, key=lambda candidate: trials[candidate].mr_increase)
        best = trials[method]
        if best.mr_increase > max_mr_increase:
            inputs = [source.make_inputs(read_image(sample.path)) for sample in calibration[:NUM_RANKING_IMAGES]]
            ranked = [layer for layer, _ in rank_layer_sensitivity(folded.model, regions, ranges[method], inputs)]
            best = select_excluded_nodes(
                ranked, lambda names: run_trial(method, names).mr_increase, max_mr_increase, best
            )
    model = _quantize_except(folded.model, regions, ranges[method], best.excluded_nodes)
    return QuantizationResult(model, method, len(regions.layers), best)


def rank_layer_sensitivity(
    model: Any, regions: GraphRegions, tensor_ranges: TensorRanges, inputs: Sequence[ModelInput]
) -> list[tuple[str, float]]:
    """Quantize each layer alone and measure the noise in the output layers.

    The noise of a tensor is its summed squared error divided by its summed squared deviation from the mean in FP32. It
    is summed over the output layers and averaged over the inputs.

    Args:
        model: onnx.ModelProto in FP32.
        regions: Regions of the model.
        tensor_ranges: Calibrated range of each layer input.
        inputs: As those of `run_model`.

    Returns:
        (layer name, noise) pairs, most sensitive first.
    """
    outputs = [node.output[0] for node in model.graph.node if node.name in set(regions.output_layers)]
    expected = list(run_model(model, outputs, inputs))
    noise = {}
    for layer in make_progress_bar(regions.layers, "ranking layers", "layer"):
        actual = run_model(convert_to_int8(model, [layer], tensor_ranges), outputs, inputs)
        noise[layer] = sum(_compute_noise(*pair) for pair in zip(expected, actual, strict=True)) / len(inputs)
    return sorted(noise.items(), key=lambda item: -item[1])


def select_excluded_nodes(
    ranked: Sequence[str],
    measure_mr_increase: Callable[[tuple[str, ...]], float],
    max_mr_increase: float,
    baseline: QuantizationTrial,
) -> QuantizationTrial:
    """Find the smallest number of excluded layers that keeps the miss rate within the limit, by bisection.

    Args:
        ranked: Layer names, most sensitive first.
        measure_mr_increase: Function that returns the increase with some layers excluded, in percentage points.
        max_mr_increase: Limit of the increase, in percentage points.
        baseline: The trial without excluded layers.

    Returns:
        The trial within the limit that excludes the fewest layers. If no trial with at most `MAX_EXCLUDED_RATIO` of the
        layers is within the limit, the trial with the lowest increase.
    """
    if baseline.mr_increase <= max_mr_increase:
        return baseline
    max_excluded = int(len(ranked) * MAX_EXCLUDED_RATIO)
    trials = [baseline]

    def is_within_limit(count: int) -> bool:
        excluded = tuple(ranked[:count])
        trials.append(QuantizationTrial(excluded, measure_mr_increase(excluded)))
        return trials[-1].mr_increase <= max_mr_increase

    low, high = 0, max_excluded  # invariant: `low` exceeds the limit, `high` is within it
    if max_excluded and is_within_limit(max_excluded):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_within_limit(middle) else (middle, high)
    within_limit = [trial for trial in trials if trial.mr_increase <= max_mr_increase]
    if within_limit:
        return min(within_limit, key=lambda trial: len(trial.excluded_nodes))
    return min(trials, key=lambda trial: trial.mr_increase)


def _compute_noise(expected: dict[str, NDArray[np.float32]], actual: dict[str, NDArray[np.float32]]) -> float:
    noise = 0.0
    for name, values in expected.items():
        error = float(np.square(actual[name] - values, dtype=np.float64).sum())
        noise += error / max(1e-12, float(np.square(values - values.mean(), dtype=np.float64).sum()))
    return noise


def _quantize_except(
    model: Any, regions: GraphRegions, tensor_ranges: TensorRanges, excluded_nodes: tuple[str, ...]
) -> Any:
    return convert_to_int8(model, [layer for layer in regions.layers if layer not in excluded_nodes], tensor_ranges)
