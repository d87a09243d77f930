"""Running tasks: in this process when alone, else by Dask, in processes of this machine or on a running cluster.

A queue is worked off one task after the other, as many queues at a time as there are workers: Dask gives each task to
whoever is free. Under work stealing each task is a queue of its own, so whoever is free takes the next one.

A worker that dies is started again; its task goes to it or to another, and its queue goes on from there. Dask holds no
more tasks than there are workers, because it counts a death against every task that the dead one had, waiting or not.
"""

import logging
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hkd_det.distill.blockwise.config import Scheduler, make_schedule
from hkd_det.errors import HkdError, UnavailableError

if TYPE_CHECKING:
    from distributed import Client


T = TypeVar("T")


R = TypeVar("R")


OnDone = Callable[[str, R], None]


CONNECT_TIMEOUT_S = 60  # for a running cluster to answer


SINGLE_THREAD_ENV = {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 1}


SINGLE_ARENA_ENV = {
    "MALLOC_ARENA_MAX": 1
}  # glibc gives back what threads other than the first free; a task is in such a one


class BlockError(HkdError):
    """A block could not be learnt."""


@dataclass(frozen=True)
class ExecutorConfig:
    """Who works, and how tasks are shared.

    count: tasks at a time. cluster: a running Dask scheduler's address; its workers count then. retries: how many
    deaths of its worker a task survives; a running cluster has a setting of its own for this.
    """

    num_workers: int
    scheduler: Scheduler
    cluster: str = ""
    retries: int = 3

    @property
    def is_in_process(self) -> bool:
        """Whether this process does all the work."""
        return self.num_workers == 1 and not self.cluster


@dataclass(frozen=True)
class RunStats:
    """How it went: on how many workers; seconds until they were ready; seconds from the first task's start to the
    last one's end."""

    num_workers: int
    startup_s: float
    makespan_s: float


def run_tasks(
    function: Callable[[T], R],
    tasks: Mapping[str, T],
    expected_times: Sequence[float],
    config: ExecutorConfig,
    temp_dir: Path,
    on_done: OnDone[R],
) -> RunStats:
    """Call `function` on every task, and `done` with each name and result as they come.

    expected: times, in any unit, that the schedule is planned with. scratch: a folder for Dask's own files, which go.
    Raises what `function` raises of our own errors, BlockError for all others and for a task whose workers die.
    """
    names, asked = list(tasks), time.monotonic()
    if config.is_in_process:
        for name in names:
            on_done(name, _call_task(function, name, tasks[name]))
        return RunStats(1, 0.0, time.monotonic() - asked)
    with _open_client(config, temp_dir) as (client, count):
        client.run(_import_on_worker, function)
        started = time.monotonic()
        planned = [[names[task] for task in queue] for queue in make_schedule(expected_times, count, config.scheduler)]
        _submit_tasks(client, function, tasks, planned, count, on_done)
        return RunStats(count, started - asked, time.monotonic() - started)


def check_dask_installed(config: ExecutorConfig) -> None:
    """Find out now that workers are asked for who need Dask, and it is not there: UnavailableError."""
    if config.is_in_process:
        return
    try:
        import dask  # noqa: F401, PLC0415 - the extra `cluster`
        import distributed  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{error.name} is not installed; several workers need: pip install 'hkd-det[cluster]'"
        ) from None


def get_worker_index() -> int:
    """Which of this machine's Dask workers runs this code, from 0; 0 outside of Dask and on a running cluster."""
    if "distributed" not in sys.modules:
        return 0
    from distributed import get_worker  # noqa: PLC0415

    try:
        name = get_worker().name
    except ValueError:  # not in a worker
        return 0
    return name if isinstance(name, int) else 0


def _import_on_worker(_function: Callable[[Any], Any]) -> None:
    """Called on every worker: imports all that the function needs, which takes seconds."""


def _call_task(function: Callable[[T], R], name: str, task: T) -> R:
    try:
        return function(task)
    except HkdError:
        raise
    except Exception as error:  # whatever it is, it is told with the block's name
        raise _make_block_error(name, error) from error


def _submit_tasks(
    client: "Client",
    function: Callable[[T], R],
    tasks: Mapping[str, T],
    schedule: Sequence[Sequence[str]],
    num_workers: int,
    on_done: OnDone[R],
) -> None:
    """Keep the first task of `count` queues with Dask until all are done; the first failure stops everything."""
    from distributed import as_completed  # noqa: PLC0415 - needed by those who have several workers only

    waiting = deque(deque(queue) for queue in schedule)
    running: dict[Any, tuple[str, deque[str]]] = {}

    def submit(queue: deque[str]) -> Any:
        name = queue.popleft()
        future = client.submit(_call_task, function, name, tasks[name], pure=False)
        running[future] = (name, queue)
        return future

    completed = as_completed([submit(waiting.popleft()) for _ in range(min(num_workers, len(waiting)))])
    for future in completed:
        name, queue = running.pop(future)
        if future.status != "finished":
            client.cancel(list(running))
            raise _to_hkd_error(name, future.exception() if future.status == "error" else None)
        on_done(name, future.result())
        future.release()  # else Dask would run it again if the worker that holds the result died
        if queue or waiting:
            completed.add(submit(queue or waiting.popleft()))


def _to_hkd_error(name: str, error: BaseException | None) -> HkdError:
    """What went wrong with a task, as one of our errors; None: Dask has lost it."""
    from distributed.scheduler import KilledWorker  # noqa: PLC0415

    if error is None:
        return BlockError(f"block {name}: lost, the Dask scheduler is gone; the same command goes on with what is left")
    if isinstance(error, KilledWorker):
        return BlockError(
            f"block {name}: its worker died {error.allowed_failures + 1} times; if memory ran out, take fewer workers "
            "(distill.blockwise.workers) or a smaller batch (distill.blockwise.batch)"
        )
    return error if isinstance(error, HkdError) else _make_block_error(name, error)


def _make_block_error(name: str, error: BaseException) -> BlockError:
    return BlockError(f"block {name}: {type(error).__name__}: {' '.join(str(error).split())}")


@contextmanager
def _open_client(config: ExecutorConfig, temp_dir: Path) -> "Iterator[tuple[Client, int]]":
    """A client of the cluster, and how many tasks that works on at a time."""
    check_dask_installed(config)
    import dask  # noqa: PLC0415 - the extra `cluster`
    from distributed import Client, LocalCluster  # noqa: PLC0415

    with ExitStack() as stack:
        if config.cluster:
            try:
                client = stack.enter_context(Client(config.cluster, timeout=CONNECT_TIMEOUT_S))
                client.wait_for_workers(1, timeout=CONNECT_TIMEOUT_S)
            except (OSError, ValueError, TimeoutError) as error:
                address = f"distill.blockwise.cluster={config.cluster}"
                raise UnavailableError(f"{address}: no Dask scheduler with workers answers there ({error})") from None
            yield client, sum(client.nthreads().values())
            return
        temp_dir.mkdir(parents=True, exist_ok=True)
        folder = stack.enter_context(tempfile.TemporaryDirectory(".dask", dir=temp_dir, ignore_cleanup_errors=True))
        stack.enter_context(dask.config.set(_make_dask_config(config.retries)))
        cluster = LocalCluster(
            n_workers=config.num_workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # it counts mapped files as memory
            local_directory=folder,
            silence_logs=logging.CRITICAL,
            dashboard_address=None,
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
        )
        client = stack.enter_context(Client(stack.enter_context(cluster)))
        yield client, config.num_workers


def _make_dask_config(retries: int) -> dict[str, Any]:
    return {
        # In the place of Dask's own, which has memory given back after each step and asked for again in the next.
        "distributed.nanny.pre-spawn-environ": SINGLE_THREAD_ENV | SINGLE_ARENA_ENV,
        "distributed.scheduler.allowed-failures": retries,
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.worker.profile.enabled": False,  # it would look at the stack a hundred times a second
    }
