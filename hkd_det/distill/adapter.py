"""Adapter: brings a student's map to the channels and the stride of the teacher's. Dropped after training."""

from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.errors import UsageError
from hkd_det.models.tap import Tap


class Adapter(nn.Module):
    """A 1x1 convolution, after average pooling or before nearest upsampling where the strides differ."""

    def __init__(self, student: Tap, teacher: Tap) -> None:
        super().__init__()
        finer, coarser = sorted((student.stride, teacher.stride))
        if coarser % finer:
            raise UsageError(
                f"taps {student.name} (stride {student.stride}) and {teacher.name} ({teacher.stride}) differ"
            )
        self.factor = coarser // finer
        self.pools = student.stride < teacher.stride
        self.project = nn.Conv2d(student.channels, teacher.channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, student channels, H, W] to [B, teacher channels, H', W'] with the teacher's stride."""
        if self.factor > 1 and self.pools:
            features = F.avg_pool2d(features, self.factor)
        features = self.project(features)
        if self.factor > 1 and not self.pools:
            features = F.interpolate(features, scale_factor=float(self.factor), mode="nearest")
        return features


def pair_by_stride(student: list[Tap], teacher: list[Tap]) -> list[tuple[Tap, Tap]]:
    """For each teacher tap the student tap of the nearest stride (in octaves), the finer one in a draw."""
    if not student or not teacher:
        raise UsageError("nothing to distil: student or teacher has no taps")

    def distance(mine: Tap, other: Tap) -> tuple[float, int]:
        return max(mine.stride / other.stride, other.stride / mine.stride), mine.stride

    return [(min(student, key=lambda mine: distance(mine, other)), other) for other in teacher]
