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

from hkd_det.distill.arbiter import Arbiter, Together
from hkd_det.distill.arbitration import Arbitration, Gram, Verdict, judge
from hkd_det.distill.reach import reached
from hkd_det.distill.taps import TapRecorder
from hkd_det.models.family import PersonDetector

Average = Callable[[Sequence[Tensor]], None]
"""Replaces tensors, in place, by their means over all processes; every process calls it with the same shapes."""


def arbiter_of(settings: Arbitration | None, learner: nn.Module, student: PersonDetector, average: Average) -> Arbiter:
    """The arbiter of a run; without settings, the plain sum.

    learner: whose parameters learn, the student's among them. Make it after the student's moving average, into which
    its taps would be copied.
    """
    if settings is None:
        return Together()
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    if settings.rule == "amortised":
        return AmortisedArbiter(settings, parameters, average)
    taps = TapRecorder(student, student.taps()) if settings.at == "feature" else None
    return GradientArbiter(settings, parameters, taps, average)


class GradientArbiter:
    """Weights from the gradients themselves: of all shared parameters, or of the maps at the student's taps.

    Over the parameters that takes a backward pass a loss. At the taps it takes, for each loss, the pass from the loss
    down to the taps, and then one whole pass of the weighted sum.
    """

    def __init__(
        self, settings: Arbitration, parameters: Sequence[Tensor], taps: TapRecorder | None, average: Average
    ) -> None:
        self.settings, self.parameters, self.taps, self.average = settings, parameters, taps, average

    def backward(self, task: Tensor, taught: Tensor | None, strength: float) -> dict[str, float]:
        """Fill `.grad`; the figures are `Verdict.figures`."""
        maps = self.taps.take() if self.taps else []
        if taught is None:
            _backward(task, self.parameters, self.average)
            return {}
        shared, mine, others = self._parted(task, taught)
        compared = maps if self.taps else shared
        of_task = _gradients(task, [*compared, *mine], keep=True)
        of_taught = _gradients(taught, [*compared, *others], keep=bool(self.taps))
        own, mine_only = of_task[: len(compared)], of_task[len(compared) :]
        other, others_only = of_taught[: len(compared)], of_taught[len(compared) :]
        values = torch.stack([task.detach(), taught.detach()])
        if self.taps:
            products = _products(own, other)
            self.average([values, products])  # their sum over the processes, but for a factor that changes no weight
            verdict = self._judge(products, values, strength)
            mixed = _gradients(verdict.task * task + verdict.taught * taught, shared)
            self.average([*mixed, *mine_only, *others_only])
        else:
            self.average([values, *of_task, *of_taught])
            verdict = self._judge(_products(own, other), values, strength)
            mixed = [verdict.task * a + verdict.taught * b for a, b in zip(own, other, strict=True)]
        _fill([*shared, *mine, *others], [*mixed, *mine_only, *others_only])
        return verdict.figures

    def state(self) -> dict[str, float]:
        """Nothing: every step is decided anew."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Nothing to do."""

    def _judge(self, products: Tensor, values: Tensor, strength: float) -> Verdict:
        """The verdict on the losses as they are without the strength, then faded by it."""
        task, taught = values.tolist()
        gram = Gram(*products.tolist()).scaled(1, 1 / strength)
        return judge(self.settings, gram, task, taught / strength).faded(strength)

    def _parted(self, task: Tensor, taught: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The parameters that both losses reach in some process, those that only the task does, only the teacher."""
        reach = torch.stack([reached(loss, self.parameters) for loss in (task, taught)]).to(task.device)
        self.average([reach])
        kinds = [(mine > 0, others > 0) for mine, others in reach.T.tolist()]
        shared, mine, others = (
            [parameter for parameter, kind in zip(self.parameters, kinds, strict=True) if kind == wanted]
            for wanted in ((True, True), (True, False), (False, True))
        )
        return shared, mine, others


class AmortisedArbiter:
    """Weights learnt from the losses alone, in one backward pass.

    pi = softmax(z) descends 1/2 (pi_task log L_task + pi_taught log L_taught)^2, and the step is the gradient of
    pi_task log L_task + pi_taught log L_taught, times L_task / pi_task: so the task's gradient keeps its own scale, and
    a parameter that only the task reaches learns as it would alone.
    """

    def __init__(self, settings: Arbitration, parameters: Sequence[Tensor], average: Average) -> None:
        self.settings, self.parameters, self.average = settings, parameters, average
        self.logits = (0.0, 0.0)

    def backward(self, task: Tensor, taught: Tensor | None, strength: float) -> dict[str, float]:
        """Fill `.grad`; logs the task's share, and the weight of the teacher's loss that it comes to."""
        if taught is None:
            _backward(task, self.parameters, self.average)
            return {}
        values = torch.stack([task.detach(), taught.detach()])
        self.average([values])
        mine, others = values[0].item() + self.settings.eps, values[1].item() / strength + self.settings.eps
        share = 1 / (1 + math.exp(self.logits[1] - self.logits[0]))
        weight = (1 - share) / share * mine / others
        _backward(task + weight * taught, self.parameters, self.average)
        self._learn(share, math.log(mine), math.log(others))
        return {"mokd_share": share, "mokd_weight": weight}

    def state(self) -> dict[str, float]:
        """The logits of the shares."""
        return {"task": self.logits[0], "taught": self.logits[1]}

    def restore(self, state: dict[str, float]) -> None:
        """Go on with these logits."""
        self.logits = (state["task"], state["taught"])

    def _learn(self, share: float, log_task: float, log_taught: float) -> None:
        """One step of gradient descent: d/dz_i of the half square s^2 / 2 is s pi_i (log L_i - s)."""
        mean = share * log_task + (1 - share) * log_taught
        rate, decay = self.settings.rate, self.settings.decay
        slopes = (mean * share * (log_task - mean), mean * (1 - share) * (log_taught - mean))
        mine, others = (z - rate * (slope + decay * z) for z, slope in zip(self.logits, slopes, strict=True))
        self.logits = (mine, others)


def _backward(loss: Tensor, parameters: Sequence[Tensor], average: Average) -> None:
    reach = reached(loss, parameters).to(loss.device)
    average([reach])
    inputs = [parameter for parameter, found in zip(parameters, reach.tolist(), strict=True) if found > 0]
    gradients = _gradients(loss, inputs)
    average(gradients)
    _fill(inputs, gradients)


def _gradients(loss: Tensor, inputs: Sequence[Tensor], keep: bool = False) -> list[Tensor]:
    """Of the loss with respect to each input, zeros where there is none; `keep` the graph for another pass."""
    return list(torch.autograd.grad(loss, inputs, retain_graph=keep, materialize_grads=True))


def _products(own: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """[3] float64: inner products of both sets of gradients, as in `Gram`."""
    a, b = (torch.cat([gradient.float().flatten() for gradient in one]) for one in (own, other))
    return torch.stack([a @ a, a @ b, b @ b]).double()


def _fill(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()  # autograd may give one tensor for two parameters; clipping works in place
