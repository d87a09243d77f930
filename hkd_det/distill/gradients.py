"""Gradient balancers, which combine the gradients of detection and distillation losses to one step.

MoKD (Hayder et al. 2025) computes the weights of two losses from the Gram matrix of their gradients. It compares the
gradients of log losses, grad L / (L + eps), whose lengths do not depend on the units of the losses.

The weighted sum is scaled to the length of the detection gradient. Gradient clipping and Adam's second moments then fit
the last epochs, which use the detection gradient only. The step is shorter only if the gradients nearly cancel, because
scaling such a sum would amplify noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

AllReduceMean = Callable[[Sequence[Tensor]], None]
"""Replaces tensors, in place, by their means over all processes. Every process calls it with the same shapes."""


class GradientBalancer(Protocol):
    """Fills `.grad` of all trained parameters from two losses."""

    def backward(self, det_loss: Tensor, distill_loss: Tensor | None, distill_weight: float) -> dict[str, float]:
        """Run the backward pass.

        Args:
            det_loss: Detection loss, scalar.
            distill_loss: Distillation loss, scalar, already multiplied by `distill_weight`. None without distillation.
            distill_weight: Factor of the schedule, 0 to 1.

        Returns:
            Values to log.
        """

    def state_dict(self) -> dict[str, float]:
        """Return the state that an exact resume needs."""

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the state that `state_dict` returned.

        Args:
            state_dict: Return value of `state_dict`.
        """


class SumBalancer:
    """Backward pass of the plain sum of both losses."""

    def backward(self, det_loss: Tensor, distill_loss: Tensor | None, distill_weight: float) -> dict[str, float]:  # noqa: ARG002 - the weight is in the loss already
        """Run one backward pass; see `GradientBalancer.backward`.

        Args:
            det_loss: Detection loss, scalar.
            distill_loss: Distillation loss, scalar, or None.
            distill_weight: Has no effect, because the loss contains it.

        Returns:
            An empty mapping.
        """
        (det_loss if distill_loss is None else det_loss + distill_loss).backward()  # type: ignore[no-untyped-call]  # torch
        return {}

    def state_dict(self) -> dict[str, float]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Do nothing; there is no state.

        Args:
            state_dict: Has no effect.
        """


def find_reachable_parameters(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Find the parameters that a loss depends on, without a backward pass.

    Args:
        loss: Scalar with an autograd graph.
        parameters: P leaf tensors.

    Returns:
        Tensor[P]: 1 where a backward pass reaches the parameter, else 0.
    """
    index_by_id = {id(parameter): index for index, parameter in enumerate(parameters)}
    reached = torch.zeros(len(parameters))
    visited, queue = {loss.grad_fn}, [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None:
            continue
        index = index_by_id.get(id(getattr(node, "variable", None)))  # only leaves of the graph have a variable
        if index is not None:
            reached[index] = 1
        new = {previous for previous, _ in node.next_functions} - visited
        visited |= new
        queue.extend(new)
    return reached


@dataclass(frozen=True)
class GramMatrix:
    """Inner products of the gradients of the detection and the distillation loss.

    Attributes:
        det_det: <g_det, g_det>.
        det_distill: <g_det, g_distill>.
        distill_distill: <g_distill, g_distill>.
    """

    det_det: float
    det_distill: float
    distill_distill: float

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the gradients; 0 if one of them is 0."""
        if not self.is_positive:
            return 0.0
        return self.det_distill / math.sqrt(self.det_det * self.distill_distill)

    @property
    def is_positive(self) -> bool:
        """Whether both gradients differ from 0."""
        return self.det_det > 0 < self.distill_distill

    def scale(self, det_factor: float, distill_factor: float) -> "GramMatrix":
        """Return the Gram matrix of the gradients multiplied by these factors.

        Args:
            det_factor: Factor of the detection gradient.
            distill_factor: Factor of the distillation gradient.
        """
        return GramMatrix(
            self.det_det * det_factor**2,
            self.det_distill * det_factor * distill_factor,
            self.distill_distill * distill_factor**2,
        )

    def norm(self, det_weight: float) -> float:
        """Return the length of det_weight * g_det + (1 - det_weight) * g_distill.

        Args:
            det_weight: Weight of the detection gradient, 0 to 1.
        """
        rest = 1 - det_weight
        squared = (
            det_weight**2 * self.det_det + 2 * det_weight * rest * self.det_distill + rest**2 * self.distill_distill
        )
        return math.sqrt(max(0.0, squared))


def compute_min_norm_weight(gram: GramMatrix) -> float:
    """Compute the detection weight of the shortest convex combination of both gradients (MGDA, Desideri 2012).

    pi = (g22 - g12) / (g11 + g22 - 2 g12), clipped to [0, 1]. Inside the interval the combination has equal inner
    products with both gradients.

    Args:
        gram: Gram matrix of the gradients.

    Returns:
        Weight, 0 to 1; 0.5 for equal gradients, for which every weight gives the same combination.
    """
    difference = gram.det_det + gram.distill_distill - 2 * gram.det_distill
    if difference <= 0:
        return 0.5
    return min(1.0, max(0.0, (gram.distill_distill - gram.det_distill) / difference))


def compute_bisector_weight(gram: GramMatrix) -> float:
    """Compute the detection weight that bisects the angle: |g_distill| / (|g_det| + |g_distill|).

    Args:
        gram: Gram matrix of the gradients, both different from 0.

    Returns:
        Weight, 0 to 1.
    """
    det, distill = math.sqrt(gram.det_det), math.sqrt(gram.distill_distill)
    return distill / (det + distill)


@dataclass(frozen=True)
class LossWeights:
    """Factors of the two losses for the parameters that both reach.

    Attributes:
        det_weight: Weight of the detection loss between the gradients of the log losses, 0 to 1.
        gram: Gram matrix of the gradients of the log losses.
        det_loss_scale: Factor of the detection loss, with the length of the step.
        distill_loss_scale: Factor of the distillation loss, with the length of the step.
    """

    det_weight: float
    gram: GramMatrix
    det_loss_scale: float
    distill_loss_scale: float

    def blend(self, distill_weight: float) -> "LossWeights":
        """Interpolate between the plain detection loss (`distill_weight` 0) and these weights (1).

        A factor of a loss does not change the gradient of its logarithm, so the schedule is applied here.

        Args:
            distill_weight: Factor of the schedule, 0 to 1.

        Returns:
            The interpolated weights.
        """
        return replace(self, det_loss_scale=1 - distill_weight + distill_weight * self.det_loss_scale)

    @property
    def metrics(self) -> dict[str, float]:
        """Values to log: cosine, log10 of the ratio of lengths (detection to distillation), detection weight."""
        ratio = 0.5 * math.log10(self.gram.det_det / self.gram.distill_distill) if self.gram.is_positive else 0.0
        return {
            "mokd_cosine": self.gram.cosine,
            "mokd_norm_ratio_log10": ratio,
            "mokd_det_weight": self.det_weight,
        }


def solve_loss_weights(
    solver: Literal["bisector", "min-norm"], eps: float, gram: GramMatrix, det_loss: float, distill_loss: float
) -> LossWeights:
    """Compute the weights of two losses.

    Args:
        solver: Rule for the weight between the gradients of the log losses.
        eps: Added to each loss before the logarithm.
        gram: Gram matrix of the gradients of the losses.
        det_loss: Value of the detection loss.
        distill_loss: Value of the distillation loss.

    Returns:
        The weights. If one of the gradients is 0, both factors are 1.
    """
    det_factor, distill_factor = 1 / (det_loss + eps), 1 / (distill_loss + eps)
    logs = gram.scale(det_factor, distill_factor)
    if not logs.is_positive:
        return LossWeights(0.5, logs, 1.0, 1.0)
    weight = (compute_min_norm_weight if solver == "min-norm" else compute_bisector_weight)(logs)
    det, distill = math.sqrt(logs.det_det), math.sqrt(logs.distill_distill)
    # Length of the bisector at 120 degrees. Below 90 degrees both rules give longer combinations.
    min_norm = det * distill / (det + distill)
    scale = math.sqrt(gram.det_det) / max(logs.norm(weight), min_norm)
    return LossWeights(weight, logs, scale * weight * det_factor, scale * (1 - weight) * distill_factor)
