"""Memory, threads and open files of `hkd-demo` over time, for a camera that fails again and again.

    python benchmarks/studies/live_stability.py rtsp://127.0.0.1:8554/cam --minutes 30

`hkd-demo` runs as a process with `--events`. Its state is read from /proc every 10 s (Linux). A row is the largest
value of a tenth of the time: they stay the same if nothing leaks. "connections" is how often the camera came back.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hkd_det.console import format_table

COMMAND = "import sys; from hkd_deploy.demo.cli import main; sys.exit(main())"
NUM_ROWS = 10


@dataclass(frozen=True)
class Sample:
    """State of the process.

    Args:
        time_s: Time since the start, seconds.
        memory_mb: Resident memory, MB.
        num_threads: Threads.
        num_files: Open file descriptors.
        num_frames: Frame events so far.
        num_connections: How often the status of the camera became `ok`.
    """

    time_s: float
    memory_mb: float
    num_threads: int
    num_files: int
    num_frames: int
    num_connections: int


def main() -> None:
    """Run `hkd-demo` and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="address of the camera")
    parser.add_argument("--model", default="hkd-cpu", help="as for hkd-demo (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30, help="duration (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=10, help="seconds between samples (default: %(default)s)")
    parser.add_argument("--log", type=Path, default=Path("/dev/null"), help="file for the log of hkd-demo")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, flags.log.open("w", encoding="utf-8") as log:
        events = Path(directory) / "events.jsonl"
        command = [sys.executable, "-c", COMMAND, flags.model, "--source", flags.source, "--events", str(events)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            samples = take_samples(process, events, flags.minutes * 60, flags.interval)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(30)
    print(format_samples(samples))
    print(f"{len(samples)} samples, exit code after SIGTERM: {code}")


def take_samples(process: subprocess.Popen[bytes], events: Path, duration_s: float, interval_s: float) -> list[Sample]:
    """Read the state of a process until the time is over.

    Args:
        process: The process.
        events: File of its events.
        duration_s: Duration, seconds.
        interval_s: Time between samples, seconds.

    Returns:
        The samples.

    Raises:
        RuntimeError: The process ended.
    """
    samples: list[Sample] = []
    start_s, num_frames, num_connections = time.monotonic(), 0, 0
    while not events.exists():
        time.sleep(0.1)
    with events.open(encoding="utf-8") as file:
        while (elapsed_s := time.monotonic() - start_s) < duration_s:
            time.sleep(max(0.0, (len(samples) + 1) * interval_s - elapsed_s))
            if process.poll() is not None:
                raise RuntimeError(f"hkd-demo ended with code {process.returncode}.")
            for line in iter(file.readline, ""):
                event = json.loads(line) if line.endswith("\n") else {}
                num_frames += event.get("event") == "frame"
                num_connections += event.get("event") == "status" and event["status"] == "ok"
            samples.append(read_sample(process.pid, time.monotonic() - start_s, num_frames, num_connections))
    return samples


def read_sample(pid: int, time_s: float, num_frames: int, num_connections: int) -> Sample:
    """Read memory, threads and open files of a process.

    Args:
        pid: The process.
        time_s: Time since the start, seconds.
        num_frames: Frame events so far.
        num_connections: How often the camera came back so far.
    """
    process = Path("/proc") / str(pid)
    lines = dict(line.split(":", 1) for line in (process / "status").read_text(encoding="utf-8").splitlines())
    memory_mb = int(lines["VmRSS"].split()[0]) * 1024 / 1e6
    num_files = len(list((process / "fd").iterdir()))
    return Sample(time_s, memory_mb, int(lines["Threads"]), num_files, num_frames, num_connections)


def format_samples(samples: list[Sample]) -> str:
    """Format one row per tenth of the time: the largest values, and the counts of the tenth.

    Args:
        samples: The samples.
    """
    rows, before = [], Sample(0, 0, 0, 0, 0, 0)
    size = max(1, len(samples) // NUM_ROWS)
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        cells = [f"{part[-1].time_s / 60:.1f}", f"{max(sample.memory_mb for sample in part):.1f}"]
        cells += [str(max(sample.num_threads for sample in part)), str(max(sample.num_files for sample in part))]
        cells += [str(part[-1].num_connections - before.num_connections), str(part[-1].num_frames - before.num_frames)]
        rows.append(cells)
        before = part[-1]
    return format_table(rows, ["minute", "memory, MB", "threads", "open files", "connections", "frames"])


if __name__ == "__main__":
    main()
