"""INT8 quantization with a limit on the miss rate: calibrate, select a method, exclude sensitive layers.

Each layer is quantized alone, and the noise in the output layers ranks the layers. Bisection then finds the smallest
number of most sensitive layers that must stay FP32. Each bisection step measures the miss rate.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hkd_deploy.precision.graph import GraphRegions, find_graph_regions
from hkd_deploy.precision.int8 import (
    CALIBRATION_METHODS,
    SEED,
    CalibrationMethod,
    TensorRanges,
    calibrate,
    convert_to_int8,
    fold_norms,
    make_network_input,
)
from hkd_deploy.precision.model import Fp32Model, import_onnx, make_progress_bar, run_model
from hkd_det.errors import DataError
from hkd_det.image import read_image
from hkd_det.structures import Sample

MAX_EXCLUDED_RATIO = 0.5  # of all layers; with more excluded layers INT8 brings almost no speedup
NUM_RANKING_IMAGES = 8

# Returns the miss rate increase, in percentage points, of a model file; the text labels the progress bar.
MeasureMrIncrease = Callable[[Path, str], float]


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
            inputs = [
                make_network_input(source.model_metadata, read_image(sample.path))
                for sample in calibration[:NUM_RANKING_IMAGES]
            ]
            ranked = [layer for layer, _ in rank_layer_sensitivity(folded.model, regions, ranges[method], inputs)]
            best = select_excluded_nodes(
                ranked, lambda names: run_trial(method, names).mr_increase, max_mr_increase, best
            )
    model = _quantize_except(folded.model, regions, ranges[method], best.excluded_nodes)
    return QuantizationResult(model, method, len(regions.layers), best)


def rank_layer_sensitivity(
    model: Any, regions: GraphRegions, tensor_ranges: TensorRanges, inputs: Sequence[NDArray[Any]]
) -> list[tuple[str, float]]:
    """Quantize each layer alone and measure the noise in the output layers.

    The noise of a tensor is its summed squared error divided by its summed squared deviation from the mean in FP32. It
    is summed over the output layers and averaged over the inputs.

    Args:
        model: onnx.ModelProto in FP32.
        regions: Regions of the model.
        tensor_ranges: Calibrated range of each layer input.
        inputs: Batches in the shape and dtype of the model input.

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
