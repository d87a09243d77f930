"""Start of a worker process, its progress and its result."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from hkd_bench.worker import ERROR_CLASSES, WorkerJob, WorkerResult
from hkd_det.console import Progress
from hkd_det.errors import UnavailableError


def run_worker(job: WorkerJob, work_dir: Path, progress: Progress) -> WorkerResult:
    """Run one worker process.

    Args:
        job: Work of the process.
        work_dir: Directory for the files of the job and its result.
        progress: Progress bar of the finished runs.

    Returns:
        The result.

    Raises:
        HkdError: The worker raised it.
        UnavailableError: The process ended without result.
        KeyboardInterrupt: Ctrl-C, except in a sustained run that has started.
    """
    job_path, out_path, log_path = work_dir / "job.json", work_dir / "out.json", work_dir / "worker.log"
    job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    out_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "hkd_bench.worker", str(job_path), str(out_path)]
    with log_path.open("wb") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as worker:
        try:
            _forward_progress(worker, progress)
        except KeyboardInterrupt:
            if not job.sustained_s:
                worker.kill()
                raise
            worker.send_signal(signal.SIGINT)  # the terminal sends it to both processes, `kill` to one
            _wait_for_end(worker)
            if not out_path.exists():
                raise
        except BaseException:
            worker.kill()
            raise
    if not out_path.exists():
        raise UnavailableError(_format_worker_error(job.model, worker.returncode, log_path))
    content = json.loads(out_path.read_text(encoding="utf-8"))
    if "error" in content:
        raise ERROR_CLASSES[content["error"]](content["message"])
    return WorkerResult(**content["result"])


def _forward_progress(worker: subprocess.Popen[str], progress: Progress) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        progress.update(int(line) if line.strip().isdigit() else 0)  # libraries may print other lines


def _wait_for_end(worker: subprocess.Popen[str]) -> None:
    """Wait until an interrupted worker has written its result; a second Ctrl-C kills it."""
    try:
        worker.communicate()
    except BaseException:
        worker.kill()
        raise


def _format_worker_error(model: str, returncode: int, log_path: Path) -> str:
    """Describe why a worker process ended without a result."""
    lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if returncode == -9:
        return f"{model}: the worker process was killed (signal 9), probably for lack of memory. Close other programs."
    reason = lines[-1].removesuffix(".") if lines else "no message"
    return f"{model}: the worker process ended with exit code {returncode}: {reason}. Check the model with hkd-demo."
