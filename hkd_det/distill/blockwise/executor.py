"""Scheduling and running of tasks: in this process, or by Dask in local worker processes or on a running cluster.

The tasks of a queue run one after the other, and as many queues run at a time as there are workers. Dask assigns each
submitted task to a free worker. With work stealing each task is a queue of its own.

A worker process that dies is restarted. Its task runs again on any worker, and its queue continues. At most one task
per worker is submitted to Dask at a time, because Dask counts the death of a worker against all of its tasks, including
those that have not started.
"""

import heapq
import logging
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hkd_det.errors import HkdError, UnavailableError, import_package

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
R = TypeVar("R")

# round-robin: block i goes to worker i mod N. bin-packing: the longest block first, each to the worker with the least
# work (Graham 1969: at most 4/3 - 1/(3 N) times the optimum). work-stealing: a free worker takes the longest
# remaining block.
Scheduler = Literal["round-robin", "bin-packing", "work-stealing"]

OnDone = Callable[[str, R], None]

CONNECT_TIMEOUT_S = 60  # for the connection to a running cluster
SINGLE_THREAD_ENV = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}
# Dask runs a task in a thread other than the main one. With several arenas glibc keeps the memory that it frees.
SINGLE_ARENA_ENV = {"MALLOC_ARENA_MAX": 1}


class BlockError(HkdError):
    """A block could not be trained."""


@dataclass(frozen=True)
class ExecutorConfig:
    """Number and kind of workers.

    Attributes:
        num_workers: Tasks at a time. A running cluster uses the number of its own workers instead.
        scheduler: How tasks are distributed over workers.
        cluster: Address of a running Dask scheduler; "" starts local processes.
        retries: Deaths of its worker that a task survives. A running cluster has a setting of its own.
    """

    num_workers: int
    scheduler: Scheduler
    cluster: str = ""
    retries: int = 3

    @property
    def is_in_process(self) -> bool:
        """Whether all tasks run in this process."""
        return self.num_workers == 1 and not self.cluster


@dataclass(frozen=True)
class RunStats:
    """Timing of a run.

    Attributes:
        num_workers: Number of workers.
        startup_s: Seconds until the workers were ready.
        makespan_s: Seconds from the start of the first task to the end of the last.
    """

    num_workers: int
    startup_s: float
    makespan_s: float


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


def run_tasks(
    function: Callable[[T], R],
    tasks: Mapping[str, T],
    expected_times: Sequence[float],
    config: ExecutorConfig,
    temp_dir: Path,
    on_done: OnDone[R],
) -> RunStats:
    """Call a function on every task.

    Args:
        function: The function. With workers it must be picklable.
        tasks: Tasks by name.
        expected_times: Expected duration of each task, in any unit; used for the schedule.
        config: Number and kind of workers.
        temp_dir: Directory for Dask's temporary files, which are removed at the end.
        on_done: Called with the name and the result of each finished task.

    Returns:
        The timing of the run.

    Raises:
        HkdError: Raised by `function`.
        BlockError: `function` raised another error, or its worker died too often.
        UnavailableError: Dask is not installed, or the cluster is not reachable.
    """
    names, start_time = list(tasks), time.monotonic()
    if config.is_in_process:
        for name in names:
            on_done(name, _call_task(function, name, tasks[name]))
        return RunStats(1, 0.0, time.monotonic() - start_time)
    with _open_client(config, temp_dir) as (client, num_workers):
        client.run(_import_on_worker, function)
        ready_time = time.monotonic()
        schedule = make_schedule(expected_times, num_workers, config.scheduler)
        queues = [[names[task] for task in queue] for queue in schedule]
        _submit_tasks(client, function, tasks, queues, num_workers, on_done)
        return RunStats(num_workers, ready_time - start_time, time.monotonic() - ready_time)


def check_dask_installed(config: ExecutorConfig) -> None:
    """Check early that Dask is installed if the configuration needs it.

    Args:
        config: Number and kind of workers.

    Raises:
        UnavailableError: Several workers or a cluster are requested, but Dask is missing.
    """
    if not config.is_in_process:
        _import_dask()


def get_worker_index() -> int:
    """Return the index of the local Dask worker that runs this code; 0 outside Dask and on a running cluster."""
    if "distributed" not in sys.modules:
        return 0
    try:
        name = sys.modules["distributed"].get_worker().name
    except ValueError:  # not in a worker
        return 0
    return name if isinstance(name, int) else 0


def _import_dask() -> tuple[Any, Any]:
    """Return the modules `dask` and `distributed` of the extra `cluster`."""
    hint = "Several workers require it. Run pip install 'hkd-det[cluster]'."
    return import_package("dask", "dask", hint), import_package("distributed", "distributed", hint)


def _import_on_worker(_function: Callable[[Any], Any]) -> None:
    """Do nothing. Unpickling the argument imports all modules that the function needs, which takes seconds."""


def _call_task(function: Callable[[T], R], name: str, task: T) -> R:
    try:
        return function(task)
    except HkdError:
        raise
    except Exception as error:  # any error gets the name of its block
        raise _make_block_error(name, error) from error


def _submit_tasks(
    client: "Client",
    function: Callable[[T], R],
    tasks: Mapping[str, T],
    queues: Sequence[Sequence[str]],
    num_workers: int,
    on_done: OnDone[R],
) -> None:
    """Submit the next task of `num_workers` queues at a time until all are done. The first failure ends the run."""
    _, distributed = _import_dask()
    waiting = deque(deque(queue) for queue in queues)
    running: dict[Any, tuple[str, deque[str]]] = {}

    def submit(queue: deque[str]) -> Any:
        name = queue.popleft()
        future = client.submit(_call_task, function, name, tasks[name], pure=False)
        running[future] = (name, queue)
        return future

    completed = distributed.as_completed([submit(waiting.popleft()) for _ in range(min(num_workers, len(waiting)))])
    for future in completed:
        if future.status in ("pending", "lost"):  # the worker that held the result died; Dask runs the task again
            completed.add(future)
            continue
        name, queue = running.pop(future)
        if future.status != "finished":
            client.cancel(list(running))
            raise _to_hkd_error(name, future.exception() if future.status == "error" else None)
        on_done(name, future.result())
        future.release()  # otherwise Dask repeats the task if the worker that holds the result dies
        if queue or waiting:
            completed.add(submit(queue or waiting.popleft()))


def _to_hkd_error(name: str, error: BaseException | None) -> HkdError:
    """Convert the error of a failed task; None means that Dask lost the task."""
    _, distributed = _import_dask()
    if error is None:
        return BlockError(
            f"block {name}: the connection to the Dask scheduler is lost. Run the same command to train the rest."
        )
    if isinstance(error, distributed.KilledWorker):
        return BlockError(
            f"block {name}: its worker died {error.allowed_failures + 1} times. If it ran out of memory, reduce "
            "distill.blockwise.workers or distill.blockwise.batch."
        )
    return error if isinstance(error, HkdError) else _make_block_error(name, error)


def _make_block_error(name: str, error: BaseException) -> BlockError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return BlockError(f"block {name}: {reason}. Run the same command to train the rest.")


@contextmanager
def _open_client(config: ExecutorConfig, temp_dir: Path) -> "Iterator[tuple[Client, int]]":
    """Yield a client of the running or a new local cluster, and the number of tasks that it runs at a time."""
    dask, distributed = _import_dask()
    with ExitStack() as stack:
        if config.cluster:
            try:
                client = stack.enter_context(distributed.Client(config.cluster, timeout=CONNECT_TIMEOUT_S))
                client.wait_for_workers(1, timeout=CONNECT_TIMEOUT_S)
            except (OSError, ValueError, TimeoutError) as error:
                raise UnavailableError(
                    f"distill.blockwise.cluster={config.cluster}: no Dask scheduler with workers responds ({error}). "
                    "Start `dask scheduler` and `dask worker`, or unset distill.blockwise.cluster."
                ) from None
            yield client, sum(client.nthreads().values())
            return
        temp_dir.mkdir(parents=True, exist_ok=True)
        folder = stack.enter_context(tempfile.TemporaryDirectory(".dask", dir=temp_dir, ignore_cleanup_errors=True))
        stack.enter_context(dask.config.set(_make_dask_config(config.retries)))
        cluster = distributed.LocalCluster(
            n_workers=config.num_workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # a limit would count mapped files as memory
            local_directory=folder,
            silence_logs=logging.CRITICAL,
            dashboard_address=None,
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
        )
        client = stack.enter_context(distributed.Client(stack.enter_context(cluster)))
        yield client, config.num_workers


def _make_dask_config(retries: int) -> dict[str, Any]:
    return {
        # Replaces Dask's own environment, which returns memory after each step and requests it again in the next.
        "distributed.nanny.pre-spawn-environ": SINGLE_THREAD_ENV | SINGLE_ARENA_ENV,
        "distributed.scheduler.allowed-failures": retries,
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.worker.profile.enabled": False,  # it samples the call stack 100 times per second
    }
