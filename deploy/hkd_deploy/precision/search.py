"""Which layers INT8 costs most, and how few of them have to stay FP32.

Each layer alone is quantised and the noise that this puts on the answers of the last layers is measured: that ranks
them. How many of the noisiest are left out is then halved by bisection, each time by the miss rate itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hkd_deploy.precision.calibration import TensorRanges, run_model
from hkd_deploy.precision.int8 import convert_to_int8
from hkd_deploy.precision.parts import GraphRegions

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
