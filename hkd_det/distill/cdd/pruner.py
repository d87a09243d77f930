"""Channel pruning during training: which channels are masked, when, and how they fade."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hkd_det.distill.cdd.compactor import (
    apply_proximal_step,
    compute_group_lasso,
    find_prunable_layers,
    fuse_compactors,
    insert_compactors,
    reset_gradient,
)
from hkd_det.distill.cdd.importance import ChannelCostModel, PooledFeatures, filter_deployed_layers
from hkd_det.distill.cdd.losses import CDDConfig, CDDLoss
from hkd_det.errors import UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.models.zoo import ModelComplexity

# Collects the (teacher, student) vectors of all layers from every process; equal in all processes.
AllGather = Callable[[list[tuple[Tensor, Tensor]]], list[list[tuple[Tensor, Tensor]]]]

MIN_COMPARISONS = 32  # comparison steps before all channels are selected, if the run has that many steps


@dataclass(frozen=True)
class PruningSchedule:
    """When channels are masked and when they have faded. Times are ratios of all steps.

    Attributes:
        total_steps: Steps of the run.
        start: No channel is masked before.
        end: All channels to remove are masked.
        fade_end: All masked channels have faded to 0.
        compare_interval: Steps between two comparisons.
    """

    total_steps: int
    start: float
    end: float
    fade_end: float
    compare_interval: int = 1

    @classmethod
    def from_config(cls, config: CDDConfig, total_steps: int, distill_ratio: float) -> "PruningSchedule":
        """Build the schedule of a run.

        The interval of the configuration is reduced in short runs, to get at least `MIN_COMPARISONS` comparisons.

        Args:
            config: Settings of the method.
            total_steps: Steps of the run.
            distill_ratio: Ratio of the steps that have distillation.

        Returns:
            The schedule.

        Raises:
            UsageError: Distillation ends before the warmup.
        """
        end = config.mask_end * distill_ratio
        if config.warmup_ratio >= end:
            raise UsageError(
                f"distill.cdd: distillation covers {100 * distill_ratio:.0f} % of this run, too short to select "
                f"channels after warmup_ratio={config.warmup_ratio:.2f}. Reduce no_distill_ratio or train more epochs."
            )
        max_interval = max(1, int((end - config.warmup_ratio) * total_steps) // MIN_COMPARISONS)
        compare_interval = min(config.compare_interval, max_interval)
        return cls(total_steps, config.warmup_ratio, end, min(1.0, end + config.fade_ratio), compare_interval)

    def remaining_excess(self, progress: float) -> float:
        """Return the part of the cost to remove that may still be present.

        Args:
            progress: Finished ratio of the run.

        Returns:
            1 before `start`, falling linearly to 0 at `end`.
        """
        return 1 - min(1.0, max(0.0, (progress - self.start) / (self.end - self.start)))

    def is_comparison_step(self, step: int) -> bool:
        """Return whether channels are compared in a step. It depends on the step alone, so a resumed run agrees.

        Args:
            step: Index of the step, from 0.
        """
        return step % self.compare_interval == 0 or (step + 1) / self.total_steps >= self.end


def prepare_pruning(
    detector: BaseDetector, config: CDDConfig, imgsz_hw: tuple[int, int], model_name: str
) -> ChannelCostModel:
    """Insert compactors into a student, in place.

    Args:
        detector: The student.
        config: Settings of the method.
        imgsz_hw: Input height and width, pixels.
        model_name: Name of the student for messages.

    Returns:
        The cost model of the prunable layers.

    Raises:
        UsageError: The student has no prunable layer, or too few channels to reach the target.
    """
    layers = filter_deployed_layers(detector, find_prunable_layers(detector), imgsz_hw)
    if not layers:
        raise UsageError(f"--distill cdd: {model_name} has no prunable layer. Choose another model.")
    cost_model = ChannelCostModel(detector, layers, imgsz_hw)
    initial = cost_model.initial_complexity
    smallest = cost_model.compute_complexity([config.get_min_width(width) for width in cost_model.widths])
    for key, keep, unit, min_keep in (
        ("keep_flops", config.keep_flops, "FLOPs", smallest.flops / initial.flops),
        ("keep_parameters", config.keep_parameters, "parameters", smallest.num_params / initial.num_params),
    ):
        if min_keep > keep:
            raise UsageError(
                f"distill.cdd.{key}={keep:g}: pruning the inner layers of {model_name} keeps at least {min_keep:.3f} "
                f"of its {unit}. Set a larger value."
            )
    insert_compactors(detector, layers)
    return cost_model


class ChannelPruner:
    """Masks channels and fades them, between the backward pass and the optimizer step, and after it.

    All state is in the compactors and in `method`, and is saved with them.

    Args:
        method: The distillation method of the student.
        cost_model: Cost model of the student's prunable layers.
        config: Settings of the method.
        schedule: When channels are masked.
        all_gather: Collects values from all processes.
    """

    def __init__(
        self,
        method: CDDLoss,
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
        """Complexity of the student without its masked channels."""
        return self.cost_model.compute_complexity([int((~compactor.masked).sum()) for compactor in self.compactors])

    @property
    def target_reached(self) -> bool:
        """Whether the target is met and all masked channels have faded, so that fusing does not change the outputs."""
        return self._is_within_budget(0.0) and all(compactor.is_faded for compactor in self.compactors)

    def before_step(self, step: int) -> None:
        """Set whether the forward pass of a step records the vectors for a comparison.

        Args:
            step: Index of the step, from 0.
        """
        self.method.is_comparison_step = self.schedule.is_comparison_step(step) and not self._is_within_budget(0.0)

    @torch.no_grad()
    def after_backward(self, step: int) -> dict[str, float]:
        """Mask channels if this is a comparison step, and reset the gradients of the compactors.

        Args:
            step: Index of the step, from 0.

        Returns:
            The weighted group lasso under the key "cdd_lasso".
        """
        self._progress = (step + 1) / self.schedule.total_steps
        if self.method.is_comparison_step:
            unimportant = self._update_importance()
            remaining_excess = self.schedule.remaining_excess(self._progress)
            if self._progress > self.schedule.start and not self._is_within_budget(remaining_excess):
                self._mask_channels(unimportant, remaining_excess)
        for compactor in self.compactors:
            gradient = compactor.weight.grad
            if gradient is not None:
                rows = compactor.rows
                reset = reset_gradient(gradient.flatten(1), rows, compactor.masked, self.config.lasso)
                gradient.copy_(reset.view_as(gradient))
        self._previous_rows = [compactor.rows.clone() for compactor in self.compactors]
        lasso = torch.stack([compute_group_lasso(rows) for rows in self._previous_rows]).sum()
        return {"cdd_lasso": self.config.lasso * float(lasso)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Set masked rows to the result of the lasso alone. This discards momentum of earlier gradients."""
        threshold = 1 / max(1.0, self.config.fade_ratio * self.schedule.total_steps)
        if self._progress >= self.schedule.fade_end:
            threshold = float("inf")
        for compactor, previous_rows in zip(self.compactors, self._previous_rows, strict=True):
            masked = compactor.masked[:, None]
            rows = torch.where(masked, apply_proximal_step(previous_rows, threshold), compactor.rows)
            compactor.weight.copy_(rows.view_as(compactor.weight))

    def deployable_model(self, detector: BaseDetector) -> BaseDetector:
        """Return the student, or its moving average, without compactors and masked channels.

        Args:
            detector: A network with compactors.

        Returns:
            A new network in evaluation mode.
        """
        return fuse_compactors(detector)

    def summary(self) -> str:
        """Return the change of parameters and FLOPs as text for the log."""
        before, after = self.cost_model.initial_complexity, self.complexity
        return (
            f"; pruned: {before.num_params / 1e6:.2f} M to {after.num_params / 1e6:.2f} M parameters, "
            f"{before.flops / 1e9:.2f} to {after.flops / 1e9:.2f} GFLOPs ({100 * after.flops / before.flops:.1f} %)"
        )

    def _update_importance(self) -> list[Tensor]:
        """Update every layer with the vectors of all processes; return its unimportant channels (bool [C])."""
        vectors_per_process = self._all_gather(
            [(features.teacher, features.student) for features in self.method.pooled_features]
        )
        unimportant = []
        for layer, compactor in enumerate(self.compactors):
            vectors = [layers[layer] for layers in vectors_per_process if layers]
            channels = torch.zeros_like(compactor.masked)
            if vectors:
                device = channels.device
                parts = [PooledFeatures(teacher.to(device), student.to(device)) for teacher, student in vectors]
                channels = self.method.update_importance(layer, PooledFeatures.concatenate(parts))
            unimportant.append(channels)
        return unimportant

    def _mask_channels(self, unimportant: list[Tensor], remaining_excess: float) -> None:
        """Mask channels in order of importance until the schedule's budget is met."""
        masks = [compactor.masked.cpu() for compactor in self.compactors]
        min_widths = [self.config.get_min_width(width) for width in self.cost_model.widths]
        widths = [int((~mask).sum()) for mask in masks]
        for layer, channel in self._rank_channels(unimportant):
            if self._meets_budget(self.cost_model.compute_complexity(widths), remaining_excess):
                break
            if widths[layer] > min_widths[layer]:
                masks[layer][channel] = True
                widths[layer] -= 1
        for compactor, mask in zip(self.compactors, masks, strict=True):
            compactor.masked.copy_(mask)

    def _rank_channels(self, unimportant: list[Tensor]) -> list[tuple[int, int]]:
        """Return (layer, channel) of all unmasked channels: unimportant ones first, then by their score."""
        ranked = []
        divisors = self._compute_divisors()
        for layer, (compactor, channels) in enumerate(zip(self.compactors, unimportant, strict=True)):
            scores = self.method.compute_relative_response(layer) / divisors[layer]
            # Whole lists: reading single values would synchronize with a GPU thousands of times per step.
            columns = (values.tolist() for values in (compactor.masked, channels, scores))
            ranked += [
                (not is_unimportant, score, layer, channel)
                for channel, (masked, is_unimportant, score) in enumerate(zip(*columns, strict=True))
                if not masked
            ]
        return [(layer, channel) for _, _, layer, channel in sorted(ranked)]

    def _compute_divisors(self) -> list[float]:
        """Return the divisor of the relative responses of each layer.

        A relative response is the channel's share of the responses of its layer times the number of channels. Divided
        by that number and by the cost of one channel, it is the share per cost. The cost is a fraction of the network:
        the sum of the saved FLOPs and parameters, each only while it exceeds its target.
        """
        if self.config.ranking == "response":
            return [1.0] * len(self.compactors)
        initial, current = self.cost_model.initial_complexity, self.complexity
        weight_params = float(current.num_params > self.config.keep_parameters * initial.num_params)
        weight_flops = float(current.flops > self.config.keep_flops * initial.flops)
        widths = [int((~compactor.masked).sum()) for compactor in self.compactors]
        return [
            width * (weight_params * params / initial.num_params + weight_flops * flops / initial.flops)
            for width, (params, flops) in zip(widths, self.cost_model.compute_savings(widths), strict=True)
        ]

    def _is_within_budget(self, remaining_excess: float) -> bool:
        return self._meets_budget(self.complexity, remaining_excess)

    def _meets_budget(self, complexity: ModelComplexity, remaining_excess: float) -> bool:
        """Return whether a complexity is at most the target plus `remaining_excess` of the cost above the target."""
        initial, config = self.cost_model.initial_complexity, self.config
        return all(
            cost <= (keep + (1 - keep) * remaining_excess) * initial_cost
            for cost, keep, initial_cost in (
                (complexity.flops, config.keep_flops, initial.flops),
                (complexity.num_params, config.keep_parameters, initial.num_params),
            )
        )
