"""A run as a process and a directory: its lock, its interruption, its error messages, and its files after each epoch.

`last.pt` continues a run exactly.
"""

import fcntl
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from hkd_det.errors import DataError, HkdError, UsageError
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import (
    DetectorCheckpoint,
    load_training_state,
    save_detector_checkpoint,
    save_training_state,
)
from hkd_det.train.config import TrainConfig
from hkd_det.train.history import EpochRecord, RunResults, find_best_record, write_history

if TYPE_CHECKING:
    from hkd_det.train.trainer import Trainer

LOCK_NAME = ".lock"


@contextmanager
def lock_run(directory: Path, is_main_process: bool) -> Iterator[None]:
    """Hold the lock of a run directory. The operating system releases it when the process ends, also by a kill.

    Args:
        directory: Directory of the run; created if missing, and removed if the run writes nothing.
        is_main_process: False for processes that write no files: they take no lock.

    Raises:
        UsageError: Another process trains in the directory.
    """
    if not is_main_process:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK_NAME).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UsageError(
                f"{directory}: {owner} trains in this directory. Wait for its end, or choose another --name."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            if [path.name for path in directory.iterdir()] == [LOCK_NAME]:  # a run that failed before it wrote a file
                (directory / LOCK_NAME).unlink()
                directory.rmdir()


@contextmanager
def handle_interrupts() -> Iterator[None]:
    """Stop orderly at the first Ctrl-C, explain the second, and end the process at the third.

    After an interruption the handlers stay: loader processes and open files are closed after the context, and a second
    Ctrl-C would print tracebacks there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, _handle_first_interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _handle_first_interrupt:
            signal.signal(signal.SIGINT, previous)


def _handle_first_interrupt(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _handle_second_interrupt)
    raise KeyboardInterrupt


def _handle_second_interrupt(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _handle_third_interrupt)
    # os.write: a handler can interrupt another write to the same stream.
    os.write(2, b"hkd-train: stopping takes a few seconds. Press Ctrl-C again to end at once.\n")


def _handle_third_interrupt(_signal: int, _frame: FrameType | None) -> None:
    sys.stderr.flush()
    os._exit(130)


@contextmanager
def explain_run_errors(batch: int, workers: int) -> Iterator[None]:
    """Report exhausted memory and killed loader processes as one line.

    torch reports a killed process from a signal handler, at any place of the main process.

    Args:
        batch: Images per step, for the message.
        workers: Number of loader processes, for the message.

    Raises:
        HkdError: The memory of the GPU or of the machine does not suffice, or a loader process was killed.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise HkdError(
            f"--batch {batch}: the GPU memory does not suffice. Use a smaller --batch or --imgsz, or --batch auto."
        ) from None
    except RuntimeError as error:
        explained = make_loader_error(error, workers)
        if explained is None:
            raise
        raise explained from None
    except MemoryError:
        raise HkdError(f"--batch {batch}: the memory does not suffice. Use a smaller --batch or --imgsz.") from None


def make_loader_error(error: RuntimeError, workers: int) -> HkdError | None:
    """Return a one-line error for a loader process that was killed, or None for another error.

    Args:
        error: Error that the data loader raised.
        workers: Number of loader processes.
    """
    text = " ".join(str(error).split())
    if "shared memory" in text or "/torch_" in text:
        return HkdError(
            f"--workers {workers}: the shared memory is full. Use --workers 0, or enlarge /dev/shm "
            "(docker run --shm-size 8g)."
        )
    if "DataLoader worker" in text and ("killed" in text or "exited" in text):
        return HkdError(
            f"--workers {workers}: a process that loads images was killed, usually because memory ran out. "
            "Use fewer --workers or a smaller --batch."
        )
    return None


def save_epoch(trainer: "Trainer", record: EpochRecord, detector: BaseDetector) -> bool:
    """Save the best checkpoint first, then the last: a kill between them repeats the epoch with the same best.

    Args:
        trainer: State after the epoch, with `record` in its history.
        record: Results of the epoch.
        detector: Deployable detector of the epoch.

    Returns:
        Whether the epoch is the best so far.
    """
    config = trainer.config
    is_best = record.meets_target and find_best_record(trainer.history) is record
    if is_best:
        best = DetectorCheckpoint.from_detector(
            detector, config.model, config.as_dict(), record.epoch, record.miss_rate
        )
        save_detector_checkpoint(config.save_path / "best.pt", best)
    state = {
        "config": config.as_dict(),
        "distiller": trainer.distiller.state_dict(),
        "ema": trainer.ema.module.state_dict(),
        "ema_updates": trainer.ema.num_updates,
        "optimizer": trainer.optimizer.state_dict(),
        "balancer": trainer.balancer.state_dict(),
        "history": [past.as_dict() for past in trainer.history],
        "teacher_sha256": trainer.teacher_sha256,
        "results": trainer.results.as_dict(),
    }
    save_training_state(config.save_path / "last.pt", state)
    write_history(config.save_path / "results.csv", trainer.history)
    return is_best


def load_epoch(trainer: "Trainer", path: Path) -> None:
    """Restore the state after the last finished epoch.

    Args:
        trainer: A new trainer of the same run.
        path: `last.pt` of the run.

    Raises:
        DataError: If the file belongs to another run.
    """
    config = trainer.config
    state = load_training_state(path)
    saved = TrainConfig.from_dict(state["config"])
    if saved.model != config.model:
        raise DataError(f"{path}: expected a run of {config.model}, got {saved.model}. Start a new run.")
    if saved.distill != config.distill:
        raise DataError(
            f"{path}: the run has other settings under distill. Use those in its config.yaml, or start a new run."
        )
    if state.get("teacher_sha256", trainer.teacher_sha256) != trainer.teacher_sha256:
        raise DataError(
            f"{path}: the teacher {config.teacher} has changed since. Restore that file, or start a new run."
        )
    try:
        trainer.distiller.load_state_dict(state["distiller"])
        trainer.ema.module.load_state_dict(state["ema"])
        trainer.ema.num_updates = state["ema_updates"]
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.balancer.load_state_dict(state["balancer"])
        trainer.history = [EpochRecord(**record) for record in state["history"]]
        trainer.results = RunResults.from_dict(state.get("results", {}))
    except (KeyError, TypeError, RuntimeError) as error:  # missing keys, unknown keys, other shapes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise DataError(
            f"{path}: does not fit this run ({reason}). Another version of hkd-det wrote it, or --weights or "
            "--teacher has changed. Start a new run."
        ) from error
