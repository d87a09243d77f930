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

from hkd_deploy.precision.calibration import Reach, values_of
from hkd_deploy.precision.int8 import to_int8
from hkd_deploy.precision.parts import Parts

MOST_LEFT_OUT = 0.5  # of the layers: what is left then is hardly INT8


@dataclass(frozen=True)
class Trial:
    """left_out: names of the layers in FP32. rise_points: of the miss rate, in percentage points."""

    left_out: tuple[str, ...]
    rise_points: float


def noise_by_layer(model: Any, parts: Parts, reach: Reach, inputs: Sequence[NDArray[Any]]) -> list[tuple[str, float]]:
    """Every layer with the noise that it alone in INT8 puts on what the last layers say, the noisiest first.

    Noise is a share: the error's energy over the energy by which the answers vary, summed over the last layers.
    """
    answers = [node.output[0] for node in model.graph.node if node.name in set(parts.last)]
    exact = list(values_of(model, answers, inputs))
    found = []
    for layer in tqdm(parts.layers, "ranking layers", unit="layer", leave=False):
        rough = values_of(to_int8(model, [layer], reach), answers, inputs)
        found.append((layer, sum(_noise(one, other) for one, other in zip(exact, rough, strict=True)) / len(inputs)))
    return sorted(found, key=lambda pair: -pair[1])


def fewest_left_out(
    ranked: Sequence[str], rise_of: Callable[[tuple[str, ...]], float], most_points: float, first: Trial
) -> Trial:
    """The trial that leaves out the fewest of `ranked` (the costliest first) and rises by `most_points` at most.

    rise_of: the miss rate's rise with these layers left out. first: what was measured with none left out.
    Where even `MOST_LEFT_OUT` of them is not enough: the trial with the least rise of all that were made.
    """
    if first.rise_points <= most_points:
        return first
    most = int(len(ranked) * MOST_LEFT_OUT)
    trials = [first]

    def fits(count: int) -> bool:
        left_out = tuple(ranked[:count])
        trials.append(Trial(left_out, rise_of(left_out)))
        return trials[-1].rise_points <= most_points

    low, high = 0, most  # `low` is too few; `high` is enough, if anything is
    if most and fits(most):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
    fitting = [trial for trial in trials if trial.rise_points <= most_points]
    if fitting:
        return min(fitting, key=lambda trial: len(trial.left_out))
    return min(trials, key=lambda trial: trial.rise_points)


def _noise(exact: dict[str, NDArray[np.float32]], rough: dict[str, NDArray[np.float32]]) -> float:
    return sum(
        float(np.square(rough[name] - exact[name], dtype=np.float64).sum() / max(1e-12, _energy(exact[name])))
        for name in exact
    )


def _energy(values: NDArray[np.float32]) -> float:
    return float(np.square(values - values.mean(), dtype=np.float64).sum())
