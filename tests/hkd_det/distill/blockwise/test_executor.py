"""Executor: in this process, on local Dask workers that are killed, and on a running cluster.

Functions for workers are defined inside the tests, so that they are pickled with the task.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hkd_det.distill.blockwise import executor
from hkd_det.distill.blockwise.executor import BlockError, ExecutorConfig, RunStats, run_tasks
from hkd_det.errors import DataError, UnavailableError

NAMES = ("a", "b", "c", "d", "e")


def run_five_tasks(
    function: Callable[[str], str], folder: Path, config: ExecutorConfig
) -> tuple[dict[str, str], RunStats]:
    """Run tasks a to e, whose values are their names; a is the longest."""
    results: dict[str, str] = {}
    stats = run_tasks(function, {name: name for name in NAMES}, [5, 4, 3, 2, 1], config, folder, results.__setitem__)
    return results, stats


def wait_for_file(path: Path) -> None:
    """Wait until the first result is reported. A worker that dies earlier can take that result with it."""
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def is_cleaned_up(folder: Path) -> bool:
    children = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    # Python's resource tracker runs until this process ends.
    return not list(folder.glob("*.dask")) and all("resource_tracker" in child for child in children)


def test_one_worker_runs_in_process_in_order(tmp_path: Path) -> None:
    pids: list[int] = []
    results, stats = run_five_tasks(
        lambda name: pids.append(os.getpid()) or name.upper(), tmp_path, ExecutorConfig(1, "bin-packing")
    )  # type: ignore[func-returns-value]  # append returns None on purpose
    assert results == {name: name.upper() for name in NAMES} and list(results) == list(NAMES)
    assert set(pids) == {os.getpid()} and (stats.num_workers, stats.startup_s) == (1, 0.0)
    assert not list(tmp_path.iterdir())


def test_error_names_the_block(tmp_path: Path) -> None:
    def raise_error(name: str) -> str:
        if name == "b":
            raise DataError("unchanged")
        raise ValueError("two\nlines")

    with pytest.raises(BlockError, match=r"^block a: ValueError: two lines\. Run the same command"):
        run_five_tasks(raise_error, tmp_path, ExecutorConfig(1, "round-robin"))
    with pytest.raises(DataError, match=r"^unchanged$"):
        run_tasks(raise_error, {"b": "b"}, [1], ExecutorConfig(1, "round-robin"), tmp_path, lambda *_: None)


@pytest.mark.parametrize("missing", ["dask", "distributed"])
def test_workers_without_dask_raise_unavailable_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UnavailableError, match=rf"^{missing}: not installed\. .*pip install 'hkd-det\[cluster\]'\.$"):
        run_five_tasks(str.upper, tmp_path, ExecutorConfig(2, "bin-packing"))
    assert run_five_tasks(str.upper, tmp_path, ExecutorConfig(1, "bin-packing"))[0]["a"] == "A"


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["round-robin", "work-stealing"])
def test_killed_worker_repeats_only_its_task(tmp_path: Path, scheduler: str) -> None:
    log, reported = tmp_path / "log", tmp_path / "reported"
    log.mkdir()

    def kill_worker_once(name: str) -> str:
        with (log / name).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if name == "b" and len((log / name).read_text().splitlines()) == 1:
            wait_for_file(reported)
            os.kill(os.getpid(), signal.SIGKILL)
        return name.upper()

    results: dict[str, str] = {}

    def on_done(name: str, result: str) -> None:
        results[name] = result
        reported.touch()

    config = ExecutorConfig(2, scheduler, retries=1)  # type: ignore[arg-type]  # parametrized as str
    stats = run_tasks(
        kill_worker_once, {name: name for name in NAMES}, [5, 4, 3, 2, 1], config, tmp_path / "scratch", on_done
    )
    assert results == {name: name.upper() for name in NAMES} and stats.num_workers == 2
    starts = {name: len((log / name).read_text().splitlines()) for name in NAMES}
    assert starts == {"a": 1, "b": 2, "c": 1, "d": 1, "e": 1}
    pids = {pid for name in NAMES for pid in (log / name).read_text().split()}
    assert str(os.getpid()) not in pids and len(pids) >= 2
    assert is_cleaned_up(tmp_path / "scratch")


@pytest.mark.slow
def test_task_that_kills_every_worker_raises_one_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    starts, reported = tmp_path / "starts", tmp_path / "reported"

    def kill_worker(name: str) -> str:
        if name == "c":
            wait_for_file(reported)
            with starts.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    finished: list[str] = []

    def on_done(name: str, _result: str) -> None:
        finished.append(name)
        reported.touch()

    tasks = {name: name for name in ("a", "c")}
    with pytest.raises(BlockError, match=r"^block c: its worker died 2 times\. .*distill\.blockwise\.workers"):
        run_tasks(
            kill_worker,
            tasks,
            [1, 9],
            ExecutorConfig(2, "bin-packing", retries=1),
            tmp_path,
            on_done,
        )
    assert starts.read_text() == "xx" and finished == ["a"]
    assert is_cleaned_up(tmp_path)
    out, err = capfd.readouterr()
    assert not out and "Traceback" not in err and "KilledWorker" not in err


@pytest.mark.slow
def test_tasks_run_on_a_running_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    scheduler_options = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    options = {"silence_logs": 50, "dashboard_address": None, "scheduler_kwargs": scheduler_options}
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, **options) as cluster:  # type: ignore[no-untyped-call]  # untyped in distributed
        results, stats = run_five_tasks(
            str.upper, tmp_path, ExecutorConfig(1, "work-stealing", cluster.scheduler_address)
        )
        assert results == {name: name.upper() for name in NAMES} and stats.num_workers == 2

        def raise_error(_name: str) -> str:
            raise ZeroDivisionError("on the worker")

        with pytest.raises(BlockError, match=r"^block [a-z]: ZeroDivisionError: on the worker\. "):
            run_five_tasks(raise_error, tmp_path, ExecutorConfig(1, "bin-packing", cluster.scheduler_address))
    monkeypatch.setattr(executor, "CONNECT_TIMEOUT_S", 0.3)
    with pytest.raises(UnavailableError, match="no Dask scheduler with workers responds"):
        run_five_tasks(str.upper, tmp_path, ExecutorConfig(1, "bin-packing", "tcp://127.0.0.1:9"))
