"""One process per run directory; Ctrl-C, killed loader processes and exhausted memory in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hkd_det.errors import HkdError, UsageError
from hkd_det.train.cli import main
from hkd_det.train.run import LOCK_NAME, explain_run_errors, handle_interrupts, lock_run, make_loader_error

FLAGS = ["--model", "mini-student", "--imgsz", "96x64", "--batch", "4", "--device", "cpu"]
HOLD_LOCK = """
import sys, time
from pathlib import Path
from hkd_det.train.run import lock_run
with lock_run(Path(sys.argv[1]), True):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_second_run_in_a_directory_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match=f"process {process.pid} on .* trains in this directory"):
            lock_run(tmp_path, True).__enter__()
        with lock_run(tmp_path, False):
            pass
        process.kill()
    with lock_run(tmp_path, True):  # a kill releases the lock
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_locked_directory_ends_hkd_train_in_one_line(
    data_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(data_yaml), *FLAGS, "--workers", "0", "--project", str(tmp_path), "--name", "run"]
    with lock_run(tmp_path / "run", True):
        assert main(flags) == 2
    error = capsys.readouterr().err
    assert "trains in this directory. Wait for its end, or choose another --name." in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", "killed, usually because memory ran out"),
        ("DataLoader worker (pid(s) 12) exited unexpectedly", "killed, usually because memory ran out"),
        ("unable to write to file </torch_12_3>: No space left on device (28)", "shared memory is full"),
    ],
)
def test_loader_error_is_explained(text: str, message: str) -> None:
    error = make_loader_error(RuntimeError(text), 2)
    assert error is not None and str(error).startswith("--workers 2: ") and message in str(error)


def test_other_runtime_error_is_not_explained() -> None:
    assert make_loader_error(RuntimeError("shapes differ"), 2) is None


def test_exhausted_gpu_memory_names_the_batch() -> None:
    with pytest.raises(HkdError, match="--batch 64: the GPU memory does not suffice"), explain_run_errors(64, 2):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def test_handlers_are_restored_without_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    with handle_interrupts():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


INTERRUPTED = """
import os, signal, sys
from hkd_det.errors import run_command
from hkd_det.train.run import handle_interrupts

def run(argv):
    try:
        with handle_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for _ in range(int(sys.argv[1])):
            os.kill(os.getpid(), signal.SIGINT)
        print("closed", flush=True)

code = run_command("hkd-train", run, [])
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_more", "errors", "output"),
    [
        (0, ["hkd-train: interrupted"], "closed\n"),
        (1, ["hkd-train: stopping takes a few seconds. Press Ctrl-C again to end at once.", "hkd-train: interrupted"],
         "closed\n"),
        (2, ["hkd-train: stopping takes a few seconds. Press Ctrl-C again to end at once."], ""),
    ],
)  # fmt: skip
def test_repeated_interrupts_print_no_traceback(num_more: int, errors: list[str], output: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(num_more)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines(), done.stdout) == (130, errors, output)


def start_run(data_yaml: Path, tmp_path: Path) -> "subprocess.Popen[str]":
    """Start a long run with two loader processes, and wait for its first epoch."""
    command = [sys.executable, "-m", "hkd_det.train.cli", "--data", str(data_yaml), *FLAGS, "--epochs", "500"]
    command += ["--workers", "2", "--project", str(tmp_path), "--name", "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 180
    while not (tmp_path / "run" / "results.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_killed_loader_process_ends_in_one_line(data_yaml: Path, tmp_path: Path) -> None:
    process = start_run(data_yaml, tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    loaders = [pid for pid in children if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(loaders[0]), signal.SIGKILL)
    error = process.communicate(timeout=120)[1]
    lines = error.splitlines()
    assert process.returncode == 1, error
    assert [line.partition(".")[0] for line in lines] == [
        "hkd-train: the finished epochs are saved",
        "hkd-train: --workers 2: a process that loads images was killed, usually because memory ran out",
    ], error


@pytest.mark.slow
def test_two_interrupts_of_a_run_print_no_traceback(data_yaml: Path, tmp_path: Path) -> None:
    process = start_run(data_yaml, tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "Traceback" not in error and "--resume" in error and len(error.splitlines()) <= 3
