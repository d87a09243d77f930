"""Blockwise: the method's settings, `distill: blockwise:` of a recipe."""

from dataclasses import dataclass
from typing import Literal

from hkd_det.distill.blockwise.schedule import Scheduler
from hkd_det.errors import UsageError
from hkd_det.models.parts import DetectorPart

InputSource = Literal["teacher", "student"]


@dataclass(frozen=True)
class BlockwiseConfig:
    """What is replaced, how each block learns, and who works.

    parts: of the detector, whose 3x3 convolutions are replaced. least: channels, in and out, from which one is.
    views: training views that all blocks learn from; an eighth of them is kept to measure with.
    epochs, batch, lr: of each block's own training on them.
    inputs: what enters a block that learns: the teacher's activations, so that all blocks can learn at once; or, as a
    control, those of the student, in which the blocks before it are replaced: one after the other, by one worker.
    cache_mib: room in the run's folder for the teacher's activations; what does not fit is computed anew in each step.

    workers: tasks at a time; 1 works in this process, more in others, by Dask. scheduler: how tasks are shared.
    cluster: address of a running Dask scheduler, "tcp://host:port", whose workers are taken instead; they must see the
    run's folder under the same path. times: `report.json` of an earlier run, whose measured times are planned with;
    "" estimates them. retries: how many deaths of its worker a task survives.

    judge: measure each block, alone in the teacher, on the validation split. limit: by how much it may then raise the
    miss rate (fraction); a block above stays out.
    """

    parts: tuple[DetectorPart, ...] = ("backbone",)
    min_channels: int = 16
    num_images: int = 512
    epochs: int = 8
    batch: int = 16
    lr: float = 2e-3
    input_source: InputSource = "teacher"
    cache_mib: int = 8192
    workers: int = 1
    scheduler: Scheduler = "bin-packing"
    cluster: str = ""
    timing_report: str = ""
    retries: int = 3
    evaluate_blocks: bool = False
    max_mr_increase: float = 1.0

    def __post_init__(self) -> None:
        low = {"least": 1, "views": 2, "epochs": 1, "batch": 1, "cache_mib": 0, "workers": 1, "retries": 0}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise UsageError(f"distill.blockwise.{name} = {getattr(self, name)}: must be at least {least}")
        if self.lr <= 0:
            raise UsageError(f"distill.blockwise.lr = {self.lr}: must be above 0")
        if self.cluster and self.workers > 1:
            raise UsageError("distill.blockwise: workers or cluster: a running cluster has its own workers")
        if self.input_source == "student" and (self.workers > 1 or self.cluster):
            raise UsageError(
                "distill.blockwise.inputs=student: each block waits for the one before it, more workers can't help; "
                "leave out distill.blockwise.workers and cluster"
            )
        if self.max_mr_increase < 1 and not self.evaluate_blocks:
            raise UsageError("distill.blockwise.limit needs distill.blockwise.judge=true: blocks must be measured")
