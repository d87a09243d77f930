"""Capacity-dynamic distillation (CDD, Xie et al., CVPR 2023, arXiv 2303.09230): a student that is pruned in training.

A compactor W, a 1x1 convolution with rows W_i, follows each prunable layer. The losses are the sum over layers of
||A s - t||, with pooled person features s and t and an adapter A, a score loss, and the group lasso lambda sum ||W_i||.
Channels with a small response |t s| / ||s|| are masked. Their gradient is lambda W_i / ||W_i|| (gradient resetting), so
that their rows shrink to 0. At the end the compactors are fused into the convolutions.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hkd_det.distill.base import DistillMethod, RunContext
from hkd_det.distill.batch import DistillationBatch
from hkd_det.distill.cdd.losses import CDDConfig, CDDLoss
from hkd_det.distill.cdd.pruner import ChannelPruner, PruningSchedule, prepare_pruning
from hkd_det.models.base import BaseDetector
from hkd_det.models.feature_layers import LayerPairs


class CDD(DistillMethod):
    """Prunes channels of the student during distillation, starting from a copy of the teacher.

    Args:
        config: Settings.
        student: Detector to train, without compactors.
        teacher: Teacher of the same family.

    Attributes:
        losses: Losses and channel importance; set by `setup`.
        pruner: Selects and fades the channels; set by `setup`.
    """

    Config = CDDConfig
    requires = frozenset({"features", "logits", "same_architecture"})
    conflicts = frozenset({"blockwise"})
    student_source = "teacher"
    clone_student_features = False  # a compactor follows each recorded layer, and it does not work in place

    losses: CDDLoss
    pruner: ChannelPruner

    def __init__(self, config: CDDConfig, student: BaseDetector, teacher: Any) -> None:
        super().__init__(config, student, teacher)
        self._networks = (student, teacher)  # a tuple, so that they are not submodules

    @classmethod
    def resolve_config(cls, config: CDDConfig, methods: Mapping[str, Any]) -> CDDConfig:
        """Disable the score loss if HKD is used, which contains it.

        Args:
            config: Settings of CDD.
            methods: Settings of all methods of the run, by name.

        Returns:
            The settings to use.
        """
        return replace(config, cls=0.0) if "hkd" in methods else config

    def setup(self, context: RunContext) -> None:
        """Insert compactors into the student, and build losses and pruner.

        Args:
            context: Input size, schedule and processes of the run.

        Raises:
            UsageError: The student cannot become small enough, or distillation covers too few steps.
        """
        student, teacher = self._networks
        cost_model = prepare_pruning(student, self.config, context.imgsz_hw, context.model)
        self.losses = CDDLoss(student, teacher, self.config)
        schedule = PruningSchedule.from_config(self.config, context.total_steps, context.distill_ratio)
        self.pruner = ChannelPruner(self.losses, cost_model, self.config, schedule, context.all_gather)

    def feature_layers(self) -> LayerPairs:
        """Return the normalization layers before each compactor."""
        return self.losses.layers

    def forward(self, batch: DistillationBatch) -> dict[str, Tensor]:
        """Compute the weighted losses `cdd_feature` and `cdd_cls`, scalars."""
        losses: dict[str, Tensor] = self.losses(batch)
        return losses

    def before_step(self, step: int) -> None:
        """Decide whether this step compares channels."""
        self.pruner.before_step(step)

    def after_backward(self, step: int) -> dict[str, float]:
        """Select channels and reset the gradients of selected ones; return the value of the lasso."""
        return self.pruner.after_backward(step)

    def after_step(self) -> None:
        """Fade selected channels."""
        self.pruner.after_step()

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """Return the compactors: only the lasso shortens their rows."""
        return [site.compactor.weight for site in self.losses.sites]

    def clear(self) -> None:
        """Release recorded features."""
        self.losses.clear()

    def deployable_model(self, model: BaseDetector) -> BaseDetector:
        """Return the plain network without compactors and faded channels."""
        return self.pruner.deployable_model(model)

    @property
    def target_reached(self) -> bool:
        """Whether the student meets the target and all selected channels have faded."""
        return self.pruner.target_reached

    def summary(self) -> str:
        """Return parameters and FLOPs before and after pruning."""
        return self.pruner.summary()
