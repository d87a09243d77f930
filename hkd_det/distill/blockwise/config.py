"""Which worker learns which block: three schedules, their makespan by replay, and the bound that none can beat.

round-robin: block i goes to worker i mod N. bin-packing: the longest expected first, each to the worker with the least
to do so far (Graham 1969: at most 4/3 - 1/(3 N) of the best there is). work-stealing: nothing is planned, whoever is
free takes the next one, the longest expected first.

Blockwise: the method's settings, `distill: blockwise:` of a recipe.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hkd_det.errors import UsageError
from hkd_det.models.base import DetectorPart

Scheduler = Literal["round-robin", "bin-packing", "work-stealing"]


def make_schedule(expected_times: Sequence[float], num_workers: int, scheduler: Scheduler) -> list[list[int]]:
    """The tasks, by their index in `expected` times, in the order in which each queue is worked off; no empty queue.

    Under work stealing each task is a queue of its own, in the order in which they are handed out.
    """
    longest_first = sorted(range(len(expected_times)), key=lambda task: (-expected_times[task], task))
    match scheduler:
        case "round-robin":
            return [
                list(range(first, len(expected_times), num_workers))
                for first in range(min(num_workers, len(expected_times)))
            ]
        case "work-stealing":
            return [[task] for task in longest_first]
        case "bin-packing":
            loads = [(0.0, worker) for worker in range(num_workers)]
            packed: list[list[int]] = [[] for _ in range(num_workers)]
            for task in longest_first:
                load, worker = heapq.heappop(loads)
                packed[worker].append(task)
                heapq.heappush(loads, (load + expected_times[task], worker))
            return [queue for queue in packed if queue]


def simulate(
    times: Sequence[float], num_workers: int, scheduler: Scheduler, expected_times: Sequence[float] | None = None
) -> float:
    """Makespan of tasks that take `times`, on equal workers that do nothing else; the unit is that of `times`.

    expected: what the schedule is planned with, where that was not `times` themselves.
    """
    planned = make_schedule(times if expected_times is None else expected_times, num_workers, scheduler)
    free = [0.0] * num_workers  # when each worker will be
    for queue in planned:
        heapq.heapreplace(free, free[0] + sum(times[task] for task in queue))
    return max(free)


def compute_lower_bound(times: Sequence[float], num_workers: int) -> float:
    """No schedule ends before its longest task, or before everybody has worked without a pause."""
    return max(max(times, default=0.0), sum(times) / num_workers)


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
        low = {"min_channels": 1, "num_images": 2, "epochs": 1, "batch": 1, "cache_mib": 0, "workers": 1, "retries": 0}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise UsageError(f"distill.blockwise.{name} = {getattr(self, name)}: must be at least {least}")
        if self.lr <= 0:
            raise UsageError(f"distill.blockwise.lr = {self.lr}: must be above 0")
        if self.cluster and self.workers > 1:
            raise UsageError("distill.blockwise: workers or cluster: a running cluster has its own workers")
        if self.input_source == "student" and (self.workers > 1 or self.cluster):
            raise UsageError(
                "distill.blockwise.input_source=student: each block waits for the one before it, more workers can't help; "
                "leave out distill.blockwise.workers and cluster"
            )
        if self.max_mr_increase < 1 and not self.evaluate_blocks:
            raise UsageError(
                "distill.blockwise.max_mr_increase needs distill.blockwise.evaluate_blocks=true: blocks must be measured"
            )
