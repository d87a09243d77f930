"""Protection of a run: one process per directory, Ctrl-C, and one-line errors for memory and loader processes."""

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

import torch

from hkd_det.errors import HkdError, UsageError

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
