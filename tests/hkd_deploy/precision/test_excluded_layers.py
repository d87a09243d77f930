"""Ranking of layers by sensitivity, and the search for the fewest excluded layers."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hkd_deploy.precision.graph import find_graph_regions
from hkd_deploy.precision.int8 import QuantizationTrial, rank_layer_sensitivity, select_excluded_nodes
from hkd_deploy.precision.model import read_fp32_model

RANKED = tuple(f"layer {number}" for number in range(40))


@pytest.mark.parametrize("needed", [1, 2, 7, 19, 20])
def test_select_excluded_nodes_finds_minimum_by_bisection(needed: int) -> None:
    trial_sizes: list[int] = []

    def measure_mr_increase(excluded: tuple[str, ...]) -> float:
        trial_sizes.append(len(excluded))
        return 0.4 if len(excluded) >= needed else 3.0

    result = select_excluded_nodes(RANKED, measure_mr_increase, 0.5, QuantizationTrial((), 3.0))
    assert result == QuantizationTrial(RANKED[:needed], 0.4)
    assert len(trial_sizes) <= 1 + math.ceil(math.log2(20))


def test_select_excluded_nodes_within_limit_excludes_nothing() -> None:
    def never(_: tuple[str, ...]) -> float:
        raise AssertionError("unexpected trial")

    assert select_excluded_nodes(RANKED, never, 0.5, QuantizationTrial((), 0.5)) == QuantizationTrial((), 0.5)


def test_select_excluded_nodes_above_limit_returns_best_trial() -> None:
    result = select_excluded_nodes(RANKED, lambda excluded: 5 - len(excluded) / 10, 0.5, QuantizationTrial((), 5.0))
    assert result == QuantizationTrial(RANKED[:20], 3.0)
    assert select_excluded_nodes(("one",), lambda _: 0.0, 0.5, QuantizationTrial((), 5.0)) == QuantizationTrial((), 5.0)


def test_rank_layer_sensitivity_puts_outlier_layer_first(
    box_net: Callable[..., Path], outlier: dict[str, NDArray[np.float32]]
) -> None:
    source = read_fp32_model(box_net(**outlier))
    gray = np.random.default_rng(0).integers(0, 256, (2, 1, 96, 96, 1), np.uint8)
    ranges = {"normal": 1.0, "first_relu": 1.0}
    ranked = rank_layer_sensitivity(
        source.model, find_graph_regions(source.model), ranges, [np.repeat(image, 3, 3) for image in gray]
    )
    (first, first_noise), (second, second_noise) = ranked
    assert (first, second) == ("second_node", "first_node")
    # INT8 sets the output to 0. The error is the variance plus the squared mean, whose root is 1.7 deviations.
    assert 1 < first_noise < 8 and second_noise < 1e-3
