"""Channel-wise distillation (Shu et al. 2021, arXiv:2011.13256) of feature maps.

Each channel becomes a distribution over the positions of the image, so that the loss follows the most salient regions.
With `normalize`, maps are standardized per channel before, as in RTMDet's distillation with MMRazor.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hkd_det.config import check_range
from hkd_det.distill.base import DistillMethod
from hkd_det.distill.batch import Adapter, DistillationBatch, Projection
from hkd_det.models.base import BaseDetector
from hkd_det.models.feature_layers import LayerPairs, pair_layers, select_layers


@dataclass(frozen=True)
class CWDConfig:
    """Settings of channel-wise distillation.

    Attributes:
        weight: Weight of the loss.
        temperature: Divisor of the features before the softmax over positions. A larger one spreads the weight.
        normalize: Whether each channel is standardized over the batch (batch normalization without parameters).
        adapter: Projection from student to teacher channels.
        feature_layers: Layers to compare. Empty: the outputs of both necks, paired by stride.
    """

    weight: float = 1.0
    temperature: float = 1.0
    normalize: bool = True
    adapter: Projection = "plain"
    feature_layers: LayerPairs = field(default_factory=LayerPairs)

    def __post_init__(self) -> None:
        check_range("distill.cwd.weight", self.weight, 0)
        check_range("distill.cwd.temperature", self.temperature, 0, is_open=True)


class CWD(DistillMethod):
    """Channel-wise distillation: compares where in the image each channel of a feature map is active.

    Args:
        config: Settings.
        student: Detector to train.
        teacher: Teacher with features.
    """

    Config = CWDConfig
    requires = frozenset({"features"})
    supports_unlabeled = True

    def __init__(self, config: CWDConfig, student: BaseDetector, teacher: Any) -> None:
        super().__init__(config, student, teacher)
        layers = select_layers(student, teacher, config.feature_layers, "distill.cwd.feature_layers")
        pairs = pair_layers(*layers, config.feature_layers)
        self._layers = LayerPairs(tuple(s.name for s, _ in pairs), tuple(t.name for _, t in pairs))
        self.adapters = nn.ModuleList(Adapter(s, t, config.adapter) for s, t in pairs)

    def feature_layers(self) -> LayerPairs:
        """Return the compared layers, pair by pair."""
        return self._layers

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted loss `cwd`, summed over the pairs of layers."""
        losses = [
            channel_wise_divergence(
                adapter(batch.student_features[student]),
                batch.teacher_features[teacher],
                self.config.temperature,
                self.config.normalize,
            )
            for adapter, student, teacher in zip(self.adapters, self._layers.student, self._layers.teacher, strict=True)
        ]
        return {"cwd": self.config.weight * sum(losses[1:], losses[0])}


def channel_wise_divergence(student: Tensor, teacher: Tensor, temperature: float, normalize: bool) -> Tensor:
    """Compute T^2 KL(softmax(teacher / T) || softmax(student / T)) over positions, averaged over images and channels.

    Args:
        student (Tensor[B, C, H, W]): Features.
        teacher (Tensor[B, C, H, W]): Features of the same shape.
        temperature: T, above 0.
        normalize: Whether each channel is standardized over the batch before.

    Returns:
        Scalar (Shu et al. 2021, eq. 3).
    """
    student, teacher = student.float(), teacher.float()
    if normalize:
        student, teacher = (F.batch_norm(maps, None, None, training=True) for maps in (student, teacher))
    s, t = ((maps.flatten(2) / temperature).log_softmax(2) for maps in (student, teacher))
    divergence = F.kl_div(s, t, reduction="sum", log_target=True)
    return temperature**2 * divergence / (student.shape[0] * student.shape[1])
