"""Narrowing: a layer of a block with fewer channels, and whoever reads them.

SeparablePair: two depthwise-separable convolutions in the place of one 3x3 convolution.

Surgery: how a network differs from the one its spec describes, so that it can be built again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
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


class SeparableConvBlock(nn.Module):
    """Depthwise 3x3, 1x1, normalisation, ReLU, depthwise 3x3, 1x1: the channels and the stride of what it replaces.

    It ends as the convolution did, before the normalisation that followed, which stays where it is: so values may be
    negative, nothing is normalised twice, and the block fits where a convolution had no normalisation, too (it has a
    bias at its end if the convolution had one). 18 C + 2 C^2 weights for 9 C^2. Blakeney et al. 2021.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int], bias: bool) -> None:
        super().__init__()
        self.depthwise1 = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        self.pointwise1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        self.depthwise2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, groups=out_channels, bias=False)
        self.pointwise2 = nn.Conv2d(out_channels, out_channels, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, channels_in, H, W] to [B, channels_out, H / stride, W / stride]."""
        features = self.act(self.norm(self.pointwise1(self.depthwise1(features))))
        mixed: Tensor = self.pointwise2(self.depthwise2(features))
        return mixed


def is_dense_conv3x3(module: nn.Module) -> bool:
    """Whether a module is a convolution that a `SeparablePair` can stand in for."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.padding == module.dilation == (1, 1)
        and module.groups == 1
    )


def make_block(conv: nn.Conv2d) -> SeparableConvBlock:
    """A fresh block of the convolution's channels and stride."""
    stride = (conv.stride[0], conv.stride[1])
    return SeparableConvBlock(conv.in_channels, conv.out_channels, stride, conv.bias is not None)


def replace_with_separable(network: nn.Module, names: tuple[str, ...]) -> None:
    """Put fresh blocks in the place of the named convolutions; UsageError for a name that is no plain 3x3 one."""
    modules = dict(network.named_modules())
    for name in names:
        convolution = modules.get(name)
        if not (isinstance(convolution, nn.Conv2d) and is_dense_conv3x3(convolution)):
            raise UsageError(f"{name}: no 3x3 convolution of one group in this network, nothing to make separable")
        parent, _, last = name.rpartition(".")
        # Assigned by name, as a member of a Sequential or a list is registered, too.
        setattr(modules[parent], last, make_block(convolution))


@dataclass(frozen=True)
class PrunableLayer:
    """A layer inside a block: a convolution, its normalisation, and the convolutions that alone read what they give.

    norms: several where the convolution is shared by levels that are normalised each for itself, as in our heads.
    Module names as `named_modules` has them.
    """

    conv: str
    norms: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class ModelChanges:
    """What was done to a network after it was built.

    widths: channels left of inner layers, by the name of their convolution (capacity-dynamic students).
    separable: 3x3 convolutions in whose place two depthwise-separable ones stand (blockwise distillation).
    """

    widths: dict[str, int] = field(default_factory=dict)
    separable: tuple[str, ...] = ()


NO_CHANGES = ModelChanges()


def apply_changes(network: nn.Module, changes: ModelChanges) -> None:
    """Give a freshly built network the shape that `changes` describes; the new layers' weights are arbitrary.

    A layer that is both narrowed and separable shed its channels first: separable ones have none to shed.
    Raises UsageError for a layer that is not there.
    """
    if changes.widths:
        _prune_layers(network, network.prunable_layers(), changes.widths)  # type: ignore[operator]
    replace_with_separable(network, changes.separable)


def find_residual_layers(network: nn.Module) -> list[PrunableLayer]:
    """The inner layers of ResNet's blocks, timm's or torchvision's: all convolutions but a block's last."""
    found = []
    for name, block in network.named_modules():
        if all(hasattr(block, part) for part in ("conv1", "bn1", "conv2", "bn2")) and hasattr(block, "downsample"):
            last = 3 if getattr(block, "conv3", None) is not None else 2
            found += [
                PrunableLayer(f"{name}.conv{index}", (f"{name}.bn{index}",), (f"{name}.conv{index + 1}",))
                for index in range(1, last)
                # timm's anti-aliased blocks pool by a kernel a channel before the block's last convolution.
                if index < last - 1 or isinstance(getattr(block, "aa", nn.Identity()), nn.Identity)
            ]
    return filter_dense_convs(network, found)


def filter_dense_convs(network: nn.Module, layers: list[PrunableLayer]) -> list[PrunableLayer]:
    """Those of the layers whose channels can be taken out one by one; grouped or separable ones are none."""
    modules = dict(network.named_modules())
    return [layer for layer in layers if all(is_dense_conv(modules[name]) for name in (layer.conv, *layer.consumers))]


def _prune_layers(network: nn.Module, layers: list[PrunableLayer], widths: dict[str, int]) -> None:
    by_name = {layer.conv: layer for layer in layers}
    for conv, width in widths.items():
        if conv not in by_name:
            raise UsageError(f"{conv}: no layer of this network whose channels could be taken out")
        layer = by_name[conv]
        prune_channels(network, conv, layer.norms, layer.consumers, width)
