"""Adapter: brings a student's map to the channels and the stride of the teacher's. Dropped after training."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from hkd_det.errors import UsageError
from hkd_det.models.tap import Tap

RATES = (1, 2, 3)  # of the multi-scale projection: 3x3 views of 3, 5 and 7 cells

Projection = Literal["plain", "norm", "multi-scale", "orthogonal"]
"""What maps the student's channels to the teacher's.

plain: a 1x1 convolution. norm: the same, then batch normalisation. multi-scale: `MultiScale`. orthogonal: `Turn`.
"""


class Adapter(nn.Module):
    """A projection of the channels, after average pooling or before nearest upsampling where the strides differ."""

    def __init__(self, student: Tap, teacher: Tap, projection: Projection = "plain") -> None:
        super().__init__()
        finer, coarser = sorted((student.stride, teacher.stride))
        if coarser % finer:
            raise UsageError(
                f"taps {student.name} (stride {student.stride}) and {teacher.name} ({teacher.stride}) differ"
            )
        self.factor = coarser // finer
        self.pools = student.stride < teacher.stride
        self.project = _project(student.channels, teacher.channels, projection)

    def forward(self, features: Tensor) -> Tensor:
        """[B, student channels, H, W] to [B, teacher channels, H', W'] with the teacher's stride."""
        if self.factor > 1 and self.pools:
            features = F.avg_pool2d(features, self.factor)
        features = self.project(features)
        if self.factor > 1 and not self.pools:
            features = F.interpolate(features, scale_factor=float(self.factor), mode="nearest")
        return features


class MultiScale(nn.Module):
    """MoKD's light projection: what lies around a cell, near and farther off, before the 1x1 convolution.

    Depthwise 3x3 convolutions of several rates side by side, added to the map itself; each begins at nothing, so that
    it starts as a plain projection and looks around where that pays.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        views = [
            nn.Conv2d(channels_in, channels_in, 3, padding=rate, dilation=rate, groups=channels_in, bias=False)
            for rate in RATES
        ]
        for view in views:
            nn.init.zeros_(view.weight)
        self.around = nn.ModuleList(views)
        self.mix = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H, W]."""
        seen = features
        for view in self.around:
            seen = seen + view(features)
        return self.mix(seen)


class Turn(nn.Module):
    """VkD's projection (Miles et al. 2024): linear, with orthonormal columns, or rows where the teacher is narrower.

    It turns the student's space and neither stretches it nor hides anything of it, so what is learnt is learnt by the
    student. The teacher is to be standardised: nothing here could take up its scale.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels_in, channels_out, bias=False)
        # Not by reflections, torch's own choice: weight decay turns the signs that they keep in the parameter to 0.
        parametrizations.orthogonal(self.linear, "weight", "cayley")

    def forward(self, features: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H, W]."""
        with torch.autocast(features.device.type, enabled=False):  # bf16 products are orthonormal to 1e-2 only
            weight = self.linear.weight
        return F.linear(features.movedim(1, -1), weight).movedim(-1, 1)


def _project(channels_in: int, channels_out: int, projection: Projection) -> nn.Module:
    match projection:
        case "plain":
            return nn.Conv2d(channels_in, channels_out, 1)
        case "norm":
            return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out))
        case "multi-scale":
            return MultiScale(channels_in, channels_out)
        case "orthogonal":
            return Turn(channels_in, channels_out)


def pair_by_stride(student: list[Tap], teacher: list[Tap]) -> list[tuple[Tap, Tap]]:
    """For each teacher tap the student tap of the nearest stride (in octaves), the finer one in a draw."""
    if not student or not teacher:
        raise UsageError("nothing to distil: student or teacher has no taps")

    def distance(mine: Tap, other: Tap) -> tuple[float, int]:
        return max(mine.stride / other.stride, other.stride / mine.stride), mine.stride

    return [(min(student, key=lambda mine: distance(mine, other)), other) for other in teacher]
