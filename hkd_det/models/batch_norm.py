"""Batch normalization: freezing it, estimating its statistics again, and restoring it in networks with fused layers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hkd_det.ops.hooks import observe_calls


def freeze_batch_norm(model: nn.Module) -> None:
    """Freeze all batch normalizations of a model: running statistics, weights and biases no longer change."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)


@torch.no_grad()
def restore_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give batch normalizations the statistics of their inputs without changing what the network computes.

    A network whose normalizations were fused into the convolutions has identities in their place. In training mode, an
    identity would normalize its input and change the output. With true statistics, training starts from the same
    function.

    Args:
        model: Network to change. Its mode is restored.
        batches (iterable of Tensor[B, 3, H, W]): Images, as for `model`.
    """
    moments = _measure_moments(model, batches)
    for norm, (mean, var) in moments.items():
        assert norm.running_mean is not None and norm.running_var is not None
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * gain
        norm.weight.copy_(gain * (var + norm.eps).sqrt())
        norm.bias.copy_(shift + gain * mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


@torch.no_grad()
def update_bn_stats(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Estimate the running statistics again as plain means over batches (Precise-BN, Wu and Johnson 2021).

    Args:
        model: Network to change. Its mode is restored.
        batches (iterable of Tensor[B, 3, H, W]): Images, as for `model`.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentums = [norm.momentum for norm in norms]
    was_training = model.training
    model.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momentums, strict=True):
        norm.momentum = momentum
    model.train(was_training)


def _measure_moments(model: nn.Module, batches: Iterable[Tensor]) -> dict[nn.BatchNorm2d, tuple[Tensor, Tensor]]:
    """Return mean and variance per channel of the inputs of all batch normalizations, in evaluation mode."""
    sums: dict[nn.BatchNorm2d, tuple[Tensor, Tensor, int]] = {}

    def add_input(_name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.BatchNorm2d):
            values = inputs[0].double()
            total, squares, count = sums.get(module, (0.0, 0.0, 0))
            sums[module] = (
                total + values.sum((0, 2, 3)),
                squares + values.square().sum((0, 2, 3)),
                count + values[:, 0].numel(),
            )

    was_training = model.training
    model.eval()
    with observe_calls(model, on_input=add_input):
        for images in batches:
            model(images)
    model.train(was_training)
    means = {norm: (total / count, squares / count) for norm, (total, squares, count) in sums.items()}
    return {
        norm: (mean.float(), (square - mean.square()).clamp(min=0).float()) for norm, (mean, square) in means.items()
    }
