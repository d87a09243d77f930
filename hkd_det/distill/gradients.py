"""Arbiter: makes gradients of the task's and the teacher's losses.

Reach: which parameters a loss depends on, read from autograd's graph without a backward pass.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class GradientBalancer(Protocol):
    """Fills `.grad` of everything that learns from two losses."""

    def backward(self, det_loss: Tensor, distill_loss: Tensor | None, distill_weight: float) -> dict[str, float]:
        """From the scalar losses, `taught` None in a step without a teacher; returns figures to log.

        strength: what the schedule has scaled `taught` with, 0..1.
        """

    def state_dict(self) -> dict[str, float]:
        """What it has learnt so far: all that an exact resume needs."""

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """The inverse of `state`."""


class SumBalancer:
    """The plain sum of both losses: hand-set weights decide."""

    def backward(self, det_loss: Tensor, distill_loss: Tensor | None, distill_weight: float) -> dict[str, float]:  # noqa: ARG002
        """One backward pass; the strength is in the loss."""
        (det_loss if distill_loss is None else det_loss + distill_loss).backward()  # type: ignore[no-untyped-call]
        return {}

    def state_dict(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Nothing to do."""


def reachable_parameters(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """[P] float: 1 where a backward pass from the loss would come to the parameter, else 0."""
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    found = torch.zeros(len(parameters))
    seen, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        index = position.get(id(getattr(node, "variable", None)))  # only the graph's leaves have a variable
        if index is not None:
            found[index] = 1
        fresh = {before for before, _ in node.next_functions} - seen
        seen |= fresh
        waiting.extend(fresh)
    return found
