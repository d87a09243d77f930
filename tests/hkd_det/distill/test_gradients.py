"""Loss weights compared with a quadratic program, and their properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
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


def compute_gram(pair: np.ndarray) -> GramMatrix:
    return GramMatrix(float(pair[0] @ pair[0]), float(pair[0] @ pair[1]), float(pair[1] @ pair[1]))


def compute_step(config: MoKDConfig, pair: np.ndarray, losses: tuple[float, float]) -> np.ndarray:
    weights = solve_loss_weights(config, compute_gram(pair), *losses)
    return weights.det_loss_scale * pair[0] + weights.distill_loss_scale * pair[1]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(PAIRS, st.sampled_from(["free", "opposed", "parallel", "equal", "zero"]), st.floats(0.1, 5))
def test_min_norm_weight_matches_quadratic_program(pair: np.ndarray, kind: str, factor: float) -> None:
    """The reference is a solver on the simplex. If the optimum is not unique, only the lengths are compared."""
    second = {"opposed": -factor * pair[0], "parallel": factor * pair[0], "equal": pair[0], "zero": 0 * pair[0]}
    pair = np.stack([pair[0], second.get(kind, pair[1])])
    gram = pair @ pair.T
    solution = minimize(
        lambda pi: pi @ gram @ pi / 2, [0.3, 0.7], jac=lambda pi: gram @ pi, bounds=[(0, 1)] * 2, method="SLSQP",
        constraints={"type": "eq", "fun": lambda pi: pi.sum() - 1, "jac": lambda _: np.ones(2)},
        options={"ftol": 1e-14, "maxiter": 200},
    )  # fmt: skip
    weight = compute_min_norm_weight(compute_gram(pair))
    assert 0 <= weight <= 1
    pi = np.array([weight, 1 - weight])
    assert pi @ gram @ pi <= solution.x @ gram @ solution.x + 1e-7 * (1 + np.trace(gram))
    if np.sum((pair[0] - pair[1]) ** 2) > 0.1:
        assert weight == pytest.approx(solution.x[0], abs=1e-3)


@settings(max_examples=200, deadline=None)
@given(PAIRS, LOSSES, LOSSES)
def test_min_norm_step_decreases_both_losses_equally(pair: np.ndarray, det_loss: float, distill_loss: float) -> None:
    logs = pair / np.array([[det_loss], [distill_loss]])
    step = compute_step(LOGS, pair, (det_loss, distill_loss))
    if (pair**2).sum(1).min() == 0:
        np.testing.assert_array_equal(step, pair.sum(0))
        return
    gains, rounding = logs @ step, 1e-7 * np.linalg.norm(logs) * np.linalg.norm(pair)
    assert gains.min() >= -rounding
    if 0 < compute_min_norm_weight(compute_gram(logs)) < 1:
        assert gains[0] == pytest.approx(gains[1], rel=1e-5, abs=rounding)


@settings(max_examples=150, deadline=None)
@given(PAIRS, LOSSES, LOSSES, st.floats(0.01, 100), st.sampled_from(["min-norm", "bisector"]))
def test_step_does_not_depend_on_loss_scale(
    pair: np.ndarray, det_loss: float, distill_loss: float, factor: float, solver: str
) -> None:
    """The step is proportional to the scale of the detection loss and does not depend on that of the other loss."""
    config = MoKDConfig(solver, eps=1e-9)  # type: ignore[arg-type]
    if (pair**2).sum(1).min() < 1e-3:
        return
    step = compute_step(config, pair, (det_loss, distill_loss))
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * np.linalg.norm(pair)}
    scaled = pair * np.array([[1.0], [factor]])
    np.testing.assert_allclose(compute_step(config, scaled, (det_loss, factor * distill_loss)), step, **tolerance)
    scaled = pair * np.array([[factor], [1.0]])
    np.testing.assert_allclose(
        compute_step(config, scaled, (factor * det_loss, distill_loss)) / factor, step, **tolerance
    )


@settings(max_examples=150, deadline=None)
@given(PAIRS, LOSSES, LOSSES, st.sampled_from(["min-norm", "bisector"]))
def test_step_is_at_most_as_long_as_detection_gradient(
    pair: np.ndarray, det_loss: float, distill_loss: float, solver: str
) -> None:
    if (pair**2).sum(1).min() < 1e-3:
        return
    step, det_norm = (
        np.linalg.norm(g)
        for g in (compute_step(MoKDConfig(solver), pair, (det_loss, distill_loss)), pair[0])  # type: ignore[arg-type]
    )
    assert step <= det_norm * (1 + 1e-9)
    if pair[0] @ pair[1] >= 0:
        assert step == pytest.approx(det_norm)


def test_opposed_gradients_are_not_amplified() -> None:
    for solver in ("min-norm", "bisector"):
        opposed = np.array([[3.0, 0.0], [-1.0, 0.0]])
        np.testing.assert_allclose(compute_step(MoKDConfig(solver), opposed, (3.0, 1.0)), 0, atol=1e-12)
        angle = math.radians(170)
        nearly_opposed = np.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        step = compute_step(MoKDConfig(solver), nearly_opposed, (1.0, 1.0))
        assert np.linalg.norm(step) == pytest.approx(2 * math.cos(angle / 2))


def test_bisector_has_equal_angles() -> None:
    pair = np.array([[4.0, 0.0], [0.0, 0.1]])
    step = compute_step(MoKDConfig("bisector"), pair, (1.0, 7.0))
    np.testing.assert_allclose(step, np.array([1.0, 1.0]) * 4 / math.sqrt(2))


def test_min_norm_matches_hand_calculation() -> None:
    """Losses 2 and 1, gradients (2, 0) and (0, 2): log gradients (1, 0) and (0, 2), weights 0.8 and 0.2."""
    weights = solve_loss_weights(LOGS, GramMatrix(4.0, 0.0, 4.0), 2.0, 1.0)
    assert weights.det_weight == pytest.approx(0.8)
    scale = 2 / math.sqrt(0.8)
    assert (weights.det_loss_scale, weights.distill_loss_scale) == (
        pytest.approx(scale * 0.4),
        pytest.approx(scale * 0.2),
    )
    metrics = weights.metrics
    assert metrics["mokd_cosine"] == 0 and metrics["mokd_norm_ratio_log10"] == pytest.approx(math.log10(0.5))


@pytest.mark.parametrize("solver", ["min-norm", "bisector"])
def test_weights_are_finite_near_zero_loss(solver: str) -> None:
    weights = solve_loss_weights(MoKDConfig(solver), GramMatrix(1.0, 1e-9, 1e-16), 1.0, 0.0)  # type: ignore[arg-type]
    assert math.isfinite(weights.det_loss_scale) and math.isfinite(weights.distill_loss_scale)


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
