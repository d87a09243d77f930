"""The search: who is noisy, and how few have to go."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hkd_deploy.precision.graph_regions import find_graph_regions
from hkd_deploy.precision.model import read_fp32_model
from hkd_deploy.precision.quantize import QuantizationTrial, layer_sensitivity, select_excluded_nodes

RANKED = tuple(f"layer {number}" for number in range(40))


@pytest.mark.parametrize("needed", [1, 2, 7, 19, 20])
def test_as_few_as_are_needed_go_and_in_few_trials(needed: int) -> None:
    tried: list[int] = []

    def rise_of(left_out: tuple[str, ...]) -> float:
        tried.append(len(left_out))
        return 0.4 if len(left_out) >= needed else 3.0

    found = select_excluded_nodes(RANKED, rise_of, 0.5, QuantizationTrial((), 3.0))
    assert found == QuantizationTrial(RANKED[:needed], 0.4)
    assert len(tried) <= 1 + math.ceil(math.log2(20))


def test_nothing_goes_where_nothing_has_to() -> None:
    def never(_: tuple[str, ...]) -> float:
        raise AssertionError("nothing to try")

    assert select_excluded_nodes(RANKED, never, 0.5, QuantizationTrial((), 0.5)) == QuantizationTrial((), 0.5)


def test_where_half_of_them_is_not_enough_the_best_is_given() -> None:
    found = select_excluded_nodes(RANKED, lambda left_out: 5 - len(left_out) / 10, 0.5, QuantizationTrial((), 5.0))
    assert found == QuantizationTrial(RANKED[:20], 3.0)
    assert select_excluded_nodes(("one",), lambda _: 0.0, 0.5, QuantizationTrial((), 5.0)) == QuantizationTrial((), 5.0)


def test_a_layer_with_an_outlier_is_the_noisiest(
    box_net: Callable[..., Path], outlier: dict[str, NDArray[np.float32]]
) -> None:
    source = read_fp32_model(box_net(**outlier))
    grey = np.random.default_rng(0).integers(0, 256, (2, 1, 96, 96, 1), np.uint8)
    reach = {"normal": 1.0, "first_relu": 1.0}
    ranked = layer_sensitivity(
        source.model, find_graph_regions(source.model), reach, [np.repeat(one, 3, 3) for one in grey]
    )
    (worst, noise), (other, little) = ranked
    assert (worst, other) == ("second_node", "first_node")
    # All of the answer is gone: its energy about the mean, and its mean, which is about 1.7 times that deviation.
    assert 1 < noise < 8 and little < 1e-3
