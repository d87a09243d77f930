"""MoKD (Hayder et al. 2025, arXiv 2505.08170): detection and distillation as two objectives of each step.

The step is pi g_det + (1 - pi) g_distill, with the gradients g_i = grad L_i / (L_i + eps) of the log losses. The solver
"min-norm" is the published form: pi = (g22 - g12) / (g11 + g22 - 2 g12), clipped to [0, 1], with the inner products
g_ij (MGDA). `solve_loss_weights` describes the length of the step.

Only parameters that both losses reach are balanced. A parameter that one loss reaches, such as an adapter, takes the
gradient of that loss: there is no conflict, and a weight near 0 would stop its training.

With several processes the balancers average the gradients themselves, because the hooks of DistributedDataParallel are
not called by `autograd.grad`. All processes compute the same weights from the gradients of the whole batch. Buffers are
not synchronized: training does not read them, and those of the first process are evaluated and saved, as with DDP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hkd_det.config import check_range
from hkd_det.distill import load_method
from hkd_det.distill.base import DistillMethod
from hkd_det.distill.batch import DistillationBatch
from hkd_det.distill.gradients import (
    AllReduceMean,
    GradientBalancer,
    GramMatrix,
    LossWeights,
    find_reachable_parameters,
    solve_loss_weights,
)
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.models.feature_layers import FeatureHooks


@dataclass(frozen=True)
class MoKDConfig:
    """Settings of MoKD.

    Attributes:
        solver: "bisector": bisect the angle between the gradients. "min-norm": shortest convex combination (MGDA),
            which decreases both log losses equally and mostly follows the shorter gradient. "amortized": weights
            learned from the losses alone, one backward pass.
        gradient_level: Compare the gradients of all shared "parameters", or of the "feature" pyramid outputs. Has no
            effect on "amortized".
        eps: Added to each loss before the logarithm.
        lr: Learning rate of the weights, solver "amortized" only.
        weight_decay: Weight decay of the weights, solver "amortized" only.
    """

    solver: Literal["bisector", "min-norm", "amortized"] = "bisector"
    gradient_level: Literal["parameters", "feature"] = "parameters"
    eps: float = 1e-3
    lr: float = 0.025
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_range("distill.mokd.eps", self.eps, 0, is_open=True)
        for name in ("lr", "weight_decay"):
            check_range(f"distill.mokd.{name}", getattr(self, name), 0)
        if self.solver == "amortized" and self.gradient_level == "feature":
            raise UsageError(
                "distill.mokd.gradient_level: no effect with solver=amortized, which compares no gradients. Omit it."
            )
        if self.solver != "amortized" and (self.lr, self.weight_decay) != (MoKDConfig.lr, MoKDConfig.weight_decay):
            raise UsageError(
                f"distill.mokd: lr and weight_decay have no effect with solver={self.solver}. "
                "Omit them, or set distill.mokd.solver=amortized."
            )


class MoKD(DistillMethod):
    """Balances the gradients of the detection loss and of the other methods in each step.

    Args:
        config: Settings.
        student: Detector to train.
        teacher: Has no effect.
    """

    Config = MoKDConfig
    has_losses = False

    def __init__(self, config: MoKDConfig, student: BaseDetector, teacher: Any) -> None:
        super().__init__(config, student, teacher)
        self._student = (student,)  # a tuple, so that the student is not a submodule

    @classmethod
    def resolve_config(cls, config: MoKDConfig, methods: Mapping[str, Any]) -> MoKDConfig:
        """Check that another method has losses and that no method sets the weight of the detection loss."""
        if not any(load_method(name).has_losses for name in methods):
            raise UsageError("--distill mokd: there is no distillation loss to balance. Add a method, such as hkd.")
        fixed = [name for name, other in methods.items() if getattr(other, "det_loss_weight", 1.0) < 1]
        if fixed:
            raise UsageError(
                f"distill.{fixed[0]}.det_loss_weight: mokd sets the weight of the detection loss. Leave it at 1."
            )
        return config

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:  # noqa: ARG002 - interface
        """Return no losses."""
        return {}

    def balancer(self, parameters: Sequence[Tensor], all_reduce_mean: AllReduceMean) -> GradientBalancer:
        """Return the balancer of the configured solver."""
        if self.config.solver == "amortized":
            return AmortizedBalancer(self.config, parameters, all_reduce_mean)
        (student,) = self._student
        names = [layer.name for layer in student.feature_info()]
        hooks = FeatureHooks(student, names) if self.config.gradient_level == "feature" else None
        return GradientSpaceBalancer(self.config, parameters, hooks, all_reduce_mean)


class GradientSpaceBalancer:
    """Computes loss weights from the gradients of all shared parameters, or of feature maps.

    Parameters require one backward pass per loss. Features require a backward pass per loss down to the features, and
    then one complete backward pass of the weighted sum.

    Args:
        config: Settings of MoKD.
        parameters: Trained parameters.
        hooks: Records the features to compare, or None to compare parameters.
        all_reduce_mean: Averages tensors over processes, in place.
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
        """Fill `.grad`; return `LossWeights.metrics`. See `GradientBalancer.backward`.

        Args:
            det_loss: Detection loss, scalar.
            distill_loss: Distillation loss, scalar, or None.
            distill_weight: Factor of the schedule, 0 to 1.
        """
        features = self.hooks.pop() if self.hooks else []
        if distill_loss is None:
            _backward(det_loss, self.parameters, self.all_reduce_mean)
            return {}
        shared, det_only, distill_only = self._split_parameters(det_loss, distill_loss)
        compared = features if self.hooks else shared
        det_grads = _compute_gradients(det_loss, [*compared, *det_only], retain_graph=True)
        distill_grads = _compute_gradients(distill_loss, [*compared, *distill_only], retain_graph=bool(self.hooks))
        count = len(compared)
        products = _compute_inner_products(det_grads[:count], distill_grads[:count]) if self.hooks else None
        losses = torch.stack([det_loss.detach(), distill_loss.detach()])
        single_grads = [*det_grads[count:], *distill_grads[count:]]
        if products is not None:
            # The mean of the local products differs from their sum by a factor that changes no weight.
            self.all_reduce_mean([losses, products])
            weights = self._solve_weights(products, losses, distill_weight)
            total = weights.det_loss_scale * det_loss + weights.distill_loss_scale * distill_loss
            shared_grads = _compute_gradients(total, shared)
            self.all_reduce_mean([*shared_grads, *single_grads])
        else:
            self.all_reduce_mean([losses, *det_grads, *distill_grads])
            products = _compute_inner_products(det_grads[:count], distill_grads[:count])
            weights = self._solve_weights(products, losses, distill_weight)
            shared_grads = [
                weights.det_loss_scale * det + weights.distill_loss_scale * distill
                for det, distill in zip(det_grads[:count], distill_grads[:count], strict=True)
            ]
        _assign_gradients([*shared, *det_only, *distill_only], [*shared_grads, *single_grads])
        return weights.metrics

    def state_dict(self) -> dict[str, float]:
        """Return an empty state: each step is independent."""
        return {}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Do nothing; there is no state.

        Args:
            state_dict: Has no effect.
        """

    def _solve_weights(self, inner_products: Tensor, losses: Tensor, distill_weight: float) -> LossWeights:
        """Solve for the losses without the schedule's factor, then blend with it."""
        det_loss, distill_loss = losses.tolist()
        gram = GramMatrix(*inner_products.tolist()).scale(1, 1 / distill_weight)
        solver: Literal["bisector", "min-norm"] = "min-norm" if self.config.solver == "min-norm" else "bisector"
        weights = solve_loss_weights(solver, self.config.eps, gram, det_loss, distill_loss / distill_weight)
        return weights.blend(distill_weight)

    def _split_parameters(
        self, det_loss: Tensor, distill_loss: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Split into parameters that both losses reach in any process, only detection, only distillation."""
        reached = torch.stack([find_reachable_parameters(loss, self.parameters) for loss in (det_loss, distill_loss)])
        reached = reached.to(det_loss.device)
        self.all_reduce_mean([reached])
        flags = [(det > 0, distill > 0) for det, distill in reached.T.tolist()]
        shared, det_only, distill_only = (
            [parameter for parameter, flag in zip(self.parameters, flags, strict=True) if flag == required]
            for required in ((True, True), (True, False), (False, True))
        )
        return shared, det_only, distill_only


class AmortizedBalancer:
    """Learns the loss weights from the values of the losses, with one backward pass per step (FAMO, Liu et al. 2023).

    The weights are pi = softmax(z). Adam moves z so that both log losses decrease equally: the weight of a loss grows
    if it decreased less than the other one. Only changes of log losses count, so pi does not depend on the units of the
    losses. FAMO compares the losses of a batch before and after a step, which needs another forward pass. Here the next
    batch replaces the same batch after the step.

    The step is the gradient of pi_det log L_det + pi_distill log L_distill, multiplied by L_det / pi_det. The factor of
    the detection gradient is therefore 1, and a parameter that only the detection loss reaches is trained as without a
    teacher.

    Args:
        config: Settings of MoKD.
        parameters: Trained parameters.
        all_reduce_mean: Averages tensors over processes, in place.
    """

    def __init__(self, config: MoKDConfig, parameters: Sequence[Tensor], all_reduce_mean: AllReduceMean) -> None:
        self.config, self.parameters, self.all_reduce_mean = config, parameters, all_reduce_mean
        self.logits = torch.zeros(2, dtype=torch.float64)
        self.optimizer = torch.optim.Adam([self.logits], config.lr, weight_decay=config.weight_decay)
        self._log_losses: Tensor | None = None  # of the previous step

    def backward(self, det_loss: Tensor, distill_loss: Tensor | None, distill_weight: float) -> dict[str, float]:
        """Fill `.grad`; return the detection weight and the factor of the distillation loss.

        Args:
            det_loss: Detection loss, scalar.
            distill_loss: Distillation loss, scalar, or None.
            distill_weight: Factor of the schedule, 0 to 1.
        """
        if distill_loss is None:
            _backward(det_loss, self.parameters, self.all_reduce_mean)
            return {}
        losses = torch.stack([det_loss.detach(), distill_loss.detach()])
        self.all_reduce_mean([losses])
        det, distill = (losses.double().cpu() / torch.tensor([1.0, distill_weight]) + self.config.eps).tolist()
        self._update_logits(torch.tensor([det, distill], dtype=torch.float64).log())
        det_weight = float(self.logits.softmax(0)[0])
        factor = (1 - det_weight) / det_weight * det / distill
        _backward(det_loss + factor * distill_loss, self.parameters, self.all_reduce_mean)
        return {"mokd_det_weight": det_weight, "mokd_weight": factor}

    def state_dict(self) -> dict[str, float]:
        """Return the logits z, the state of Adam, and the log losses of the last step."""
        values = {"logits": self.logits}
        if self._log_losses is not None:
            values["log_losses"] = self._log_losses
        values |= {name: state.expand(2) for name, state in self.optimizer.state[self.logits].items()}
        return {f"{name}.{index}": float(tensor[index]) for name, tensor in values.items() for index in (0, 1)}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the state.

        Args:
            state_dict: Return value of `state_dict`.
        """
        names = dict.fromkeys(key.rpartition(".")[0] for key in state_dict)
        values = {
            name: torch.tensor([state_dict[f"{name}.{index}"] for index in (0, 1)], dtype=torch.float64)
            for name in names
        }
        self.logits.copy_(values.pop("logits"))
        self._log_losses = values.pop("log_losses", None)
        if "step" in values:
            values["step"] = values["step"][0].float()
        self.optimizer.state[self.logits].update(values)

    def _update_logits(self, log_losses: Tensor) -> None:
        """Take a step of Adam with the gradient J^T delta, where J = dpi / dz and delta is how much log L decreased."""
        if self._log_losses is not None:
            weights, decrease = self.logits.softmax(0), self._log_losses - log_losses
            self.logits.grad = weights * (decrease - weights @ decrease)
            self.optimizer.step()
        self._log_losses = log_losses


def _backward(loss: Tensor, parameters: Sequence[Tensor], all_reduce_mean: AllReduceMean) -> None:
    reached = find_reachable_parameters(loss, parameters).to(loss.device)
    all_reduce_mean([reached])
    inputs = [parameter for parameter, flag in zip(parameters, reached.tolist(), strict=True) if flag > 0]
    gradients = _compute_gradients(loss, inputs)
    all_reduce_mean(gradients)
    _assign_gradients(inputs, gradients)


def _compute_gradients(loss: Tensor, inputs: Sequence[Tensor], retain_graph: bool = False) -> list[Tensor]:
    """Return the gradient for each input, zeros where the loss does not depend on it."""
    return list(torch.autograd.grad(loss, inputs, retain_graph=retain_graph, materialize_grads=True))


def _compute_inner_products(det_gradients: Sequence[Tensor], distill_gradients: Sequence[Tensor]) -> Tensor:
    """Return [3] float64: the inner products in the order of `GramMatrix`."""
    a, b = (
        torch.cat([gradient.float().flatten() for gradient in gradients])
        for gradients in (det_gradients, distill_gradients)
    )
    return torch.stack([a @ a, a @ b, b @ b]).double()


def _assign_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()  # autograd may return one tensor twice, and clipping works in place
