"""Gradient balancers: how the gradients of detection and distillation losses become one step."""

from collections.abc import Callable, Sequence
from typing import Protocol

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


def reachable_parameters(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
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
