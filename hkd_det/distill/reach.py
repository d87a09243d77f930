"""Reach: which parameters a loss depends on, read from autograd's graph without a backward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
