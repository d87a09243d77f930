"""The weights of two objectives against a solver, and what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from hkd_det.distill.gradients import GramMatrix, LossWeights, compute_min_norm_weight
from hkd_det.distill.gradients import solve_loss_weights as solve
from hkd_det.distill.mokd import MoKDConfig
from hkd_det.errors import UsageError

PAIRS = arrays(np.float64, (2, 3), elements=st.floats(-10, 10).map(lambda x: round(x, 2)))
LOSSES = st.floats(0.05, 20)
LOGS = MoKDConfig("min-norm", eps=1e-9)


def solve_loss_weights(config: MoKDConfig, gram: GramMatrix, det_loss: float, distill_loss: float) -> LossWeights:
    return solve(config.solver, config.eps, gram, det_loss, distill_loss)  # type: ignore[arg-type]


def gram_of(pair: np.ndarray) -> GramMatrix:
    return GramMatrix(float(pair[0] @ pair[0]), float(pair[0] @ pair[1]), float(pair[1] @ pair[1]))


def step_of(settings: MoKDConfig, pair: np.ndarray, losses: tuple[float, float]) -> np.ndarray:
    verdict = solve_loss_weights(settings, gram_of(pair), *losses)
    return verdict.det_loss_scale * pair[0] + verdict.distill_loss_scale * pair[1]


@effort(max_examples=150, deadline=None)
@given(PAIRS, st.sampled_from(["free", "opposed", "parallel", "equal", "zero"]), st.floats(0.1, 5))
def test_min_norm_weight_matches_quadratic_program(pair: np.ndarray, kind: str, factor: float) -> None:
    """A solver on the simplex of both weights; where the optimum is not unique the lengths are compared."""
    second = {"opposed": -factor * pair[0], "parallel": factor * pair[0], "equal": pair[0], "zero": 0 * pair[0]}
    pair = np.stack([pair[0], second.get(kind, pair[1])])
    gram = pair @ pair.T
    found = minimize(
        lambda pi: pi @ gram @ pi / 2, [0.3, 0.7], jac=lambda pi: gram @ pi, bounds=[(0, 1)] * 2, method="SLSQP",
        constraints={"type": "eq", "fun": lambda pi: pi.sum() - 1, "jac": lambda _: np.ones(2)},
        options={"ftol": 1e-14, "maxiter": 200},
    )  # fmt: skip
    share = compute_min_norm_weight(gram_of(pair))
    assert 0 <= share <= 1
    pi = np.array([share, 1 - share])
    assert pi @ gram @ pi <= found.x @ gram @ found.x + 1e-7 * (1 + np.trace(gram))
    if np.sum((pair[0] - pair[1]) ** 2) > 0.1:
        assert share == pytest.approx(found.x[0], abs=1e-3)


@effort(max_examples=200, deadline=None)
@given(PAIRS, LOSSES, LOSSES)
def test_min_norm_step_decreases_both_losses_equally(pair: np.ndarray, task: float, taught: float) -> None:
    logs = pair / np.array([[task], [taught]])
    step = step_of(LOGS, pair, (task, taught))
    if (pair**2).sum(1).min() == 0:
        np.testing.assert_array_equal(step, pair.sum(0))
        return
    gains, rounding = logs @ step, 1e-7 * np.linalg.norm(logs) * np.linalg.norm(pair)
    assert gains.min() >= -rounding
    if 0 < compute_min_norm_weight(gram_of(logs)) < 1:
        assert gains[0] == pytest.approx(gains[1], rel=1e-5, abs=rounding)


@effort(max_examples=150, deadline=None)
@given(PAIRS, LOSSES, LOSSES, st.floats(0.01, 100), st.sampled_from(["min-norm", "bisector"]))
def test_step_does_not_depend_on_loss_scale(
    pair: np.ndarray, task: float, taught: float, factor: float, rule: str
) -> None:
    """c L_taught moves as L_taught does; c L_task as c times that: it is the task that sets the step's length."""
    settings = MoKDConfig(rule, eps=1e-9)  # type: ignore[arg-type]
    if (pair**2).sum(1).min() < 1e-3:
        return
    step = step_of(settings, pair, (task, taught))
    close = {"rtol": 1e-5, "atol": 1e-6 * np.linalg.norm(pair)}
    scaled = pair * np.array([[1.0], [factor]])
    np.testing.assert_allclose(step_of(settings, scaled, (task, factor * taught)), step, **close)
    scaled = pair * np.array([[factor], [1.0]])
    np.testing.assert_allclose(step_of(settings, scaled, (factor * task, taught)) / factor, step, **close)


@effort(max_examples=150, deadline=None)
@given(PAIRS, LOSSES, LOSSES, st.sampled_from(["min-norm", "bisector"]))
def test_step_is_at_most_as_long_as_detection_gradient(pair: np.ndarray, task: float, taught: float, rule: str) -> None:
    if (pair**2).sum(1).min() < 1e-3:
        return
    step, own = (
        np.linalg.norm(g)
        for g in (step_of(MoKDConfig(rule), pair, (task, taught)), pair[0])  # type: ignore[arg-type]
    )
    assert step <= own * (1 + 1e-9)
    if pair[0] @ pair[1] >= 0:
        assert step == pytest.approx(own)


def test_opposed_gradients_are_not_amplified() -> None:
    for rule in ("min-norm", "bisector"):
        opposed = np.array([[3.0, 0.0], [-1.0, 0.0]])
        np.testing.assert_allclose(step_of(MoKDConfig(rule), opposed, (3.0, 1.0)), 0, atol=1e-12)
        angle = math.radians(170)
        nearly = np.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        step = step_of(MoKDConfig(rule), nearly, (1.0, 1.0))
        assert np.linalg.norm(step) == pytest.approx(2 * math.cos(angle / 2))


def test_bisector_has_equal_angles() -> None:
    pair = np.array([[4.0, 0.0], [0.0, 0.1]])
    step = step_of(MoKDConfig("bisector"), pair, (1.0, 7.0))
    np.testing.assert_allclose(step, np.array([1.0, 1.0]) * 4 / math.sqrt(2))


def test_min_norm_matches_hand_calculation() -> None:
    """Losses 2 and 1, gradients (2, 0) and (0, 2): logs (1, 0) and (0, 2), shares 0.8 and 0.2, sum (0.8, 0.4)."""
    verdict = solve_loss_weights(LOGS, GramMatrix(4.0, 0.0, 4.0), 2.0, 1.0)
    assert verdict.det_weight == pytest.approx(0.8)
    stretch = 2 / math.sqrt(0.8)
    assert (verdict.det_loss_scale, verdict.distill_loss_scale) == (
        pytest.approx(stretch * 0.4),
        pytest.approx(stretch * 0.2),
    )
    told = verdict.metrics
    assert told["mokd_cosine"] == 0 and told["mokd_norm_ratio_log10"] == pytest.approx(math.log10(0.5))


@pytest.mark.parametrize("rule", ["min-norm", "bisector"])
def test_weights_are_finite_near_zero_loss(rule: str) -> None:
    verdict = solve_loss_weights(MoKDConfig(rule), GramMatrix(1.0, 1e-9, 1e-16), 1.0, 0.0)  # type: ignore[arg-type]
    assert math.isfinite(verdict.det_loss_scale) and math.isfinite(verdict.distill_loss_scale)


@pytest.mark.parametrize(
    "wrong",
    [
        {"eps": 0.0},
        {"solver": "amortized", "lr": -1.0},
        {"solver": "amortized", "weight_decay": -0.1},
        {"solver": "amortized", "gradient_level": "feature"},
        {"lr": 0.1},
        {"solver": "min-norm", "weight_decay": 0.1},
    ],
)
def test_invalid_config_raises_usage_error(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="mokd"):
        MoKDConfig(**wrong)  # type: ignore[arg-type]
