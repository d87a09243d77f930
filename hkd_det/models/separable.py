"""SeparablePair: two depthwise-separable convolutions in the place of one 3x3 convolution."""

from torch import Tensor, nn

from hkd_det.errors import UsageError


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
