"""Gradient balancers of MoKD compared with plain autograd on a small network."""

import math

import pytest
import torch
from torch import Tensor, nn

from hkd_det.distill.gradients import (
    GradientBalancer,
    GramMatrix,
    SumBalancer,
    find_reachable_parameters,
    solve_loss_weights,
)
from hkd_det.distill.mokd import AmortizedBalancer, GradientSpaceBalancer, MoKDConfig
from hkd_det.models.base import FeatureInfo
from hkd_det.models.feature_layers import FeatureHooks

EPS = MoKDConfig().eps
INPUTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
LAYERS = [FeatureInfo("fine", 8, 4), FeatureInfo("coarse", 16, 2)]
DET_ONLY, DISTILL_ONLY = {"head.weight", "head.bias"}, {"adapter.weight", "adapter.bias"}
IDLE = {"idle.weight", "idle.bias"}


class Net(nn.Module):
    """Layers of both losses (trunk, fine, coarse), of one loss each (head, adapter), and an unused one (idle)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.fine, self.coarse = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.head, self.adapter, self.idle = nn.Linear(2, 1), nn.Linear(4, 5), nn.Linear(2, 2)

    def losses(self) -> tuple[Tensor, Tensor]:
        fine = self.fine(self.trunk(INPUTS).tanh())
        coarse = self.coarse(fine.tanh())
        return (self.head(coarse) - 1).square().mean(), self.adapter(fine).exp().mean() + coarse.square().mean()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def all_reduce_mean(_tensors: object) -> None:
    """Do nothing: the mean over one process."""


def make_balancer(net: Net, settings: MoKDConfig) -> GradientBalancer:
    if settings.solver == "amortized":
        return AmortizedBalancer(settings, list(net.parameters()), all_reduce_mean)
    hooks = FeatureHooks(net, [layer.name for layer in LAYERS]) if settings.gradient_level == "feature" else None
    return GradientSpaceBalancer(settings, list(net.parameters()), hooks, all_reduce_mean)


def compute_gradients(net: Net) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of each loss by parameter name, computed by autograd."""
    gradients = []
    for index in (0, 1):
        copy = Net()
        copy.load_state_dict(net.state_dict())
        copy.losses()[index].backward()
        gradients.append({name: p.grad for name, p in copy.named_parameters() if p.grad is not None})
    return gradients[0], gradients[1]


def assert_gradients(net: Net, det_scale: float, distill_scale: float, distill_only_scale: float = 1.0) -> None:
    """Shared parameters have the weighted sum of both gradients, the others the gradient of their loss."""
    det_grads, distill_grads = compute_gradients(net)
    for name, parameter in net.named_parameters():
        if name in IDLE:
            assert parameter.grad is None
        elif name in DET_ONLY:
            torch.testing.assert_close(parameter.grad, det_grads[name])
        elif name in DISTILL_ONLY:
            torch.testing.assert_close(parameter.grad, distill_only_scale * distill_grads[name])
        else:
            torch.testing.assert_close(
                parameter.grad, det_scale * det_grads[name] + distill_scale * distill_grads[name]
            )


def compute_gram(det_grads: Tensor, distill_grads: Tensor) -> GramMatrix:
    return GramMatrix(
        (det_grads @ det_grads).item(), (det_grads @ distill_grads).item(), (distill_grads @ distill_grads).item()
    )


@pytest.mark.parametrize("solver", ["min-norm", "bisector"])
def test_parameter_level_gradients_match_autograd(net: Net, solver: str) -> None:
    settings = MoKDConfig(solver)  # type: ignore[arg-type]
    metrics = make_balancer(net, settings).backward(*net.losses(), 1.0)
    shared = sorted({name for name, _ in net.named_parameters()} - DET_ONLY - DISTILL_ONLY - IDLE)
    det_grads, distill_grads = (
        torch.cat([grads[name].flatten() for name in shared]) for grads in compute_gradients(net)
    )
    det_loss, distill_loss = (loss.item() for loss in net.losses())
    weights = solve_loss_weights(
        settings.solver, settings.eps, compute_gram(det_grads, distill_grads), det_loss, distill_loss
    )
    assert_gradients(net, weights.det_loss_scale, weights.distill_loss_scale)
    assert metrics["mokd_cosine"] == pytest.approx(
        torch.cosine_similarity(det_grads, distill_grads, dim=0).item(), rel=1e-4
    )
    ratio = (det_grads.norm() / (det_loss + EPS)) / (distill_grads.norm() / (distill_loss + EPS))
    assert metrics["mokd_norm_ratio_log10"] == pytest.approx(math.log10(ratio), rel=1e-4)
    assert metrics["mokd_det_weight"] == pytest.approx(weights.det_weight)


@pytest.mark.parametrize("solver", ["min-norm", "bisector"])
def test_feature_level_gradients_match_autograd(net: Net, solver: str) -> None:
    """The gradient of the fine map includes the path through the coarse map, which is computed from it."""
    settings = MoKDConfig(solver, gradient_level="feature")  # type: ignore[arg-type]
    make_balancer(net, settings).backward(*net.losses(), 1.0)
    gradients = []
    for index in (0, 1):
        fine = net.fine(net.trunk(INPUTS).tanh()).detach().requires_grad_()
        coarse = net.coarse(fine.tanh())
        coarse.retain_grad()
        loss = (
            (net.head(coarse) - 1).square().mean()
            if index == 0
            else net.adapter(fine).exp().mean() + coarse.square().mean()
        )
        grads = torch.autograd.grad(loss, [fine, coarse])
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    weights = solve_loss_weights(
        settings.solver, settings.eps, compute_gram(*gradients), *(loss.item() for loss in net.losses())
    )
    assert_gradients(net, weights.det_loss_scale, weights.distill_loss_scale)


def test_amortized_weights_match_formula(net: Net) -> None:
    """The reference updates the logits by autograd through the softmax and Adam, as the code of FAMO does."""
    settings = MoKDConfig("amortized", lr=0.5, weight_decay=0.1)
    amortized = make_balancer(net, settings)
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5, weight_decay=0.1)
    before = None
    for _ in range(5):
        losses = torch.stack(net.losses()).detach().double()
        net.zero_grad()
        metrics = amortized.backward(*net.losses(), 1.0)
        if before is not None:
            (logits.grad,) = torch.autograd.grad(logits.softmax(0), logits, before - (losses + EPS).log())
            optimizer.step()
        before = (losses + EPS).log()
        pi = logits.detach().softmax(0)
        assert metrics["mokd_det_weight"] == pytest.approx(pi[0].item())
        weight = (pi[1] / pi[0] * (losses[0] + EPS) / (losses[1] + EPS)).item()
        assert metrics["mokd_weight"] == pytest.approx(weight, rel=1e-5)
        assert_gradients(net, 1.0, weight, distill_only_scale=weight)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
    assert logits.abs().min() > 0.01
    restored = make_balancer(net, settings)
    restored.load_state_dict(amortized.state_dict())
    for _ in range(2):
        assert restored.backward(*net.losses(), 1.0) == amortized.backward(*net.losses(), 1.0)
    assert restored.state_dict() == amortized.state_dict()


@pytest.mark.parametrize("scales", [(100.0, 1.0), (1.0, 0.01), (0.1, 10.0)])
def test_amortized_weights_do_not_depend_on_the_units_of_the_losses(scales: tuple[float, float]) -> None:
    parameter = torch.zeros(1, requires_grad=True)
    settings = MoKDConfig("amortized", eps=1e-12)
    weights = []
    for det_scale, distill_scale in ((1.0, 1.0), scales):
        balancer = AmortizedBalancer(settings, [parameter], all_reduce_mean)
        for step in range(50):
            det, distill = 2 / (1 + 0.1 * step) + parameter.sum(), 3 / (1 + 0.01 * step) + parameter.sum()
            metrics = balancer.backward(det_scale * det, distill_scale * distill, 1.0)
        weights.append(metrics["mokd_det_weight"])
    assert weights[1] == pytest.approx(weights[0], rel=1e-4)
    assert weights[0] < 0.45  # the distillation loss decreases less, so that its weight grows


@pytest.mark.parametrize(
    "settings",
    [MoKDConfig("min-norm"), MoKDConfig("bisector", gradient_level="feature"), MoKDConfig("amortized")],
    ids=lambda s: s.solver,
)
def test_balancer_without_teacher_equals_plain_backward(net: Net, settings: MoKDConfig) -> None:
    balancer = make_balancer(net, settings)
    det_loss, _ = net.losses()
    assert balancer.backward(det_loss, None, 0.0) == {}
    plain = Net()
    plain.load_state_dict(net.state_dict())
    SumBalancer().backward(plain.losses()[0], None, 0.0)
    for parameter, expected in zip(net.parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=0)


@pytest.mark.parametrize("gradient_level", ["parameters", "feature"])
def test_min_norm_step_decreases_both_losses(net: Net, gradient_level: str) -> None:
    """A small step along the combined gradient decreases the logarithm of both losses."""
    balancer = make_balancer(net, MoKDConfig("min-norm", gradient_level=gradient_level))  # type: ignore[arg-type]
    before = torch.stack(net.losses()).log()
    balancer.backward(*net.losses(), 1.0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name not in DET_ONLY | DISTILL_ONLY | IDLE:
                parameter.sub_(1e-3 * parameter.grad)
    after = torch.stack(net.losses()).log()
    assert (after < before).all()


@pytest.mark.parametrize("settings", [MoKDConfig(), MoKDConfig(gradient_level="feature"), MoKDConfig("amortized")])
def test_distill_weight_blends_gradients(net: Net, settings: MoKDConfig) -> None:
    """Weight 0.25 gives a quarter of the full step plus three quarters of the detection gradient."""
    full, quarter = Net(), Net()
    full.load_state_dict(net.state_dict())
    quarter.load_state_dict(net.state_dict())
    metrics = make_balancer(full, settings).backward(*full.losses(), 1.0)
    balancer = make_balancer(quarter, settings)
    det_loss, distill_loss = quarter.losses()
    assert balancer.backward(det_loss, 0.25 * distill_loss, 0.25) == pytest.approx(metrics, rel=1e-4)
    det_grads, _ = compute_gradients(net)
    for (name, blended), whole in zip(quarter.named_parameters(), full.parameters(), strict=True):
        if name not in IDLE:
            expected = 0.25 * whole.grad + 0.75 * det_grads.get(name, torch.zeros_like(whole))
            torch.testing.assert_close(blended.grad, expected)


def test_reachable_parameters_match_autograd(net: Net) -> None:
    for loss in net.losses():
        gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
        assert find_reachable_parameters(loss, list(net.parameters())).tolist() == [
            float(gradient is not None) for gradient in gradients
        ]


def test_shared_gradient_tensor_is_clipped_once() -> None:
    """Autograd may return one tensor for two parameters, and clipping works in place."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    balancer = AmortizedBalancer(MoKDConfig("amortized"), [a, b], all_reduce_mean)
    balancer.backward((a + b).square().sum(), None, 0.0)
    torch.nn.utils.clip_grad_norm_([a, b], 1.0)
    assert torch.stack([a.grad, b.grad]).norm().item() == pytest.approx(1.0, rel=1e-4)
