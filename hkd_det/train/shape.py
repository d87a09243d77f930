"""The shape of the detector that a run trains: it stays, or it shrinks while it learns."""

from typing import Protocol

from hkd_det.distill.capacity.ledger import Ledger
from hkd_det.distill.capacity.shrinking import Course, Shrinking, begin
from hkd_det.distill.distiller import Distiller
from hkd_det.models.family import PersonDetector
from hkd_det.train.config import TrainConfig
from hkd_det.train.processes import Processes
from hkd_det.train.schedule import plain_from


class Shape(Protocol):
    """What is done to the detector's shape between backward passes and steps."""

    @property
    def met(self) -> bool:
        """Whether the detector has the shape that was asked for."""

    def before_forward(self, step: int) -> None:
        """Before a step, counted over the whole run."""

    def after_backward(self, step: int) -> dict[str, float]:
        """After the backward pass of the same step; returns figures to log."""

    def after_step(self) -> None:
        """After the optimizer's step."""

    def deployed(self, detector: PersonDetector) -> PersonDetector:
        """The plain network of the detector or its moving average, as it is judged and saved."""

    def told(self) -> str:
        """What has become of the shape, to go behind the run's result."""


class Unchanged:
    """The shape it began with."""

    met = True

    def before_forward(self, _step: int) -> None:
        """Nothing."""

    def after_backward(self, _step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def after_step(self) -> None:
        """Nothing."""

    def deployed(self, detector: PersonDetector) -> PersonDetector:
        """The detector itself."""
        return detector

    def told(self) -> str:
        """Nothing."""
        return ""


def prepare(detector: PersonDetector, config: TrainConfig) -> Ledger | None:
    """Put in place, before training, what a student needs to shrink; None where it is not to."""
    settings = config.distill.cdd
    return begin(detector, settings, config.imgsz_hw, config.model) if settings else None


def shape_of(
    config: TrainConfig, ledger: Ledger | None, distiller: Distiller | None, steps: int, processes: Processes
) -> Shape:
    """The run's; `ledger` from `prepare`, `steps` an epoch."""
    settings = config.distill.cdd
    if settings is None or ledger is None or distiller is None or distiller.capacity is None:
        return Unchanged()
    taught = plain_from(config.epochs, config.finale) / config.epochs
    course = Course.of(settings, config.epochs * steps, taught)
    return Shrinking(distiller.capacity, ledger, settings, course, processes.everyones)
