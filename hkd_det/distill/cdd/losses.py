"""Settings and losses of capacity-dynamic distillation: scores of all boxes, pooled person features of all blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hkd_det.config import check_range
from hkd_det.distill.batch import DistillationBatch, comparable_logits
from hkd_det.distill.cdd.compactor import CompactorSite, find_compactors
from hkd_det.distill.cdd.importance import ChannelImportance, PooledFeatures, sample_regions
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.models.feature_layers import LayerPairs
from hkd_det.ops.losses import quality_focal_kd_loss
from hkd_det.ops.roi_pool import BoxAveragePool

Ranking = Literal["response", "response-per-cost"]


@dataclass(frozen=True)
class CDDConfig:
    """Settings of CDD: the target size, the losses and the schedule.

    Attributes:
        keep_flops: Maximum ratio of the FLOPs to keep, above 0 to 1; 1 sets no limit.
        keep_parameters: Maximum ratio of the parameters to keep, above 0 to 1; 1 sets no limit.
        min_channels: Minimum number of channels of each layer; a narrower layer is not pruned.
        min_width_ratio: Minimum ratio of the channels of each layer to keep, 0 to 1, in addition to `min_channels`.
        ranking: Order in which channels of different layers are removed. "response-per-cost": by the channel's share of
            the responses of its layer, divided by the cost that the channel adds to the network. The cost is FLOPs or
            parameters, according to the targets. "response": by the response relative to the mean of the layer.
        cls: Weight of the score loss.
        temperature: Temperature T of the score loss.
        feature: Weight of the distance of pooled person features, summed over layers.
        lasso: Weight of the group lasso on the rows of the compactors.
        warmup_ratio: Ratio of all steps before the first channel is selected.
        mask_end: Ratio of the distilled steps after which all channels are selected.
        fade_ratio: Ratio of all steps in which the compactor row of a selected channel shrinks from norm 1 to 0.
        queue_size: Number of pooled teacher features in the queue of each layer.
        num_neighbors: Number of nearest features in the queue that the feature of each person is compared with.
        candidate_ratio: Ratio of a layer's channels that are candidates in a comparison, removed channels included.
        compare_interval: Maximum number of steps between comparisons. The paper compares in each step.
    """

    keep_flops: float = 0.35
    keep_parameters: float = 1.0
    min_channels: int = 4
    min_width_ratio: float = 0.125
    ranking: Ranking = "response-per-cost"
    cls: float = 1.0
    temperature: float = 2.0
    feature: float = 0.05
    lasso: float = 0.004
    warmup_ratio: float = 1 / 6
    mask_end: float = 2 / 3
    fade_ratio: float = 1 / 12
    queue_size: int = 24000
    num_neighbors: int = 2
    candidate_ratio: float = 0.5
    compare_interval: int = 16

    def __post_init__(self) -> None:
        for name in ("keep_flops", "keep_parameters", "mask_end", "fade_ratio", "candidate_ratio"):
            check_range(f"distill.cdd.{name}", getattr(self, name), 0, 1, is_open=True)
        for name in ("min_channels", "queue_size", "num_neighbors", "compare_interval"):
            check_range(f"distill.cdd.{name}", getattr(self, name), 1)
        check_range("distill.cdd.min_width_ratio", self.min_width_ratio, 0, 1)
        for name in ("cls", "feature", "lasso", "warmup_ratio"):
            check_range(f"distill.cdd.{name}", getattr(self, name), 0)
        check_range("distill.cdd.temperature", self.temperature, 0, is_open=True)
        if self.keep_flops == self.keep_parameters == 1:
            raise UsageError("distill.cdd: nothing to prune. Set keep_flops or keep_parameters below 1.")
        if self.warmup_ratio >= self.mask_end:
            raise UsageError(
                f"distill.cdd.warmup_ratio: expected less than mask_end ({self.mask_end:g}), got {self.warmup_ratio:g}."
            )

    def get_min_width(self, width: int) -> int:
        """Return the smallest width that pruning may give a layer.

        Args:
            width: Channels of the layer before pruning.
        """
        return min(width, max(self.min_channels, math.ceil(self.min_width_ratio * width)))


class CDDLoss(nn.Module):
    """Losses `cdd_feature` and `cdd_cls`. Its parameters are adapters between layers of different widths.

    Args:
        student: Student with compactors.
        teacher: Teacher of the same family, with all layers that contain a compactor in the student.
        config: Settings of CDD.

    Attributes:
        sites: Compactors of the student.
        layers: Normalization layers whose outputs `forward` reads from the batch.
        is_comparison_step: Whether the next step records features to select channels by.
        pooled_features: Recorded features of each compactor; empty in other steps.

    Raises:
        UsageError: The teacher lacks a layer.
    """

    def __init__(self, student: BaseDetector, teacher: Any, config: CDDConfig) -> None:
        super().__init__()
        sites = find_compactors(student)
        _check_same_layers(sites, teacher)
        self.config = config
        self.sites = tuple(sites)  # in a tuple, because they are submodules of the student
        names = [name for site in sites for name in site.layer.norms]
        self.layers = LayerPairs(tuple(f"{name}.norm" for name in names), tuple(names))
        self.adapters = nn.ModuleList(_make_adapter(site, teacher) for site in sites)
        self.importance = nn.ModuleList(
            ChannelImportance(
                len(site.compactor.masked),
                _get_teacher_channels(site, teacher),
                config.queue_size,
                config.num_neighbors,
                config.candidate_ratio,
            )
            for site in sites
        )
        self.is_comparison_step = True
        self.pooled_features: list[PooledFeatures] = []

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted losses.

        cdd_feature = feature * sum over layers of mean_n ||A s_n - t_n||_2, with the pooled vectors s and t of person n
        and the adapter A. cdd_cls = cls * T^2 times the quality focal distillation loss of the scores at temperature T.

        Args:
            batch: Images, targets, outputs and recorded features of both networks.

        Returns:
            Scalar tensors "cdd_feature" and "cdd_cls".
        """
        height, width = batch.images.shape[-2:]
        regions = sample_regions(batch.targets, (height, width), has_negatives=self.is_comparison_step)
        gt_rois = regions.rois[: regions.num_gt]
        gt_pool = BoxAveragePool(gt_rois, (height, width))
        pool = BoxAveragePool(regions.rois, (height, width)) if self.is_comparison_step else gt_pool
        avg_factor = batch.reduce_mean(torch.tensor(float(len(gt_rois)), device=gt_rois.device))
        feature_loss = batch.images.new_zeros((), dtype=torch.float32)
        self.pooled_features = []
        for site, adapter in zip(self.sites, self.adapters, strict=True):
            student = gt_pool([batch.student_features[f"{name}.norm"] for name in site.layer.norms])
            teacher = pool([batch.teacher_features[name] for name in site.layer.norms])
            distances = _compute_l2_distances(adapter(student), teacher[: len(gt_rois)])
            feature_loss = feature_loss + distances.sum() / avg_factor
            if self.is_comparison_step:
                with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
                    self.pooled_features.append(PooledFeatures(teacher, site.compactor.apply_to_vectors(student)))
        return {
            "cdd_feature": self.config.feature * feature_loss,
            "cdd_cls": self.config.cls * self._compute_cls_loss(batch),
        }

    def update_importance(self, layer: int, features: PooledFeatures) -> Tensor:
        """Update the importance of a layer's channels; see `ChannelImportance.update`.

        Args:
            layer: Index of the compactor.
            features: Pooled vectors of the batch.

        Returns:
            bool Tensor[C]: Channels that are unimportant in every comparison of the batch.
        """
        adapter, importance = self.adapters[layer], self.importance[layer]
        assert isinstance(importance, ChannelImportance)
        projection = adapter.weight.detach() if isinstance(adapter, nn.Linear) else None
        return importance.update(features, projection, self.sites[layer].compactor.masked)

    def compute_relative_response(self, layer: int) -> Tensor:
        """Return the mean responses of a layer relative to its remaining channels.

        Args:
            layer: Index of the compactor.

        Returns:
            Tensor[C], comparable between layers.
        """
        importance = self.importance[layer]
        assert isinstance(importance, ChannelImportance)
        return importance.compute_relative_response(self.sites[layer].compactor.masked)

    def clear(self) -> None:
        """Release the features of a step without distillation."""
        self.pooled_features = []

    def _compute_cls_loss(self, batch: DistillationBatch) -> Tensor:
        """T^2 times the score loss at temperature T, so that the gradient does not depend on T (Hinton et al. 2015)."""
        temperature = self.config.temperature
        loss = batch.images.new_zeros((), dtype=torch.float32)
        if self.config.cls == 0:
            return loss
        for student, teacher, avg_factor in comparable_logits(batch):
            pair_loss = temperature**2 * quality_focal_kd_loss(student / temperature, teacher / temperature)
            loss = loss + pair_loss.sum() / batch.reduce_mean(avg_factor)
        return loss


def _check_same_layers(sites: Sequence[CompactorSite], teacher: BaseDetector) -> None:
    teacher_layers = {(layer.conv, layer.norms) for layer in teacher.prunable_layers()}
    for site in sites:
        if (site.layer.conv, site.layer.norms) not in teacher_layers:
            raise UsageError(
                f"--distill cdd: the teacher has no layer {site.layer.conv}. "
                "Omit --model to start from a copy of the teacher."
            )


def _make_adapter(site: CompactorSite, teacher: BaseDetector) -> nn.Module:
    student_channels, teacher_channels = len(site.compactor.masked), _get_teacher_channels(site, teacher)
    if student_channels == teacher_channels:
        return nn.Identity()
    return nn.Linear(student_channels, teacher_channels, bias=False)


def _get_teacher_channels(site: CompactorSite, teacher: BaseDetector) -> int:
    return int(teacher.get_submodule(site.layer.conv).out_channels)  # type: ignore[arg-type]  # a convolution


def _compute_l2_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Euclidean distances [N] of [N, C]; the gradient at distance 0 is 0, not NaN."""
    return torch.linalg.vector_norm(student - teacher, dim=1)
