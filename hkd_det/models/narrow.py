"""Narrowing: a layer of a block with fewer channels, and whoever reads them."""

from collections.abc import Sequence

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from hkd_det.errors import UsageError

PRUNABLE_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)  # whose channels stand each for itself


def is_dense_conv(module: nn.Module) -> bool:
    """Whether single channels can be taken out of it: grouped and separable ones are refused."""
    return type(module) is nn.Conv2d and module.groups == 1


def prune_channels(
    network: nn.Module, conv: str, norms: Sequence[str], consumers: Sequence[str], num_channels: int
) -> None:
    """Put fresh modules with `width` channels between them in the places of the named ones.

    Raises UsageError for a width that the layer cannot have, and for other than batch normalisation.
    """
    modules = dict(network.named_modules())
    full = modules[conv].out_channels
    if not (isinstance(full, int) and 1 <= num_channels <= full):
        raise UsageError(f"{conv}: {num_channels} channels asked for; it has {full}, and one must stay")
    _replace_module(network, conv, _make_conv(modules[conv], out_channels=num_channels))
    for name in norms:
        _replace_module(network, name, _make_norm(modules[name], num_channels))
    for name in consumers:
        _replace_module(network, name, _make_conv(modules[name], in_channels=num_channels))


def _replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    # Assigned by name, as a member of a Sequential or a list is registered, too.
    setattr(network.get_submodule(parent), last, module)


def _make_conv(template: nn.Module, in_channels: int = 0, out_channels: int = 0) -> nn.Conv2d:
    assert isinstance(template, nn.Conv2d) and not isinstance(template.padding, str)
    return nn.Conv2d(
        in_channels or template.in_channels,
        out_channels or template.out_channels,
        (template.kernel_size[0], template.kernel_size[1]),
        (template.stride[0], template.stride[1]),
        (template.padding[0], template.padding[1]),
        (template.dilation[0], template.dilation[1]),
        bias=template.bias is not None,
    )


def _make_norm(template: nn.Module, num_channels: int) -> nn.Module:
    if isinstance(template, nn.BatchNorm2d):
        return nn.BatchNorm2d(num_channels, template.eps, template.momentum)
    if isinstance(template, FrozenBatchNorm2d):
        frozen: nn.Module = FrozenBatchNorm2d(num_channels, template.eps)
        return frozen
    raise UsageError(f"channels can be taken out of batch normalisations, not of {type(template).__name__}")
