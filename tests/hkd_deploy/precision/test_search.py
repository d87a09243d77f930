"""The search: who is noisy, and how few have to go."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hkd_deploy.precision.parts import parts_of
from hkd_deploy.precision.search import Trial, fewest_left_out, noise_by_layer
from hkd_deploy.precision.source import read_source

RANKED = tuple(f"layer {number}" for number in range(40))


@pytest.mark.parametrize("needed", [1, 2, 7, 19, 20])
def test_as_few_as_are_needed_go_and_in_few_trials(needed: int) -> None:
    tried: list[int] = []

    def rise_of(left_out: tuple[str, ...]) -> float:
        tried.append(len(left_out))
        return 0.4 if len(left_out) >= needed else 3.0

    found = fewest_left_out(RANKED, rise_of, 0.5, Trial((), 3.0))
    assert found == Trial(RANKED[:needed], 0.4)
    assert len(tried) <= 1 + math.ceil(math.log2(20))


def test_nothing_goes_where_nothing_has_to() -> None:
    def never(_: tuple[str, ...]) -> float:
        raise AssertionError("nothing to try")

    assert fewest_left_out(RANKED, never, 0.5, Trial((), 0.5)) == Trial((), 0.5)


def test_where_half_of_them_is_not_enough_the_best_is_given() -> None:
    found = fewest_left_out(RANKED, lambda left_out: 5 - len(left_out) / 10, 0.5, Trial((), 5.0))
    assert found == Trial(RANKED[:20], 3.0)
    assert fewest_left_out(("one",), lambda _: 0.0, 0.5, Trial((), 5.0)) == Trial((), 5.0)


def test_a_layer_with_an_outlier_is_the_noisiest(
    box_net: Callable[..., Path], outlier: dict[str, NDArray[np.float32]]
) -> None:
    source = read_source(box_net(**outlier))
    grey = np.random.default_rng(0).integers(0, 256, (2, 1, 96, 96, 1), np.uint8)
    reach = {"normal": 1.0, "first_relu": 1.0}
    ranked = noise_by_layer(source.model, parts_of(source.model), reach, [np.repeat(one, 3, 3) for one in grey])
    (worst, noise), (other, little) = ranked
    assert (worst, other) == ("second_node", "first_node")
    # All of the answer is gone: its energy about the mean, and its mean, which is about 1.7 times that deviation.
    assert 1 < noise < 8 and little < 1e-3
