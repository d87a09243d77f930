"""Adapters that map student features to the channels and the stride of the teacher. Dropped after training."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from hkd_det.errors import UsageError
from hkd_det.models.base import FeatureInfo

DILATIONS = (1, 2, 3)  # receptive fields of 3, 5 and 7 cells

Projection = Literal["plain", "norm", "multi-scale", "orthogonal"]
"""Channel projection. plain: 1x1 convolution. norm: the same and batch normalization. multi-scale:
`MultiScaleProjection`. orthogonal: `OrthogonalProjection`."""


class Adapter(nn.Module):
    """Map a student feature layer to a teacher feature layer: average pooling, channel projection, nearest upsampling.

    A student map with a smaller stride is pooled before the projection. One with a larger stride is upsampled after it.

    Args:
        student: Feature layer of the student.
        teacher: Feature layer of the teacher.
        projection: Kind of channel projection.

    Raises:
        UsageError: If neither stride is a multiple of the other.
    """

    def __init__(self, student: FeatureInfo, teacher: FeatureInfo, projection: Projection = "plain") -> None:
        super().__init__()
        finer, coarser = sorted((student.stride, teacher.stride))
        if coarser % finer:
            raise UsageError(
                f"feature layers {student.name} (student) and {teacher.name} (teacher): expected strides of which one "
                f"is a multiple of the other, got {student.stride} and {teacher.stride}. Choose other layers."
            )
        self.stride_ratio = coarser // finer
        self.should_pool = student.stride < teacher.stride
        self.projection = _build_projection(student.channels, teacher.channels, projection)

    def forward(self, features: Tensor) -> Tensor:
        """Map student features to the shape of the teacher.

        Args:
            features (Tensor[B, C_s, H, W]): Student feature map.

        Returns:
            Tensor[B, C_t, H', W']: Channels and stride of the teacher.
        """
        if self.stride_ratio > 1 and self.should_pool:
            features = F.avg_pool2d(features, self.stride_ratio)
        features = self.projection(features)
        if self.stride_ratio > 1 and not self.should_pool:
            features = F.interpolate(features, scale_factor=float(self.stride_ratio), mode="nearest")
        return features


class MultiScaleProjection(nn.Module):
    """Light projection of MoKD (Hayder et al. 2025): dilated depthwise 3x3 convolutions, then a 1x1 convolution.

    The outputs of the depthwise convolutions are added to the input. Their weights start at 0, so the module starts as
    a plain 1x1 projection.

    Args:
        in_channels: Channels of the student.
        out_channels: Channels of the teacher.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        convs = [
            nn.Conv2d(in_channels, in_channels, 3, padding=rate, dilation=rate, groups=in_channels, bias=False)
            for rate in DILATIONS
        ]
        for conv in convs:
            nn.init.zeros_(conv.weight)
        self.dilated_convs = nn.ModuleList(convs)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [B, C_in, H, W] to [B, C_out, H, W].

        Args:
            features (Tensor[B, C_in, H, W]): Student feature map.

        Returns:
            Tensor[B, C_out, H, W]: Projected feature map.
        """
        context = features
        for conv in self.dilated_convs:
            context = context + conv(features)
        return self.pointwise(context)


class OrthogonalProjection(nn.Module):
    """Orthogonal projection of VkD (Miles et al. 2024).

    The weight has orthonormal columns, or orthonormal rows if the teacher is narrower. Orthonormal columns preserve
    lengths and angles, so the adapter cannot compensate for errors of the student features. Nor can it learn the scale
    of the teacher features: standardize them first.

    Args:
        in_channels: Channels of the student.
        out_channels: Channels of the teacher.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        # Not torch's default (Householder): weight decay would shrink the signs that it stores in the parameter.
        parametrizations.orthogonal(self.linear, "weight", "cayley")

    def forward(self, features: Tensor) -> Tensor:
        """Project features [B, C_in, H, W] to [B, C_out, H, W].

        Args:
            features (Tensor[B, C_in, H, W]): Student feature map.

        Returns:
            Tensor[B, C_out, H, W]: Projected feature map.
        """
        with torch.autocast(features.device.type, enabled=False):  # in bf16 the weight is orthonormal to 1e-2 only
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
