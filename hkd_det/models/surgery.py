"""Surgery: how a network differs from the one its spec describes, so that it can be built again."""

from dataclasses import dataclass, field

from torch import nn

from hkd_det.errors import UsageError
from hkd_det.models.separable import make_separable


@dataclass(frozen=True)
class Inner:
    """A layer inside a block: convolution and normalisation, and the convolution that alone reads what they give.

    Module names as `named_modules` has them.
    """

    conv: str
    norm: str
    consumer: str


@dataclass(frozen=True)
class Changes:
    """What was done to a network after it was built.

    widths: channels left of inner layers, by the name of their convolution (capacity-dynamic students).
    separable: 3x3 convolutions in whose place two depthwise-separable ones stand (blockwise distillation).
    """

    widths: dict[str, int] = field(default_factory=dict)
    separable: tuple[str, ...] = ()


UNCHANGED = Changes()


def apply_changes(network: nn.Module, changes: Changes) -> None:
    """Give a freshly built network the shape that `changes` describes; the new layers' weights are arbitrary.

    Raises UsageError for a layer that is to be both narrowed and made separable.
    """
    both = set(changes.widths) & set(changes.separable)
    if both:
        raise UsageError(f"{min(both)}: a layer can be narrowed or made separable, not both")
    if changes.widths:
        raise NotImplementedError(type(network).__name__)
    make_separable(network, changes.separable)


def residual_inner_layers(network: nn.Module) -> list[Inner]:
    """The inner layers of ResNet's blocks, timm's or torchvision's: the 3x3 convolution before the block's last."""
    found = []
    for name, module in network.named_modules():
        if all(hasattr(module, part) for part in ("conv1", "bn1", "conv2", "bn2")) and hasattr(module, "downsample"):
            last = 3 if getattr(module, "conv3", None) is not None else 2
            found.append(Inner(f"{name}.conv{last - 1}", f"{name}.bn{last - 1}", f"{name}.conv{last}"))
    return found
