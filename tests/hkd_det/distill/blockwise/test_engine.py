"""Running tasks: alone, on Dask's workers, on workers that are really killed.

What runs on workers is defined inside the tests, so that it travels with the task.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hkd_det.distill.blockwise import executor as engine
from hkd_det.distill.blockwise.executor import BlockError, ExecutorConfig, run_tasks
from hkd_det.errors import DataError, UnavailableError

NAMES = ("a", "b", "c", "d", "e")


def run(
    function: Callable[[str], str], folder: Path, workers: ExecutorConfig
) -> tuple[dict[str, str], engine.RunStats]:
    """Tasks a to e, whose values are their names; a is the longest."""
    done: dict[str, str] = {}
    ran = run_tasks(function, {name: name for name in NAMES}, [5, 4, 3, 2, 1], workers, folder, done.__setitem__)
    return done, ran


def nothing_is_left(folder: Path) -> bool:
    children = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    # Python's own watch over what processes share lives as long as the process that first needed it.
    return not list(folder.glob("*.dask")) and all("resource_tracker" in child for child in children)


def test_alone_in_this_process_in_order(tmp_path: Path) -> None:
    pids: list[int] = []
    done, ran = run(lambda name: pids.append(os.getpid()) or name.upper(), tmp_path, ExecutorConfig(1, "bin-packing"))  # type: ignore[func-returns-value]
    assert done == {name: name.upper() for name in NAMES} and list(done) == list(NAMES)
    assert set(pids) == {os.getpid()} and (ran.num_workers, ran.startup_s) == (1, 0.0)
    assert not list(tmp_path.iterdir())


def test_what_goes_wrong_is_told_with_the_blocks_name(tmp_path: Path) -> None:
    def fails(name: str) -> str:
        if name == "b":
            raise DataError("as it is")
        raise ValueError("two\nlines")

    with pytest.raises(BlockError, match=r"^block a: ValueError: two lines$"):
        run(fails, tmp_path, ExecutorConfig(1, "round-robin"))
    with pytest.raises(DataError, match=r"^as it is$"):
        run_tasks(fails, {"b": "b"}, [1], ExecutorConfig(1, "round-robin"), tmp_path, lambda *_: None)


@pytest.mark.parametrize("missing", ["dask", "distributed"])
def test_without_dask_several_workers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UnavailableError, match=rf"^{missing} is not installed; .*pip install 'hkd-det\[cluster\]'$"):
        run(str.upper, tmp_path, ExecutorConfig(2, "bin-packing"))
    assert run(str.upper, tmp_path, ExecutorConfig(1, "bin-packing"))[0]["a"] == "A"


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["round-robin", "work-stealing"])
def test_a_killed_worker_costs_its_task_a_retry_and_nothing_else(tmp_path: Path, scheduler: str) -> None:
    log = tmp_path / "log"
    log.mkdir()

    def dies_once(name: str) -> str:
        with (log / name).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if name == "b" and len((log / name).read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return name.upper()

    done, ran = run(dies_once, tmp_path / "scratch", ExecutorConfig(2, scheduler, retries=1))  # type: ignore[arg-type]
    assert done == {name: name.upper() for name in NAMES} and ran.num_workers == 2
    starts = {name: len((log / name).read_text().splitlines()) for name in NAMES}
    assert starts == {"a": 1, "b": 2, "c": 1, "d": 1, "e": 1}
    pids = {pid for name in NAMES for pid in (log / name).read_text().split()}
    assert str(os.getpid()) not in pids and len(pids) >= 2
    assert nothing_is_left(tmp_path / "scratch")


@pytest.mark.slow
def test_a_task_that_keeps_killing_ends_in_one_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    starts = tmp_path / "starts"

    def dies(name: str) -> str:
        if name == "c":
            with starts.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    done: list[str] = []
    tasks = {name: name for name in ("a", "c")}
    with pytest.raises(BlockError, match=r"^block c: its worker died 2 times; .*distill\.blockwise\.workers"):
        run_tasks(
            dies,
            tasks,
            [1, 9],
            ExecutorConfig(2, "bin-packing", retries=1),
            tmp_path,
            lambda name, _: done.append(name),
        )
    assert starts.read_text() == "xx" and done == ["a"]
    assert nothing_is_left(tmp_path)
    out, err = capfd.readouterr()
    assert not out and "Traceback" not in err and "KilledWorker" not in err


@pytest.mark.slow
def test_a_running_cluster_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    nowhere = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    quiet = {"silence_logs": 50, "dashboard_address": None, "scheduler_kwargs": nowhere}
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, **quiet) as cluster:  # type: ignore[no-untyped-call]
        done, ran = run(str.upper, tmp_path, ExecutorConfig(1, "work-stealing", cluster.scheduler_address))
        assert done == {name: name.upper() for name in NAMES} and ran.num_workers == 2

        def fails(_name: str) -> str:
            raise ZeroDivisionError("over there")

        with pytest.raises(BlockError, match=r"^block [a-z]: ZeroDivisionError: over there$"):
            run(fails, tmp_path, ExecutorConfig(1, "bin-packing", cluster.scheduler_address))
    monkeypatch.setattr(engine, "PATIENCE_S", 0.3)
    with pytest.raises(UnavailableError, match="no Dask scheduler with workers answers there"):
        run(str.upper, tmp_path, ExecutorConfig(1, "bin-packing", "tcp://127.0.0.1:9"))
