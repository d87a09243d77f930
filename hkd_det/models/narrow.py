"""Narrowing: a layer of a block with fewer channels, and whoever reads them."""

from collections.abc import Sequence

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from hkd_det.errors import UsageError

NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)  # whose channels stand each for itself


def is_plain(convolution: nn.Module) -> bool:
    """Whether single channels can be taken out of it: grouped and separable ones are refused."""
    return type(convolution) is nn.Conv2d and convolution.groups == 1


def narrow(network: nn.Module, conv: str, norms: Sequence[str], consumers: Sequence[str], width: int) -> None:
    """Put fresh modules with `width` channels between them in the places of the named ones.

    Raises UsageError for a width that the layer cannot have, and for other than batch normalisation.
    """
    modules = dict(network.named_modules())
    full = modules[conv].out_channels
    if not (isinstance(full, int) and 1 <= width <= full):
        raise UsageError(f"{conv}: {width} channels asked for; it has {full}, and one must stay")
    _put(network, conv, _convolution(modules[conv], channels_out=width))
    for name in norms:
        _put(network, name, _norm(modules[name], width))
    for name in consumers:
        _put(network, name, _convolution(modules[name], channels_in=width))


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    # Assigned by name, as a member of a Sequential or a list is registered, too.
    setattr(network.get_submodule(parent), last, module)


def _convolution(like: nn.Module, channels_in: int = 0, channels_out: int = 0) -> nn.Conv2d:
    assert isinstance(like, nn.Conv2d) and not isinstance(like.padding, str)
    return nn.Conv2d(
        channels_in or like.in_channels,
        channels_out or like.out_channels,
        (like.kernel_size[0], like.kernel_size[1]),
        (like.stride[0], like.stride[1]),
        (like.padding[0], like.padding[1]),
        (like.dilation[0], like.dilation[1]),
        bias=like.bias is not None,
    )


def _norm(like: nn.Module, width: int) -> nn.Module:
    if isinstance(like, nn.BatchNorm2d):
        return nn.BatchNorm2d(width, like.eps, like.momentum)
    if isinstance(like, FrozenBatchNorm2d):
        frozen: nn.Module = FrozenBatchNorm2d(width, like.eps)
        return frozen
    raise UsageError(f"channels can be taken out of batch normalisations, not of {type(like).__name__}")
