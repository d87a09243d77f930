"""Adapter: brings a student's map to the channels and the stride of the teacher's. Dropped after training."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from hkd_det.errors import UsageError
from hkd_det.models.base import FeatureInfo

DILATIONS = (1, 2, 3)  # of the multi-scale projection: 3x3 views of 3, 5 and 7 cells


Projection = Literal["plain", "norm", "multi-scale", "orthogonal"]


"""What maps the student's channels to the teacher's.

plain: a 1x1 convolution. norm: the same, then batch normalisation. multi-scale: `MultiScale`. orthogonal: `Turn`.
"""


class Adapter(nn.Module):
    """A projection of the channels, after average pooling or before nearest upsampling where the strides differ."""

    def __init__(self, student: FeatureInfo, teacher: FeatureInfo, projection: Projection = "plain") -> None:
        super().__init__()
        finer, coarser = sorted((student.stride, teacher.stride))
        if coarser % finer:
            raise UsageError(
                f"taps {student.name} (stride {student.stride}) and {teacher.name} ({teacher.stride}) differ"
            )
        self.stride_ratio = coarser // finer
        self.should_pool = student.stride < teacher.stride
        self.projection = _build_projection(student.channels, teacher.channels, projection)

    def forward(self, features: Tensor) -> Tensor:
        """[B, student channels, H, W] to [B, teacher channels, H', W'] with the teacher's stride."""
        if self.stride_ratio > 1 and self.should_pool:
            features = F.avg_pool2d(features, self.stride_ratio)
        features = self.projection(features)
        if self.stride_ratio > 1 and not self.should_pool:
            features = F.interpolate(features, scale_factor=float(self.stride_ratio), mode="nearest")
        return features


class MultiScaleProjection(nn.Module):
    """MoKD's light projection: what lies around a cell, near and farther off, before the 1x1 convolution.

    Depthwise 3x3 convolutions of several rates side by side, added to the map itself; each begins at nothing, so that
    it starts as a plain projection and looks around where that pays.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        views = [
            nn.Conv2d(in_channels, in_channels, 3, padding=rate, dilation=rate, groups=in_channels, bias=False)
            for rate in DILATIONS
        ]
        for view in views:
            nn.init.zeros_(view.weight)
        self.dilated_convs = nn.ModuleList(views)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H, W]."""
        seen = features
        for view in self.dilated_convs:
            seen = seen + view(features)
        return self.pointwise(seen)


class OrthogonalProjection(nn.Module):
    """VkD's projection (Miles et al. 2024): linear, with orthonormal columns, or rows where the teacher is narrower.

    It turns the student's space and neither stretches it nor hides anything of it, so what is learnt is learnt by the
    student. The teacher is to be standardised: nothing here could take up its scale.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        # Not by reflections, torch's own choice: weight decay turns the signs that they keep in the parameter to 0.
        parametrizations.orthogonal(self.linear, "weight", "cayley")

    def forward(self, features: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H, W]."""
        with torch.autocast(features.device.type, enabled=False):  # bf16 products are orthonormal to 1e-2 only
            weight = self.linear.weight
        return F.linear(features.movedim(1, -1), weight).movedim(-1, 1)


def _build_projection(in_channels: int, out_channels: int, projection: Projection) -> nn.Module:
    match projection:
        case "plain":
            return nn.Conv2d(in_channels, out_channels, 1)
        case "norm":
            return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        case "multi-scale":
            return MultiScaleProjection(in_channels, out_channels)
        case "orthogonal":
            return OrthogonalProjection(in_channels, out_channels)
