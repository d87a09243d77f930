"""Settings of blockwise distillation, and the schedules that assign blocks to workers."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hkd_det.config import check_range
from hkd_det.errors import UsageError
from hkd_det.models.base import DetectorPart

# round-robin: block i goes to worker i mod N. bin-packing: the longest block first, each to the worker with the least
# work (Graham 1969: at most 4/3 - 1/(3 N) times the optimum). work-stealing: a free worker takes the longest
# remaining block.
Scheduler = Literal["round-robin", "bin-packing", "work-stealing"]

InputSource = Literal["teacher", "student"]


@dataclass(frozen=True)
class BlockwiseConfig:
    """Settings of blockwise distillation.

    Attributes:
        parts: Parts of the detector whose 3x3 convolutions are replaced.
        min_channels: Minimum number of input and output channels of a replaced convolution.
        num_images: Number of augmented training images for all blocks. An eighth of them is held out to measure errors.
        epochs: Epochs of each block.
        batch: Batch size of each block.
        lr: Learning rate of each block.
        input_source: "teacher": a block is trained on the teacher's activations, so that all blocks are independent.
            "student": on those of a network with all earlier blocks replaced, one after the other (control experiment).
        cache_mib: Disk space in the run directory for activations, MiB. The others are computed again in each step.
        workers: Number of parallel tasks. 1 runs in this process; more use Dask.
        scheduler: Assignment of blocks to workers.
        cluster: Address of a running Dask scheduler, "tcp://host:port", instead of local workers. Its workers must see
            the run directory under the same path.
        timing_report: `report.json` of an earlier run whose times plan the schedule; "" estimates them from FLOPs.
        retries: Number of worker crashes that a task survives.
        evaluate_blocks: Whether to measure the miss rate with each block alone.
        max_mr_increase: Maximum increase of the miss rate by a block, fraction. Blocks above it are left out.
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
        for name in ("min_channels", "epochs", "batch", "workers"):
            check_range(f"distill.blockwise.{name}", getattr(self, name), 1)
        for name in ("cache_mib", "retries"):
            check_range(f"distill.blockwise.{name}", getattr(self, name), 0)
        check_range("distill.blockwise.num_images", self.num_images, 2)
        check_range("distill.blockwise.lr", self.lr, 0, is_open=True)
        if self.cluster and self.workers > 1:
            raise UsageError(
                "distill.blockwise.workers: has no effect with cluster, which has workers of its own. Omit one."
            )
        if self.input_source == "student" and (self.workers > 1 or self.cluster):
            raise UsageError(
                "distill.blockwise.input_source=student: each block depends on the blocks before it. "
                "Omit distill.blockwise.workers and cluster."
            )
        if self.max_mr_increase < 1 and not self.evaluate_blocks:
            raise UsageError(
                "distill.blockwise.max_mr_increase: the blocks are not measured. "
                "Set distill.blockwise.evaluate_blocks=true."
            )


def make_schedule(expected_times: Sequence[float], num_workers: int, scheduler: Scheduler) -> list[list[int]]:
    """Assign tasks to queues.

    Args:
        expected_times: Expected time of each task, any unit.
        num_workers: Number of workers.
        scheduler: Rule of assignment.

    Returns:
        Non-empty queues of task indices, in the order of execution. With "work-stealing" each task is its own queue.
    """
    longest_first = sorted(range(len(expected_times)), key=lambda task: (-expected_times[task], task))
    match scheduler:
        case "round-robin":
            num_queues = min(num_workers, len(expected_times))
            return [list(range(first, len(expected_times), num_workers)) for first in range(num_queues)]
        case "work-stealing":
            return [[task] for task in longest_first]
        case "bin-packing":
            loads = [(0.0, worker) for worker in range(num_workers)]
            queues: list[list[int]] = [[] for _ in range(num_workers)]
            for task in longest_first:
                load, worker = heapq.heappop(loads)
                queues[worker].append(task)
                heapq.heappush(loads, (load + expected_times[task], worker))
            return [queue for queue in queues if queue]


def simulate(
    times: Sequence[float], num_workers: int, scheduler: Scheduler, expected_times: Sequence[float] | None = None
) -> float:
    """Compute the makespan of tasks on equal workers without other work.

    Args:
        times: Actual time of each task.
        num_workers: Number of workers.
        scheduler: Rule of assignment.
        expected_times: Times that plan the schedule; `times` by default.

    Returns:
        Makespan in the unit of `times`.
    """
    queues = make_schedule(times if expected_times is None else expected_times, num_workers, scheduler)
    finish_times = [0.0] * num_workers
    for queue in queues:
        heapq.heapreplace(finish_times, finish_times[0] + sum(times[task] for task in queue))
    return max(finish_times)


def compute_lower_bound(times: Sequence[float], num_workers: int) -> float:
    """Return the lower bound of every makespan: the longest task, or all work divided by the number of workers.

    Args:
        times: Time of each task.
        num_workers: Number of workers.
    """
    return max(max(times, default=0.0), sum(times) / num_workers)
