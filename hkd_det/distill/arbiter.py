"""Arbiter: makes gradients of the task's and the teacher's losses."""

from typing import Protocol

from torch import Tensor


class Arbiter(Protocol):
    """Fills `.grad` of everything that learns from two losses."""

    def backward(self, task: Tensor, taught: Tensor | None, strength: float) -> dict[str, float]:
        """From the scalar losses, `taught` None in a step without a teacher; returns figures to log.

        strength: what the schedule has scaled `taught` with, 0..1.
        """

    def state(self) -> dict[str, float]:
        """What it has learnt so far: all that an exact resume needs."""

    def restore(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""


class Together:
    """The plain sum of both losses: hand-set weights decide."""

    def backward(self, task: Tensor, taught: Tensor | None, strength: float) -> dict[str, float]:  # noqa: ARG002
        """One backward pass; the strength is in the loss."""
        (task if taught is None else task + taught).backward()  # type: ignore[no-untyped-call]
        return {}

    def state(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Nothing to do."""
