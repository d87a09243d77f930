"""Which worker learns which block: three schedules, their makespan by replay, and the bound that none can beat.

round-robin: block i goes to worker i mod N. bin-packing: the longest expected first, each to the worker with the least
to do so far (Graham 1969: at most 4/3 - 1/(3 N) of the best there is). work-stealing: nothing is planned, whoever is
free takes the next one, the longest expected first.
"""

import heapq
from collections.abc import Sequence
from typing import Literal

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
