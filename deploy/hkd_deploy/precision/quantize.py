"""Which layers INT8 costs most, and how few of them have to stay FP32.

Each layer alone is quantised and the noise that this puts on the answers of the last layers is measured: that ranks
them. How many of the noisiest are left out is then halved by bisection, each time by the miss rate itself.

From an FP32 file to INT8 whose miss rate rises by little: calibrate, choose the method, leave layers out.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_deploy.precision.calibration import (
    CALIBRATION_METHODS,
    SEED,
    CalibrationMethod,
    TensorRanges,
    calibrate,
    make_network_input,
    run_model,
)
from hkd_deploy.precision.graph_regions import GraphRegions, find_graph_regions
from hkd_deploy.precision.int8 import convert_to_int8, fold_norms
from hkd_deploy.precision.model import Fp32Model, import_onnx
from hkd_det.errors import DataError
from hkd_det.image import read_image
from hkd_det.structures import Sample

MAX_EXCLUDED_RATIO = 0.5  # of the layers: what is left then is hardly INT8


@dataclass(frozen=True)
class QuantizationTrial:
    """left_out: names of the layers in FP32. rise_points: of the miss rate, in percentage points."""

    excluded_nodes: tuple[str, ...]
    mr_increase: float


def layer_sensitivity(
    model: Any, regions: GraphRegions, tensor_ranges: TensorRanges, inputs: Sequence[NDArray[Any]]
) -> list[tuple[str, float]]:
    """Every layer with the noise that it alone in INT8 puts on what the last layers say, the noisiest first.

    Noise is a share: the error's energy over the energy by which the answers vary, summed over the last layers.
    """
    answers = [node.output[0] for node in model.graph.node if node.name in set(regions.output_layers)]
    exact = list(run_model(model, answers, inputs))
    found = []
    for layer in tqdm(regions.layers, "ranking layers", unit="layer", leave=False):
        rough = run_model(convert_to_int8(model, [layer], tensor_ranges), answers, inputs)
        found.append(
            (layer, sum(_compute_noise(one, other) for one, other in zip(exact, rough, strict=True)) / len(inputs))
        )
    return sorted(found, key=lambda pair: -pair[1])


def select_excluded_nodes(
    ranked: Sequence[str],
    measure_mr_increase: Callable[[tuple[str, ...]], float],
    max_mr_increase: float,
    baseline: QuantizationTrial,
) -> QuantizationTrial:
    """The trial that leaves out the fewest of `ranked` (the costliest first) and rises by `most_points` at most.

    rise_of: the miss rate's rise with these layers left out. first: what was measured with none left out.
    Where even `MOST_LEFT_OUT` of them is not enough: the trial with the least rise of all that were made.
    """
    if baseline.mr_increase <= max_mr_increase:
        return baseline
    most = int(len(ranked) * MAX_EXCLUDED_RATIO)
    trials = [baseline]

    def fits(count: int) -> bool:
        left_out = tuple(ranked[:count])
        trials.append(QuantizationTrial(left_out, measure_mr_increase(left_out)))
        return trials[-1].mr_increase <= max_mr_increase

    low, high = 0, most  # `low` is too few; `high` is enough, if anything is
    if most and fits(most):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
    fitting = [trial for trial in trials if trial.mr_increase <= max_mr_increase]
    if fitting:
        return min(fitting, key=lambda trial: len(trial.excluded_nodes))
    return min(trials, key=lambda trial: trial.mr_increase)


def _compute_noise(reference: dict[str, NDArray[np.float32]], quantized: dict[str, NDArray[np.float32]]) -> float:
    return sum(
        float(
            np.square(quantized[name] - reference[name], dtype=np.float64).sum()
            / max(1e-12, _compute_energy(reference[name]))
        )
        for name in reference
    )


def _compute_energy(values: NDArray[np.float32]) -> float:
    return float(np.square(values - values.mean(), dtype=np.float64).sum())


NUM_RANKING_IMAGES = 8  # pictures


# The rise of the miss rate, in percentage points, of the file at a path; the text is for the progress bar.
MeasureMrIncrease = Callable[[Path, str], float]


@dataclass(frozen=True, eq=False)
class QuantizationResult:
    """model: in INT8 but for the layers left out. method: of calibration. layers: that could have been quantised."""

    model: Any
    method: CalibrationMethod
    num_layers: int
    trial: QuantizationTrial

    def to_metadata(self, data: str, num_images: int) -> dict[str, Any]:
        """For the file's metadata; data, pictures: what it was calibrated on."""
        left = asdict(self.trial)
        return {
            "method": self.method,
            "layers": self.num_layers,
            **left,
            "data": data,
            "pictures": num_images,
            "seed": SEED,
        }


def quantize(
    source: Fp32Model, calibration: Sequence[Sample], measure_mr_increase: MeasureMrIncrease, max_mr_increase: float
) -> QuantizationResult:
    """The quickest INT8 model whose miss rate rises by `most_points` at most; where there is none, the best there was.

    All layers in INT8, by the method of calibration whose miss rate is least; then, if it rises too much, without the
    layers that cost most. Raises DataError for a graph without a layer to quantise.
    """
    folded = replace(source, model=fold_norms(source.model))
    parts = find_graph_regions(folded.model)
    if not parts.layers:
        raise DataError(f"{source.path}: no layer in it that INT8 would make quicker")
    reach = calibrate(folded, parts.layers, calibration)
    with TemporaryDirectory(prefix="hkd-precision-") as folder:

        def trial(method: CalibrationMethod, left_out: tuple[str, ...]) -> QuantizationTrial:
            path = Path(folder) / "trial.onnx"
            import_onnx().save(_quantize_except(folded.model, parts, reach[method], left_out), path)
            said = f"int8 {method}" + (f", {len(left_out)} layers left out" if left_out else "")
            return QuantizationTrial(left_out, measure_mr_increase(path, said))

        trials = {method: trial(method, ()) for method in CALIBRATION_METHODS}
        method = min(CALIBRATION_METHODS, key=lambda one: trials[one].mr_increase)
        best = trials[method]
        if best.mr_increase > max_mr_increase:
            inputs = [
                make_network_input(source.model_metadata, read_image(one.path))
                for one in calibration[:NUM_RANKING_IMAGES]
            ]
            ranked = [layer for layer, _ in layer_sensitivity(folded.model, parts, reach[method], inputs)]
            best = select_excluded_nodes(ranked, lambda names: trial(method, names).mr_increase, max_mr_increase, best)
    return QuantizationResult(
        _quantize_except(folded.model, parts, reach[method], best.excluded_nodes), method, len(parts.layers), best
    )


def _quantize_except(
    model: Any, regions: GraphRegions, tensor_ranges: TensorRanges, excluded_nodes: tuple[str, ...]
) -> Any:
    return convert_to_int8(model, [layer for layer in regions.layers if layer not in excluded_nodes], tensor_ranges)
