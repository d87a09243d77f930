"""The shape of the detector that a run trains: it stays, or it shrinks while it learns."""

from typing import Protocol

from hkd_det.distill.capacity.ledger import ChannelCostModel
from hkd_det.distill.capacity.shrinking import ChannelPruner, PruningSchedule, prepare_student
from hkd_det.distill.distiller import DistillationLoss
from hkd_det.models.family import BaseDetector
from hkd_det.train.config import TrainConfig
from hkd_det.train.processes import DistributedContext
from hkd_det.train.schedule import no_aug_start_epoch


class TrainHook(Protocol):
    """What is done to the detector's shape between backward passes and steps."""

    @property
    def target_reached(self) -> bool:
        """Whether the detector has the shape that was asked for."""

    def before_step(self, step: int) -> None:
        """Before a step, counted over the whole run."""

    def after_backward(self, step: int) -> dict[str, float]:
        """After the backward pass of the same step; returns figures to log."""

    def after_step(self) -> None:
        """After the optimizer's step."""

    def deployable_model(self, detector: BaseDetector) -> BaseDetector:
        """The plain network of the detector or its moving average, as it is judged and saved."""

    def summary(self) -> str:
        """What has become of the shape, to go behind the run's result."""


class NoOpHook:
    """The shape it began with."""

    target_reached = True

    def before_step(self, _step: int) -> None:
        """Nothing."""

    def after_backward(self, _step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def after_step(self) -> None:
        """Nothing."""

    def deployable_model(self, detector: BaseDetector) -> BaseDetector:
        """The detector itself."""
        return detector

    def summary(self) -> str:
        """Nothing."""
        return ""


def prepare_pruning(detector: BaseDetector, config: TrainConfig) -> ChannelCostModel | None:
    """Put in place, before training, what a student needs to shrink; None where it is not to."""
    settings = config.distill.cdd
    return prepare_student(detector, settings, config.imgsz_hw, config.model) if settings else None


def build_train_hook(
    config: TrainConfig,
    cost_model: ChannelCostModel | None,
    distillation_loss: DistillationLoss | None,
    steps_per_epoch: int,
    dist_context: DistributedContext,
) -> TrainHook:
    """The run's; `ledger` from `prepare`, `steps` an epoch."""
    settings = config.distill.cdd
    if settings is None or cost_model is None or distillation_loss is None or distillation_loss.cdd is None:
        return NoOpHook()
    taught = no_aug_start_epoch(config.epochs, config.no_aug_ratio) / config.epochs
    course = PruningSchedule.from_config(settings, config.epochs * steps_per_epoch, taught)
    return ChannelPruner(distillation_loss.cdd, cost_model, settings, course, dist_context.all_gather)
