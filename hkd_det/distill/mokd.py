"""MoKD's arbiters: one step from the gradients of two losses, by weights found anew each time.

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

import torch
from torch import Tensor, nn

from hkd_det.distill.arbiter import GradientBalancer, SumBalancer
from hkd_det.distill.arbitration import GramMatrix, LossWeights, MoKDConfig, solve_loss_weights
from hkd_det.distill.reach import reachable_parameters
from hkd_det.distill.taps import FeatureHooks
from hkd_det.models.family import BaseDetector

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
    if config.solver == "amortised":
        return AmortizedBalancer(config, parameters, all_reduce_mean)
    taps = FeatureHooks(student, student.feature_info()) if config.gradient_level == "feature" else None
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
        return {"mokd_share": share, "mokd_weight": weight}

    def state_dict(self) -> dict[str, float]:
        """The logits of the shares."""
        return {"task": self.logits[0], "taught": self.logits[1]}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on with these logits."""
        self.logits = (state_dict["task"], state_dict["taught"])

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
