"""Neck: a feature pyramid (Lin et al. 2017) with a bottom-up path behind it (PANet, Liu et al. 2018)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.models.blocks import make_conv_norm_act


class PAFPN(nn.Module):
    """Gives every level the same width; meaning flows down to the fine levels, position up to the coarse ones.

    `outputs[i]` ends level i: what distillation taps.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(make_conv_norm_act(width, out_channels, kernel_size=1) for width in in_channels)
        self.downs = nn.ModuleList(make_conv_norm_act(out_channels, out_channels, stride=2) for _ in in_channels[1:])
        self.outputs = nn.ModuleList(make_conv_norm_act(out_channels, out_channels) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps from fine to coarse, each half the size of the one before, to as many [B, channels, H_i, W_i]."""
        levels = [lateral(level) for lateral, level in zip(self.laterals, features, strict=True)]
        for fine in range(len(levels) - 2, -1, -1):
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], scale_factor=2.0, mode="nearest")
        finished = [self.outputs[0](levels[0])]
        for level, down, output in zip(levels[1:], self.downs, self.outputs[1:], strict=True):
            finished.append(output(level + down(finished[-1])))
        return finished
