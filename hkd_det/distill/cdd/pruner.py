"""Shrinking: which channels a capacity-dynamic student sheds, when, and how they fade."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hkd_det.distill.cdd.compactor import (
    find_prunable_layers,
    fuse_compactors,
    group_lasso,
    insert_compactors,
    proximal_step,
    reset_gradient,
)
from hkd_det.distill.cdd.config import CDDConfig
from hkd_det.distill.cdd.cost_model import ChannelCostModel, filter_deployed_layers
from hkd_det.distill.cdd.importance import PooledFeatures
from hkd_det.distill.cdd.method import CDD
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.models.zoo import ModelComplexity

AllGather = Callable[[list[tuple[Tensor, Tensor]]], list[list[tuple[Tensor, Tensor]]]]


"""One process's vectors to those of all processes, the same in each."""


MIN_COMPARISONS = 32  # comparisons at least, of which channels are chosen by; fewer if there are fewer steps


@dataclass(frozen=True)
class PruningSchedule:
    """The schedule in shares of all steps: no masking before `start`, all masked at `end`, all faded at `gone`.

    every: steps from one comparison to the next: the settings', fewer where a short run would choose by less than
    `LOOKS` of them.
    """

    total_steps: int
    start: float
    end: float
    fade_end: float
    compare_interval: int = 1

    @classmethod
    def from_config(cls, config: CDDConfig, total_steps: int, distill_ratio: float) -> "PruningSchedule":
        """Of a run whose teacher teaches for a share `taught` of its steps; UsageError if that is too short."""
        end = config.mask_end * distill_ratio
        if config.warmup_ratio >= end:
            raise UsageError(
                f"distill.cdd: the teacher teaches for {100 * distill_ratio:.0f} % of this run, too short for channels to be "
                f"chosen after warmup_ratio={config.warmup_ratio:.2f}; a smaller no_aug_ratio, or more epochs"
            )
        every = min(config.compare_interval, max(1, int((end - config.warmup_ratio) * total_steps) // MIN_COMPARISONS))
        return cls(total_steps, config.warmup_ratio, end, min(1.0, end + config.fade_ratio), every)

    def remaining_excess(self, progress: float) -> float:
        """1 .. 0: the part of what is to be shed that may still be there."""
        return 1 - min(1.0, max(0.0, (progress - self.start) / (self.end - self.start)))

    def is_comparison_step(self, step: int) -> bool:
        """Whether step 0 .. steps - 1 is one of comparison, if anything is left to choose: a resumed run's, too."""
        return step % self.compare_interval == 0 or (step + 1) / self.total_steps >= self.end


def prepare_student(
    detector: BaseDetector, config: CDDConfig, imgsz_hw: tuple[int, int], model_name: str
) -> ChannelCostModel:
    """Put compactors into the detector, in place; UsageError if its layers hold too little for the target."""
    layers = filter_deployed_layers(detector, find_prunable_layers(detector), imgsz_hw)
    if not layers:
        raise UsageError(f"--distill cdd: {model_name} has no layer inside a block whose channels could be taken out")
    ledger = ChannelCostModel(detector, layers, imgsz_hw)
    least = ledger.compute_complexity([min(width, config.min_channels) for width in ledger.widths])
    for what in ("flops", "parameters"):
        field = "num_params" if what == "parameters" else what
        asked, held = getattr(config, f"keep_{what}"), getattr(least, field) / getattr(ledger.initial_complexity, field)
        if held > asked:
            raise UsageError(
                f"distill.cdd.keep_{what}={asked:g}: the channels inside {model_name}'s blocks hold too little, at least "
                f"{held:.3f} of its {what} stay; ask for more than that"
            )
    insert_compactors(detector, layers)
    return ledger


class ChannelPruner:
    """Steers the student's compactors between the backward pass and the optimizer's step, and after it.

    All that it remembers lies in the compactors and in `terms`, so that it is saved with them.
    """

    def __init__(
        self,
        method: CDD,
        cost_model: ChannelCostModel,
        config: CDDConfig,
        schedule: PruningSchedule,
        all_gather: AllGather,
    ) -> None:
        self.method, self.cost_model, self.config, self.schedule = method, cost_model, config, schedule
        self.compactors = [site.compactor for site in method.sites]
        self._all_gather = all_gather
        self._previous_rows: list[Tensor] = []
        self._progress = 0.0

    @property
    def complexity(self) -> ModelComplexity:
        """Of the student without its masked channels."""
        return self.cost_model.compute_complexity([int((~compactor.masked).sum()) for compactor in self.compactors])

    @property
    def target_reached(self) -> bool:
        """Whether the target is reached and all that is masked has faded, so that folding changes nothing."""
        return self._is_within_budget(0.0) and all(compactor.is_faded for compactor in self.compactors)

    def before_step(self, step: int) -> None:
        """Say whether the lesson of step 0 .. steps - 1 is to show what channels are chosen by."""
        self.method.is_comparison_step = self.schedule.is_comparison_step(step) and not self._is_within_budget(0.0)

    @torch.no_grad()
    def after_backward(self, step: int) -> dict[str, float]:
        """Choose channels, if this step shows them, and reset gradients; the lasso's value comes back."""
        self._progress = (step + 1) / self.schedule.total_steps
        if self.method.is_comparison_step:
            unanimous = self._update_importance()
            surplus = self.schedule.remaining_excess(self._progress)
            if self._progress > self.schedule.start and not self._is_within_budget(surplus):
                self._mask_channels(unanimous, surplus)
        for compactor in self.compactors:
            gradient = compactor.weight.grad
            if gradient is not None:
                rows = compactor.rows
                reset = reset_gradient(gradient.flatten(1), rows, compactor.masked, self.config.lasso)
                gradient.copy_(reset.view_as(gradient))
        self._previous_rows = [compactor.rows.clone() for compactor in self.compactors]
        total = torch.stack([group_lasso(rows) for rows in self._previous_rows]).sum()
        return {"cdd_lasso": self.config.lasso * float(total)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Put masked rows where the lasso alone takes them, whatever the optimizer remembers of earlier gradients."""
        force = 1 / max(1.0, self.config.fade_ratio * self.schedule.total_steps)
        if self._progress >= self.schedule.fade_end:
            force = float("inf")
        for compactor, before in zip(self.compactors, self._previous_rows, strict=True):
            masked = compactor.masked[:, None]
            rows = torch.where(masked, proximal_step(before, force), compactor.rows)
            compactor.weight.copy_(rows.view_as(compactor.weight))

    def deployable_model(self, detector: BaseDetector) -> BaseDetector:
        """The plain network that the student, or its moving average, has become."""
        return fuse_compactors(detector)

    def summary(self) -> str:
        """What was shed, in a line."""
        before, after = self.cost_model.initial_complexity, self.complexity
        return (
            f"; shed: {before.num_params / 1e6:.2f} M to {after.num_params / 1e6:.2f} M parameters, "
            f"{before.flops / 1e9:.2f} to {after.flops / 1e9:.2f} GFLOPs ({100 * after.flops / before.flops:.1f} %)"
        )

    def _update_importance(self) -> list[Tensor]:
        """For each layer [C] bool, what all people of the batch agree on; each process looks at everybody's people."""
        batches = self._all_gather([(seen.teacher, seen.student) for seen in self.method.pooled_features])
        unanimous = []
        for layer, compactor in enumerate(self.compactors):
            parts = [batch[layer] for batch in batches if batch]
            agreed = torch.zeros_like(compactor.masked)
            if parts:
                device = agreed.device
                teacher, student = (torch.cat([part[who].to(device) for part in parts]) for who in (0, 1))
                agreed = self.method.update_importance(layer, PooledFeatures(teacher, student))
            unanimous.append(agreed)
        return unanimous

    def _mask_channels(self, unanimous: list[Tensor], remaining_excess: float) -> None:
        """Mask until the course is kept: first those that all agree on, then those of least relative response."""
        masks = [compactor.masked.cpu() for compactor in self.compactors]
        widths = [int((~mask).sum()) for mask in masks]
        for layer, channel in self._rank_channels(unanimous):
            if self._meets_budget(self.cost_model.compute_complexity(widths), remaining_excess):
                break
            if widths[layer] > self.config.min_channels:
                masks[layer][channel] = True
                widths[layer] -= 1
        for compactor, mask in zip(self.compactors, masks, strict=True):
            compactor.masked.copy_(mask)

    def _rank_channels(self, unanimous: list[Tensor]) -> list[tuple[int, int]]:
        """Layer and channel of all that are not masked, in the order in which they may go."""
        ranked = []
        for layer, (compactor, agreed) in enumerate(zip(self.compactors, unanimous, strict=True)):
            # As lists at once: number by number, a GPU would be waited for thousands of times a step.
            columns = (
                values.tolist() for values in (compactor.masked, agreed, self.method.compute_relative_response(layer))
            )
            ranked += [
                (not unneeded, response, layer, channel)
                for channel, (masked, unneeded, response) in enumerate(zip(*columns, strict=True))
                if not masked
            ]
        return [(layer, channel) for _, _, layer, channel in sorted(ranked)]

    def _is_within_budget(self, remaining_excess: float) -> bool:
        return self._meets_budget(self.complexity, remaining_excess)

    def _meets_budget(self, complexity: ModelComplexity, remaining_excess: float) -> bool:
        """Whether a cost is down to the target and the given part of what was above it."""
        start, settings = self.cost_model.initial_complexity, self.config
        return all(
            now <= (keep + (1 - keep) * remaining_excess) * whole
            for now, keep, whole in (
                (complexity.flops, settings.keep_flops, start.flops),
                (complexity.num_params, settings.keep_parameters, start.num_params),
            )
        )
