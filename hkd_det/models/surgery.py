"""Surgery: how a network differs from the one its spec describes, so that it can be built again."""

from dataclasses import dataclass, field

from torch import nn

from hkd_det.errors import UsageError
from hkd_det.models.narrow import is_dense_conv, prune_channels
from hkd_det.models.separable import replace_with_separable


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
