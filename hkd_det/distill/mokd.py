"""MoKD (Hayder et al. 2025): task and distillation as two objectives; what weights their gradients are given.

The gradients that are compared are those of log losses, grad L / (L + eps), whose lengths don't depend on what the
losses are measured in. `../shared/methods.md`, section 3, says what is known of the source.

The length of the step. Whatever the rule, the weighted sum is brought to the length of the task's own gradient: the
log's scale means nothing to a clipped norm, and Adam's second moments would not fit the finale, where the task's
gradient comes as it is. Only where the two nearly cancel the step becomes shorter, down to nothing: there is little
that both gain from, and stretching it would be stretching noise.

MoKD's arbiters: one step from the gradients of two losses, by weights found anew each time.

Only what both losses reach is arbitrated. A parameter that one of them reaches (a proposal network's head, an adapter)
takes that loss's gradient as it is: there is no conflict, so nothing that could justify a smaller step, and a share
near 0 would starve it.

Under several processes gradients are averaged here, not by DistributedDataParallel, whose hooks hear nothing of
`autograd.grad`; then all processes decide the same from the gradients of the whole batch. Buffers stay each process's
own: training reads none of them, and what is validated and saved is the first process's, as under
DistributedDataParallel.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from hkd_det.distill.gradients import GradientBalancer, SumBalancer, reachable_parameters
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.ops.hooks import FeatureHooks


@dataclass(frozen=True)
class MoKDConfig:
    """How the two gradients become one step.

    rule: "bisector" of their directions; "min-norm", the shortest convex combination, which serves both equally, and
    so mostly the one with the shorter gradient; "amortized", weights learnt from the losses alone. at: what gradients
    are compared on, all shared "parameters" or the "feature" maps at the taps (the amortized rule compares none). eps:
    keeps the log's gradient finite near a loss of 0. rate, decay: of the amortized rule's logits.
    """

    solver: Literal["bisector", "min-norm", "amortized"] = "bisector"
    gradient_level: Literal["parameters", "feature"] = "parameters"
    eps: float = 1e-3
    lr: float = 0.025
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.eps <= 0 or self.lr < 0 or self.weight_decay < 0:
            raise UsageError("mokd: eps is positive, lr and weight_decay are not negative")
        if self.solver == "amortized" and self.gradient_level == "feature":
            raise UsageError("mokd: the amortized rule compares no gradients: leave distill.mokd.gradient_level out")
        if self.solver != "amortized" and (self.lr, self.weight_decay) != (MoKDConfig.lr, MoKDConfig.weight_decay):
            raise UsageError(f"mokd: lr and weight_decay are the amortized rule's; {self.solver} learns no shares")


@dataclass(frozen=True)
class GramMatrix:
    """Inner products of two gradients g: <g_task, g_task>, <g_task, g_taught>, <g_taught, g_taught>."""

    det_det: float
    det_distill: float
    distill_distill: float

    @property
    def cosine(self) -> float:
        """Of the angle between them, -1 where they are opposed; 0 if one is nothing."""
        return (
            self.det_distill / math.sqrt(self.det_det * self.distill_distill)
            if self.det_det > 0 < self.distill_distill
            else 0.0
        )

    def scale(self, det_factor: float, distill_factor: float) -> "GramMatrix":
        """Of the gradients times these factors."""
        return GramMatrix(
            self.det_det * det_factor**2,
            self.det_distill * det_factor * distill_factor,
            self.distill_distill * distill_factor**2,
        )

    def norm(self, det_weight: float) -> float:
        """Of share x g_task + (1 - share) x g_taught."""
        rest = 1 - det_weight
        squared = (
            det_weight**2 * self.det_det + 2 * det_weight * rest * self.det_distill + rest**2 * self.distill_distill
        )
        return math.sqrt(max(0.0, squared))


def min_norm_weight(gram: GramMatrix) -> float:
    """The task's weight, 0..1, in the shortest convex combination of both gradients.

    pi = (g22 - g12) / (g11 + g22 - 2 g12), clipped to [0, 1]: inside, the combination has equal inner products with
    both (MGDA: Desideri 2012). 0.5 for two equal gradients, where every weight gives the same.
    """
    apart = gram.det_det + gram.distill_distill - 2 * gram.det_distill
    if apart <= 0:
        return 0.5
    return min(1.0, max(0.0, (gram.distill_distill - gram.det_distill) / apart))


def bisector_weight(gram: GramMatrix) -> float:
    """The task's weight at which the convex combination halves the angle between both gradients.

    Each has the other's length as its weight: |g2| / (|g1| + |g2|).
    """
    task, taught = math.sqrt(gram.det_det), math.sqrt(gram.distill_distill)
    return taught / (task + taught)


@dataclass(frozen=True)
class LossWeights:
    """What the two losses are weighted with, for what both reach.

    share: the task's weight, 0..1, among the gradients of log losses. gram: theirs. task, taught: the same as weights
    of the losses themselves, the length of the step included.
    """

    det_weight: float
    gram: GramMatrix
    det_loss_scale: float
    distill_loss_scale: float

    def blend(self, distill_weight: float) -> "LossWeights":
        """For a teacher's loss that is scaled by `strength`, 0..1: the rest of the step is the task's gradient alone.

        The scale itself would change nothing: log losses don't hear it.
        """
        return replace(self, det_loss_scale=1 - distill_weight + distill_weight * self.det_loss_scale)

    @property
    def metrics(self) -> dict[str, float]:
        """To log: the angle's cosine (conflict), log10 of the lengths' ratio, task to taught (dominance), the share."""
        ratio = (
            0.5 * math.log10(self.gram.det_det / self.gram.distill_distill)
            if self.gram.det_det > 0 < self.gram.distill_distill
            else 0.0
        )
        return {"mokd_cosine": self.gram.cosine, "mokd_norm_ratio_log10": ratio, "mokd_det_weight": self.det_weight}


def solve_loss_weights(config: MoKDConfig, gram: GramMatrix, det_loss: float, distill_loss: float) -> LossWeights:
    """The weights of two losses, whose values are `task` and `taught`, from the Gram matrix of their gradients.

    A gradient of nothing is in nobody's way: the losses are summed as they are.
    """
    by_task, by_taught = 1 / (det_loss + config.eps), 1 / (distill_loss + config.eps)
    logs = gram.scale(by_task, by_taught)
    if not (logs.det_det > 0 < logs.distill_distill):
        return LossWeights(0.5, logs, 1.0, 1.0)
    share = (min_norm_weight if config.solver == "min-norm" else bisector_weight)(logs)
    own, other = math.sqrt(logs.det_det), math.sqrt(logs.distill_distill)
    # The bisector is this long at 120 degrees; both rules' combinations are longer wherever the two don't disagree.
    least = own * other / (own + other)
    stretch = math.sqrt(gram.det_det) / max(logs.norm(share), least)
    return LossWeights(share, logs, stretch * share * by_task, stretch * (1 - share) * by_taught)


AllReduceMean = Callable[[Sequence[Tensor]], None]


"""Replaces tensors, in place, by their means over all processes; every process calls it with the same shapes."""


def build_balancer(
    config: MoKDConfig | None, distiller: nn.Module, student: BaseDetector, all_reduce_mean: AllReduceMean
) -> GradientBalancer:
    """The arbiter of a run; without settings, the plain sum.

    learner: whose parameters learn, the student's among them. Make it after the student's moving average, into which
    its taps would be copied.
    """
    if config is None:
        return SumBalancer()
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    if config.solver == "amortized":
        return AmortizedBalancer(config, parameters, all_reduce_mean)
    taps = FeatureHooks(student, [layer.name for layer in student.feature_info()]) if config.gradient_level == "feature" else None
    return GradientSpaceBalancer(config, parameters, taps, all_reduce_mean)


class GradientSpaceBalancer:
    """Weights from the gradients themselves: of all shared parameters, or of the maps at the student's taps.

    Over the parameters that takes a backward pass a loss. At the taps it takes, for each loss, the pass from the loss
    down to the taps, and then one whole pass of the weighted sum.
    """

    def __init__(
        self,
        config: MoKDConfig,
        parameters: Sequence[Tensor],
        hooks: FeatureHooks | None,
        all_reduce_mean: AllReduceMean,
    ) -> None:
        self.config, self.parameters, self.hooks, self.all_reduce_mean = config, parameters, hooks, all_reduce_mean

    def backward(self, det_loss: Tensor, distill_loss: Tensor | None, distill_weight: float) -> dict[str, float]:
        """Fill `.grad`; the figures are `Verdict.figures`."""
        maps = self.hooks.pop() if self.hooks else []
        if distill_loss is None:
            _backward(det_loss, self.parameters, self.all_reduce_mean)
            return {}
        shared, mine, others = self._split_parameters(det_loss, distill_loss)
        compared = maps if self.hooks else shared
        of_task = _compute_gradients(det_loss, [*compared, *mine], retain_graph=True)
        of_taught = _compute_gradients(distill_loss, [*compared, *others], retain_graph=bool(self.hooks))
        own, mine_only = of_task[: len(compared)], of_task[len(compared) :]
        other, others_only = of_taught[: len(compared)], of_taught[len(compared) :]
        values = torch.stack([det_loss.detach(), distill_loss.detach()])
        if self.hooks:
            products = _compute_inner_products(own, other)
            self.all_reduce_mean(
                [values, products]
            )  # their sum over the processes, but for a factor that changes no weight
            verdict = self._solve_weights(products, values, distill_weight)
            mixed = _compute_gradients(
                verdict.det_loss_scale * det_loss + verdict.distill_loss_scale * distill_loss, shared
            )
            self.all_reduce_mean([*mixed, *mine_only, *others_only])
        else:
            self.all_reduce_mean([values, *of_task, *of_taught])
            verdict = self._solve_weights(_compute_inner_products(own, other), values, distill_weight)
            mixed = [
                verdict.det_loss_scale * a + verdict.distill_loss_scale * b for a, b in zip(own, other, strict=True)
            ]
        _assign_gradients([*shared, *mine, *others], [*mixed, *mine_only, *others_only])
        return verdict.metrics

    def state_dict(self) -> dict[str, float]:
        """Nothing: every step is decided anew."""
        return {}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Nothing to do."""

    def _solve_weights(self, inner_products: Tensor, loss_values: Tensor, distill_weight: float) -> LossWeights:
        """The verdict on the losses as they are without the strength, then faded by it."""
        task, taught = loss_values.tolist()
        gram = GramMatrix(*inner_products.tolist()).scale(1, 1 / distill_weight)
        return solve_loss_weights(self.config, gram, task, taught / distill_weight).blend(distill_weight)

    def _split_parameters(
        self, det_loss: Tensor, distill_loss: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The parameters that both losses reach in some process, those that only the task does, only the teacher."""
        reach = torch.stack([reachable_parameters(loss, self.parameters) for loss in (det_loss, distill_loss)]).to(
            det_loss.device
        )
        self.all_reduce_mean([reach])
        kinds = [(mine > 0, others > 0) for mine, others in reach.T.tolist()]
        shared, mine, others = (
            [parameter for parameter, kind in zip(self.parameters, kinds, strict=True) if kind == wanted]
            for wanted in ((True, True), (True, False), (False, True))
        )
        return shared, mine, others


class AmortizedBalancer:
    """Weights learnt from the losses alone, in one backward pass.

    pi = softmax(z) descends 1/2 (pi_task log L_task + pi_taught log L_taught)^2, and the step is the gradient of
    pi_task log L_task + pi_taught log L_taught, times L_task / pi_task: so the task's gradient keeps its own scale, and
    a parameter that only the task reaches learns as it would alone.
    """

    def __init__(self, config: MoKDConfig, parameters: Sequence[Tensor], all_reduce_mean: AllReduceMean) -> None:
        self.config, self.parameters, self.all_reduce_mean = config, parameters, all_reduce_mean
        self.logits = (0.0, 0.0)

    def backward(self, det_loss: Tensor, distill_loss: Tensor | None, distill_weight: float) -> dict[str, float]:
        """Fill `.grad`; logs the task's share, and the weight of the teacher's loss that it comes to."""
        if distill_loss is None:
            _backward(det_loss, self.parameters, self.all_reduce_mean)
            return {}
        values = torch.stack([det_loss.detach(), distill_loss.detach()])
        self.all_reduce_mean([values])
        mine, others = values[0].item() + self.config.eps, values[1].item() / distill_weight + self.config.eps
        share = 1 / (1 + math.exp(self.logits[1] - self.logits[0]))
        weight = (1 - share) / share * mine / others
        _backward(det_loss + weight * distill_loss, self.parameters, self.all_reduce_mean)
        self._update_logits(share, math.log(mine), math.log(others))
        return {"mokd_det_weight": share, "mokd_weight": weight}

    def state_dict(self) -> dict[str, float]:
        """The logits of the shares."""
        return {"det_loss": self.logits[0], "distill_loss": self.logits[1]}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on with these logits."""
        self.logits = (state_dict["det_loss"], state_dict["distill_loss"])

    def _update_logits(self, det_weight: float, log_det_loss: float, log_distill_loss: float) -> None:
        """One step of gradient descent: d/dz_i of the half square s^2 / 2 is s pi_i (log L_i - s)."""
        mean = det_weight * log_det_loss + (1 - det_weight) * log_distill_loss
        rate, decay = self.config.lr, self.config.weight_decay
        slopes = (mean * det_weight * (log_det_loss - mean), mean * (1 - det_weight) * (log_distill_loss - mean))
        mine, others = (z - rate * (slope + decay * z) for z, slope in zip(self.logits, slopes, strict=True))
        self.logits = (mine, others)


def _backward(loss: Tensor, parameters: Sequence[Tensor], all_reduce_mean: AllReduceMean) -> None:
    reach = reachable_parameters(loss, parameters).to(loss.device)
    all_reduce_mean([reach])
    inputs = [parameter for parameter, found in zip(parameters, reach.tolist(), strict=True) if found > 0]
    gradients = _compute_gradients(loss, inputs)
    all_reduce_mean(gradients)
    _assign_gradients(inputs, gradients)


def _compute_gradients(loss: Tensor, inputs: Sequence[Tensor], retain_graph: bool = False) -> list[Tensor]:
    """Of the loss with respect to each input, zeros where there is none; `keep` the graph for another pass."""
    return list(torch.autograd.grad(loss, inputs, retain_graph=retain_graph, materialize_grads=True))


def _compute_inner_products(det_gradients: Sequence[Tensor], distill_gradients: Sequence[Tensor]) -> Tensor:
    """[3] float64: inner products of both sets of gradients, as in `Gram`."""
    a, b = (torch.cat([gradient.float().flatten() for gradient in one]) for one in (det_gradients, distill_gradients))
    return torch.stack([a @ a, a @ b, b @ b]).double()


def _assign_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()  # autograd may give one tensor for two parameters; clipping works in place
