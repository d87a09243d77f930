"""Settings of capacity-dynamic distillation (CDD)."""

from dataclasses import dataclass

from hkd_det.errors import UsageError


@dataclass(frozen=True)
class CDDConfig:
    """How far the student shrinks, by when, and what its teacher asks of it meanwhile.

    keep_flops, keep_parameters: shares of the starting network's that may be left, both of them; 1 sets no limit.
    least: channels that every layer keeps, if it has so many.
    score: weight of the score logits' term. temperature: of both networks' scores in it.
    feature: weight of the distance of pooled people, summed over layers. lasso: weight of the compactor rows' norms.

    warmup: share of the schedule before any channel is taken. masked_by: share of the part in which the teacher
    teaches, by whose end all have been chosen. fade: share of the schedule in which a chosen channel goes from 1 to 0.
    gallery: pooled teacher vectors remembered a layer. neighbours: of them, how many a person is compared with.
    lowest: share of a layer's channels that a comparison marks, those that have gone among them.
    look_every: steps from one comparison to the next, at most; see `Course.every`. The paper compares in each.
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
                raise UsageError(f"distill.cdd.{name} = {getattr(self, name)}: a share, above 0 and at most 1")
        if self.keep_flops == self.keep_parameters == 1:
            raise UsageError("distill.cdd: keep_flops or keep_parameters must be below 1, or there is nothing to shed")
        for name, least in {"min_channels": 1, "queue_size": 1, "num_neighbors": 1, "compare_interval": 1}.items():
            if getattr(self, name) < least:
                raise UsageError(f"distill.cdd.{name} = {getattr(self, name)}: must be at least {least}")
        if self.temperature <= 0 or min(self.cls, self.feature, self.lasso) < 0:
            raise UsageError("distill.cdd: the temperature is above 0, and cls, feature and lasso are not negative")
        if not 0 <= self.warmup_ratio < self.mask_end:
            raise UsageError(
                f"distill.cdd.warmup_ratio = {self.warmup_ratio}: from 0 to below mask_end = {self.mask_end}"
            )
