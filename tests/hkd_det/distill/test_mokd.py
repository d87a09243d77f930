"""MoKD's arbiters on a net small enough to write down, against plain autograd."""

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
from hkd_det.ops.hooks import FeatureHooks

EPS = MoKDConfig().eps
INPUTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
TAPS = [FeatureInfo("fine", 8, 4), FeatureInfo("coarse", 16, 2)]
TASK_ONLY, TEACHER_ONLY = {"head.weight", "head.bias"}, {"adapter.weight", "adapter.bias"}
IDLE = {"idle.weight", "idle.bias"}


class Net(nn.Module):
    """A trunk, a finer map that also feeds a coarser one, a part for each loss alone, and one for none."""

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


def in_place(_tensors: object) -> None:
    """The mean over one process."""


def balancer(net: Net, settings: MoKDConfig) -> GradientBalancer:
    if settings.solver == "amortized":
        return AmortizedBalancer(settings, list(net.parameters()), in_place)
    taps = FeatureHooks(net, [layer.name for layer in TAPS]) if settings.gradient_level == "feature" else None
    return GradientSpaceBalancer(settings, list(net.parameters()), taps, in_place)


def by_hand(net: Net) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain autograd's gradients of each loss, by the parameters' names."""
    found = []
    for index in (0, 1):
        twin = Net()
        twin.load_state_dict(net.state_dict())
        twin.losses()[index].backward()
        found.append({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    return found[0], found[1]


def assert_gradients(net: Net, task: float, taught: float, teacher_only: float = 1.0) -> None:
    """Shared parameters have the weighted sum, the others their own loss's gradient."""
    own, other = by_hand(net)
    for name, parameter in net.named_parameters():
        if name in IDLE:
            assert parameter.grad is None
        elif name in TASK_ONLY:
            torch.testing.assert_close(parameter.grad, own[name])
        elif name in TEACHER_ONLY:
            torch.testing.assert_close(parameter.grad, teacher_only * other[name])
        else:
            torch.testing.assert_close(parameter.grad, task * own[name] + taught * other[name])


def gram_of(own: Tensor, other: Tensor) -> GramMatrix:
    return GramMatrix((own @ own).item(), (own @ other).item(), (other @ other).item())


@pytest.mark.parametrize("rule", ["min-norm", "bisector"])
def test_parameter_level_gradients_match_autograd(net: Net, rule: str) -> None:
    settings = MoKDConfig(rule)  # type: ignore[arg-type]
    told = balancer(net, settings).backward(*net.losses(), 1.0)
    shared = sorted({name for name, _ in net.named_parameters()} - TASK_ONLY - TEACHER_ONLY - IDLE)
    own, other = (torch.cat([one[name].flatten() for name in shared]) for one in by_hand(net))
    task, taught = (loss.item() for loss in net.losses())
    weights = solve_loss_weights(settings.solver, settings.eps, gram_of(own, other), task, taught)
    assert_gradients(net, weights.det_loss_scale, weights.distill_loss_scale)
    assert told["mokd_cosine"] == pytest.approx(torch.cosine_similarity(own, other, dim=0).item(), rel=1e-4)
    ratio = (own.norm() / (task + EPS)) / (other.norm() / (taught + EPS))
    assert told["mokd_norm_ratio_log10"] == pytest.approx(math.log10(ratio), rel=1e-4)
    assert told["mokd_det_weight"] == pytest.approx(weights.det_weight)


@pytest.mark.parametrize("rule", ["min-norm", "bisector"])
def test_feature_level_gradients_match_autograd(net: Net, rule: str) -> None:
    """By hand: the coarse map also speaks through the fine one's gradient, as it is computed from it."""
    settings = MoKDConfig(rule, gradient_level="feature")  # type: ignore[arg-type]
    balancer(net, settings).backward(*net.losses(), 1.0)
    found = []
    for index in (0, 1):
        fine = net.fine(net.trunk(INPUTS).tanh()).detach().requires_grad_()
        coarse = net.coarse(fine.tanh())
        coarse.retain_grad()
        loss = (
            (net.head(coarse) - 1).square().mean()
            if index == 0
            else net.adapter(fine).exp().mean() + coarse.square().mean()
        )
        gradients = torch.autograd.grad(loss, [fine, coarse])
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    weights = solve_loss_weights(
        settings.solver, settings.eps, gram_of(*found), *(loss.item() for loss in net.losses())
    )
    assert_gradients(net, weights.det_loss_scale, weights.distill_loss_scale)


def test_amortized_weights_match_formula(net: Net) -> None:
    """Over some steps of descent on the net, the logits against autograd's gradient of the half square."""
    settings = MoKDConfig("amortized", lr=0.5, weight_decay=0.1)
    amortised = balancer(net, settings)
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(5):
        losses = torch.stack(net.losses()).detach().double()
        net.zero_grad()
        told = amortised.backward(*net.losses(), 1.0)
        shares = logits.softmax(0)
        assert told["mokd_det_weight"] == pytest.approx(shares[0].item())
        weight = (shares[1] / shares[0] * (losses[0] + EPS) / (losses[1] + EPS)).item()
        assert told["mokd_weight"] == pytest.approx(weight, rel=1e-5)
        assert_gradients(net, 1.0, weight, teacher_only=weight)
        half_square = (shares @ (losses + EPS).log()).square() / 2
        (slope,) = torch.autograd.grad(half_square, logits)
        logits = (logits - 0.5 * (slope + 0.1 * logits)).detach().requires_grad_()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
    assert amortised.state_dict() == pytest.approx(
        {"det_loss": logits[0].item(), "distill_loss": logits[1].item()}, rel=1e-5
    )
    assert logits.abs().min() > 0.01
    twin = balancer(net, settings)
    twin.load_state_dict(amortised.state_dict())
    assert twin.backward(*net.losses(), 1.0) == amortised.backward(*net.losses(), 1.0)


@pytest.mark.parametrize(
    "settings",
    [MoKDConfig("min-norm"), MoKDConfig("bisector", gradient_level="feature"), MoKDConfig("amortized")],
    ids=lambda s: s.solver,
)
def test_balancer_without_teacher_equals_plain_backward(net: Net, settings: MoKDConfig) -> None:
    made = balancer(net, settings)
    task, _ = net.losses()
    assert made.backward(task, None, 0.0) == {}
    plain = Net()
    plain.load_state_dict(net.state_dict())
    SumBalancer().backward(plain.losses()[0], None, 0.0)
    for mine, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("at", ["parameters", "feature"])
def test_min_norm_step_decreases_both_losses(net: Net, at: str) -> None:
    """To first order: a small step along the arbitrated gradient lowers the logs of both."""
    made = balancer(net, MoKDConfig("min-norm", gradient_level=at))  # type: ignore[arg-type]
    before = torch.stack(net.losses()).log()
    made.backward(*net.losses(), 1.0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name not in TASK_ONLY | TEACHER_ONLY | IDLE:
                parameter.sub_(1e-3 * parameter.grad)
    after = torch.stack(net.losses()).log()
    assert (after < before).all()


@pytest.mark.parametrize("settings", [MoKDConfig(), MoKDConfig(gradient_level="feature"), MoKDConfig("amortized")])
def test_distill_weight_blends_gradients(net: Net, settings: MoKDConfig) -> None:
    """A quarter of the full step and three quarters of the task's own gradient, though log losses hear no scale."""
    full, quarter = Net(), Net()
    full.load_state_dict(net.state_dict())
    quarter.load_state_dict(net.state_dict())
    told = balancer(full, settings).backward(*full.losses(), 1.0)
    made = balancer(quarter, settings)
    task, taught = quarter.losses()
    assert made.backward(task, 0.25 * taught, 0.25) == pytest.approx(told, rel=1e-4)
    own, _ = by_hand(net)
    for (name, faded), whole in zip(quarter.named_parameters(), full.parameters(), strict=True):
        if name not in IDLE:
            wanted = 0.25 * whole.grad + 0.75 * own.get(name, torch.zeros_like(whole))
            torch.testing.assert_close(faded.grad, wanted)


def test_reachable_parameters_match_autograd(net: Net) -> None:
    for loss in net.losses():
        given = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
        assert find_reachable_parameters(loss, list(net.parameters())).tolist() == [
            float(one is not None) for one in given
        ]


def test_shared_gradient_tensor_is_clipped_once() -> None:
    """Autograd may hand one tensor out twice, and clipping writes in place."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    made = AmortizedBalancer(MoKDConfig("amortized"), [a, b], in_place)
    made.backward((a + b).square().sum(), None, 0.0)
    torch.nn.utils.clip_grad_norm_([a, b], 1.0)
    assert torch.stack([a.grad, b.grad]).norm().item() == pytest.approx(1.0, rel=1e-4)
