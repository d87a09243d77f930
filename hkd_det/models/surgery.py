"""Changes of a network after it was built: layers with fewer channels, and depthwise-separable convolutions.

`ModelChanges` describes the changes. `apply_changes` repeats them when the network of a checkpoint is built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from hkd_det.errors import UsageError

PRUNABLE_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)  # normalizations that treat each channel separately


@dataclass(frozen=True)
class DepthwiseLayer:
    """A depthwise convolution between a prunable layer and one of its consumers. Names are those of `named_modules`.

    Attributes:
        conv: The depthwise convolution.
        norm: Its normalization.
        act: Its activation.
        consumer: The convolution that reads its output.
        consumer_norm: The normalization of the consumer.
    """

    conv: str
    norm: str
    act: str
    consumer: str
    consumer_norm: str


@dataclass(frozen=True)
class PrunableLayer:
    """A convolution whose output channels known convolutions read. Names are those of `named_modules`.

    Attributes:
        conv: The convolution.
        norms: Its normalizations; several if levels share the convolution but not the normalization.
        consumers: The convolutions that read its output.
        depthwise: Depthwise convolutions between it and its consumers. They have the same channels.
        last_inputs: Consumers that read it behind other channels of a concatenation. All others read it first.
        num_copies: How often the input of each consumer contains it, as in spatial pyramid pooling.
    """

    conv: str
    norms: tuple[str, ...]
    consumers: tuple[str, ...]
    depthwise: tuple[DepthwiseLayer, ...] = ()
    last_inputs: frozenset[str] = frozenset()
    num_copies: int = 1

    def select_inputs(self, consumer: str, in_channels: int, keep: Tensor) -> Tensor:
        """Return which input channels of a consumer remain if channels of this layer are removed.

        Args:
            consumer: Name of the consumer.
            in_channels: Its input channels before.
            keep (bool Tensor[C]): Channels of this layer that remain.

        Returns:
            bool Tensor[in_channels].
        """
        own = keep.repeat(self.num_copies)
        others = keep.new_ones(in_channels - len(own))
        return torch.cat([others, own] if consumer in self.last_inputs else [own, others])


@dataclass(frozen=True)
class ModelChanges:
    """Changes made to a network after it was built from its spec.

    Attributes:
        widths: Output channels of pruned convolutions, by name (capacity-dynamic distillation).
        separable: Convolutions that `SeparableConvBlock` replaces (blockwise distillation).
        separable_shared: Those of them that run several times per image, on the levels of a pyramid.
    """

    widths: dict[str, int] = field(default_factory=dict)
    separable: tuple[str, ...] = ()
    separable_shared: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelChanges":
        """Build changes from the fields of a file. Files of earlier versions have no `separable_shared`.

        Args:
            values: Field name -> value.

        Returns:
            The changes.
        """
        return cls(values["widths"], tuple(values["separable"]), tuple(values.get("separable_shared", ())))


NO_CHANGES = ModelChanges()


def apply_changes(network: nn.Module, changes: ModelChanges) -> None:
    """Apply changes to a freshly built network. The weights of the new layers are random.

    Channels are pruned before layers are replaced, because separable blocks cannot be pruned.

    Args:
        network: A detector with `prunable_layers`.
        changes: Changes to apply.

    Raises:
        UsageError: If the network has no such layer or cannot have such a width.
    """
    if changes.widths:
        layers = network.prunable_layers()  # type: ignore[operator]  # a method of BaseDetector, which imports this module
        _prune_layers(network, layers, changes.widths)
    replace_with_separable(network, changes.separable, changes.separable_shared)


def is_dense_conv(module: nn.Module) -> bool:
    """Return whether a module is a convolution with one group, so that single channels can be removed.

    Args:
        module: Any module.
    """
    return type(module) is nn.Conv2d and module.groups == 1


def filter_dense_convs(network: nn.Module, layers: list[PrunableLayer]) -> list[PrunableLayer]:
    """Return the layers of which the convolution and all consumers are dense convolutions.

    Args:
        network: Network that contains the layers.
        layers: Candidates.
    """
    modules = dict(network.named_modules())
    return [layer for layer in layers if all(is_dense_conv(modules[name]) for name in (layer.conv, *layer.consumers))]


def find_residual_layers(network: nn.Module) -> list[PrunableLayer]:
    """Return the inner layers of the residual blocks of timm and torchvision: all convolutions but a block's last.

    Args:
        network: Backbone.
    """
    layers = []
    for name, block in network.named_modules():
        if all(hasattr(block, part) for part in ("conv1", "bn1", "conv2", "bn2")) and hasattr(block, "downsample"):
            num_convs = 3 if getattr(block, "conv3", None) is not None else 2
            layers += [
                PrunableLayer(f"{name}.conv{index}", (f"{name}.bn{index}",), (f"{name}.conv{index + 1}",))
                for index in range(1, num_convs)
                # Anti-aliased blocks of timm pool with one kernel per channel before their last convolution.
                if index < num_convs - 1 or isinstance(getattr(block, "aa", nn.Identity()), nn.Identity)
            ]
    return filter_dense_convs(network, layers)


def prune_channels(network: nn.Module, layer: PrunableLayer, num_channels: int) -> None:
    """Replace a convolution and the modules that share its output channels by fresh modules with fewer channels.

    Args:
        network: Network to change.
        layer: The convolution, with its normalizations and consumers.
        num_channels: New number of output channels.

    Raises:
        UsageError: If the layer cannot have this number of channels, or if a normalization is not a batch
            normalization.
    """
    modules = dict(network.named_modules())
    out_channels = modules[layer.conv].out_channels
    if not (isinstance(out_channels, int) and 1 <= num_channels <= out_channels):
        raise UsageError(
            f"{layer.conv}: expected 1 to {out_channels} channels, got {num_channels}. Use another checkpoint."
        )
    _replace_module(network, layer.conv, _make_conv(modules[layer.conv], out_channels=num_channels))
    for name in (*layer.norms, *(depthwise.norm for depthwise in layer.depthwise)):
        _replace_module(network, name, _make_norm(modules[name], num_channels))
    for name in (depthwise.conv for depthwise in layer.depthwise):
        _replace_module(network, name, _make_conv(modules[name], num_channels, num_channels, groups=num_channels))
    for name in layer.consumers:
        removed = layer.num_copies * (out_channels - num_channels)
        _replace_module(network, name, _make_conv(modules[name], in_channels=modules[name].in_channels - removed))


class SeparableConvBlock(nn.Module):
    """Two depthwise-separable convolutions that replace one 3x3 convolution (Blakeney et al. 2021).

    Depthwise 3x3, pointwise, batch normalization, ReLU, depthwise 3x3, pointwise: 18 C + 2 C^2 instead of 9 C^2
    weights. The normalization that followed the convolution stays where it is. The block therefore ends without
    normalization and activation, and with a bias only if the convolution had one.

    A block that several levels share has a bias instead of the normalization. Training would normalize each level with
    its own statistics, and inference all levels with their average.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        stride: Stride of the first depthwise convolution.
        bias: Whether the last convolution has a bias.
        is_shared: Whether several levels share the block.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: tuple[int, int], bias: bool, is_shared: bool = False
    ) -> None:
        super().__init__()
        self.depthwise1 = nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
        self.pointwise1 = nn.Conv2d(in_channels, out_channels, 1, bias=is_shared)
        self.norm = nn.Identity() if is_shared else nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        self.depthwise2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, groups=out_channels, bias=False)
        self.pointwise2 = nn.Conv2d(out_channels, out_channels, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride].

        Args:
            features (Tensor[B, in_channels, H, W]): Input features.

        Returns:
            Tensor[B, out_channels, H / stride, W / stride].
        """
        features = self.act(self.norm(self.pointwise1(self.depthwise1(features))))
        outputs: Tensor = self.pointwise2(self.depthwise2(features))
        return outputs

    def forward_levels(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map the features of several levels. The normalization uses common statistics of all levels.

        Args:
            features (list of Tensor[B, in_channels, H_i, W_i]): Input features of each level.

        Returns:
            list of Tensor[B, out_channels, H_i / stride, W_i / stride].
        """
        levels = [self.pointwise1(self.depthwise1(level)) for level in features]
        joint = self.act(
            self.norm(torch.cat([level.flatten(2) for level in levels], 2)[..., None])
        )  # [B, C, sum HW, 1]
        parts = joint[..., 0].split([level.shape[-2] * level.shape[-1] for level in levels], 2)
        return [
            self.pointwise2(self.depthwise2(part.unflatten(2, level.shape[-2:])))
            for part, level in zip(parts, levels, strict=True)
        ]

    @torch.no_grad()
    def fuse_norm(self) -> "SeparableConvBlock":
        """Return an equal block for several levels: the running statistics become part of the first pointwise layer."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        depthwise, pointwise = self.depthwise1, self.pointwise2
        stride = (depthwise.stride[0], depthwise.stride[1])
        has_bias = pointwise.bias is not None
        fused = SeparableConvBlock(depthwise.in_channels, pointwise.out_channels, stride, has_bias, is_shared=True)
        fused.load_state_dict(
            {name: value for name, value in self.state_dict().items() if not name.startswith(("norm.", "pointwise1."))},
            strict=False,
        )
        fused.pointwise1 = fuse_conv_bn_eval(self.pointwise1.eval(), self.norm.eval())
        return fused.to(depthwise.weight.device)


def is_dense_conv3x3(module: nn.Module) -> bool:
    """Return whether a module is a convolution that `SeparableConvBlock` can replace.

    Args:
        module: Any module.
    """
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.padding == module.dilation == (1, 1)
        and module.groups == 1
    )


def make_block(conv: nn.Conv2d, is_shared: bool = False) -> SeparableConvBlock:
    """Build a block with fresh weights and the channels and stride of a convolution.

    Args:
        conv: Convolution to replace.
        is_shared: Whether several levels share the block.

    Returns:
        The block.
    """
    stride = (conv.stride[0], conv.stride[1])
    return SeparableConvBlock(conv.in_channels, conv.out_channels, stride, conv.bias is not None, is_shared)


def replace_with_separable(network: nn.Module, names: tuple[str, ...], shared_names: tuple[str, ...] = ()) -> None:
    """Replace convolutions by separable blocks with fresh weights.

    Args:
        network: Network to change.
        names: Names of the convolutions.
        shared_names: Those of them that several levels share.

    Raises:
        UsageError: If a name is no dense 3x3 convolution of the network.
    """
    modules = dict(network.named_modules())
    for name in names:
        conv = modules.get(name)
        if not (isinstance(conv, nn.Conv2d) and is_dense_conv3x3(conv)):
            raise UsageError(f"{name}: expected a 3x3 convolution with one group. Use another checkpoint.")
        _replace_module(network, name, make_block(conv, name in shared_names))


def _prune_layers(network: nn.Module, layers: list[PrunableLayer], widths: dict[str, int]) -> None:
    by_name = {layer.conv: layer for layer in layers}
    for conv, num_channels in widths.items():
        if conv not in by_name:
            raise UsageError(f"{conv}: no prunable layer of this network. Use another checkpoint.")
        prune_channels(network, by_name[conv], num_channels)


def _replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)  # also registers members of a Sequential or ModuleList


def _make_conv(template: nn.Module, in_channels: int = 0, out_channels: int = 0, groups: int = 1) -> nn.Conv2d:
    assert isinstance(template, nn.Conv2d) and not isinstance(template.padding, str)
    return nn.Conv2d(
        in_channels or template.in_channels,
        out_channels or template.out_channels,
        (template.kernel_size[0], template.kernel_size[1]),
        (template.stride[0], template.stride[1]),
        (template.padding[0], template.padding[1]),
        (template.dilation[0], template.dilation[1]),
        groups,
        bias=template.bias is not None,
    )


def _make_norm(template: nn.Module, num_channels: int) -> nn.Module:
    if isinstance(template, nn.BatchNorm2d):
        return nn.BatchNorm2d(num_channels, template.eps, template.momentum)
    if isinstance(template, FrozenBatchNorm2d):
        frozen: nn.Module = FrozenBatchNorm2d(num_channels, template.eps)
        return frozen
    raise UsageError(
        f"{type(template).__name__}: only channels of a batch normalization can be removed. Choose another layer."
    )
