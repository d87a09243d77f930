"""Settings of capacity-dynamic distillation (CDD)."""

from dataclasses import dataclass

from hkd_det.errors import UsageError


@dataclass(frozen=True)
class CDDConfig:
    """Settings of CDD: the target size, the losses and the schedule.

    Attributes:
        keep_flops: Maximum ratio of the FLOPs to keep, above 0 to 1; 1 sets no limit.
        keep_parameters: Maximum ratio of the parameters to keep, above 0 to 1; 1 sets no limit.
        min_channels: Minimum number of channels of each layer; a narrower layer is not pruned.
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
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"distill.cdd.{name}: {getattr(self, name)} is out of range. Use above 0 to 1.")
        if self.keep_flops == self.keep_parameters == 1:
            raise UsageError("distill.cdd: nothing to prune. Set keep_flops or keep_parameters below 1.")
        for name in ("min_channels", "queue_size", "num_neighbors", "compare_interval"):
            if getattr(self, name) < 1:
                raise UsageError(f"distill.cdd.{name}: {getattr(self, name)} is out of range. Use at least 1.")
        if self.temperature <= 0 or min(self.cls, self.feature, self.lasso) < 0:
            raise UsageError("distill.cdd: temperature must be above 0; cls, feature and lasso must be at least 0.")
        if not 0 <= self.warmup_ratio < self.mask_end:
            raise UsageError(
                f"distill.cdd.warmup_ratio: {self.warmup_ratio} is out of range. "
                f"Use 0 to below mask_end ({self.mask_end})."
            )
