"""Check of a machine with an NVIDIA GPU: training, CUDA, TensorRT, INT8, CUDA graph and queue, in less than 10 minutes.

    make gpu-check
    python benchmarks/studies/gpu_check.py --device cpu --output runs/gpu_check_rehearsal

Each step of `gpu_check_steps.py` runs in a process of its own with a time limit; a step that fails does not stop the
others. Writes gpu_check.json and gpu_check.html to --output. With --device cpu, the steps that need a GPU are skipped.

Exit codes: 0 if all steps passed (with --device cpu: if none failed), otherwise 1.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
from gpu_check_steps import STEPS, find_skip_reason

from hkd_bench.host import HostFieldError, NvmlGpu, read_host_fields
from hkd_det.console import log_stage
from hkd_det.errors import UnavailableError, UsageError, run_command
from hkd_det.files import read_json, write_text

STEPS_FILE = Path(__file__).with_name("gpu_check_steps.py")
TEMPLATE = Path(__file__).with_name("gpu_check.html.j2")
JSON_NAME, PAGE_NAME = "gpu_check.json", "gpu_check.html"
SCHEMA_VERSION = 1
TOTAL_LIMIT_S = 600.0
TERMINATE_S = 5.0
MAX_LOG_LINES = 15

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class StepResult:
    """Result of one step.

    Attributes:
        name: Key of `STEPS`.
        title: What was checked.
        status: passed, failed or skipped.
        reason: Why it failed or was skipped; empty otherwise.
        seconds: Duration.
        values: Measured values by name; a suffix such as _ms is the unit.
        log: Last lines of the output of a failed step.
    """

    name: str
    title: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)
    log: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("gpu_check.py", run, sys.argv[1:] if argv is None else argv)


def run(argv: Sequence[str] | None) -> int:
    """Run all steps, write the JSON file and the page, and return the exit code.

    Args:
        argv: Arguments.

    Raises:
        UsageError: A flag is invalid.
        UnavailableError: There is no GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu_check"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument("--steps", metavar="A,B", help=f"only these steps of {', '.join(STEPS)}")
    flags = parser.parse_args(argv)
    names = flags.steps.split(",") if flags.steps else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        raise UsageError(f"--steps {unknown[0]}: expected a step of {', '.join(STEPS)}.")
    if flags.device != "cpu":
        require_gpu(flags.device)
    start = time.monotonic()
    results = [run_step(name, flags.device, flags.output, start + TOTAL_LIMIT_S) for name in names]
    command = shlex.join(["gpu_check.py", *(argv or [])])
    write_report(flags.output, results, flags.device, command, time.monotonic() - start)
    counts = {status: sum(one.status == status for one in results) for status in ("passed", "failed", "skipped")}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{'rehearsal without a GPU: ' if flags.device == 'cpu' else ''}{summary}")
    print(f"saved {flags.output / JSON_NAME} and {flags.output / PAGE_NAME}")
    return int(counts["failed"] > 0 or (flags.device != "cpu" and counts["skipped"] > 0))


def require_gpu(device: str) -> None:
    """Check that the driver has a GPU.

    Args:
        device: cuda or cuda:N.

    Raises:
        UnavailableError: There is none, or NVML cannot read it.
    """
    try:
        NvmlGpu(device)
    except HostFieldError as error:
        raise UnavailableError(
            f"--device {device}: no NVIDIA GPU ({str(error).rstrip('.')}). Use a machine with a GPU, or rehearse with "
            "--device cpu."
        ) from None


def run_step(name: str, device: str, output_dir: Path, deadline: float) -> StepResult:
    """Run one step in its own process.

    Args:
        name: Key of `STEPS`.
        device: cpu, or cuda or cuda:N.
        output_dir: Directory of the results; the steps share `work` in it.
        deadline: End of the whole check, on the clock of `time.monotonic`.

    Returns:
        The result. The step and all its processes have ended.
    """
    step = STEPS[name]
    if reason := find_skip_reason(step, device):
        return _report(StepResult(name, step.title, "skipped", reason))
    start, work_dir, reason = time.monotonic(), output_dir / "work", ""
    limit_s = min(step.limit_s, deadline - start)
    if limit_s <= 0:
        return _report(StepResult(name, step.title, "failed", f"not started: {TOTAL_LIMIT_S:.0f} s are over"))
    log_stage(f"{name}: {step.title}, at most {limit_s:.0f} s")
    work_dir.mkdir(parents=True, exist_ok=True)
    out_path, log_path = work_dir / f"{name}.json", output_dir / f"{name}.log"
    out_path.unlink(missing_ok=True)
    command = [sys.executable, str(STEPS_FILE), name, "--device", device, "--work", str(work_dir.resolve())]
    with log_path.open("wb") as log:
        # A new session, so that the time limit ends the processes of hkd-bench and TensorRT as well.
        process = subprocess.Popen(
            [*command, "--out", str(out_path.resolve())], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            reason = f"did not finish within {limit_s:.0f} s"
        finally:
            _end_session(process)
    seconds = time.monotonic() - start
    content = read_json(out_path) if out_path.exists() and not reason else {}
    if "values" in content:
        return _report(StepResult(name, step.title, "passed", "", seconds, content["values"]))
    if "skipped" in content:
        return _report(StepResult(name, step.title, "skipped", content["skipped"], seconds))
    lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = reason or content.get("error") or f"the process ended with exit code {process.returncode}"
    return _report(StepResult(name, step.title, "failed", reason, seconds, {}, tuple(lines[-MAX_LOG_LINES:])))


def _end_session(process: "subprocess.Popen[bytes]") -> None:
    """End the process and the processes that it started, if it still runs."""
    if process.poll() is not None:
        return
    process.terminate()  # lets a step end processes of other sessions, such as that of TensorRT's builder
    try:
        process.wait(TERMINATE_S)
    except subprocess.TimeoutExpired:
        process.kill()
    with contextlib.suppress(ProcessLookupError):  # no other process is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _report(result: StepResult) -> StepResult:
    reason = f": {result.reason}" if result.reason else ""
    print(f"{result.status:8}{result.name} ({result.seconds:.0f} s){reason}", flush=True)
    return result


def write_report(output_dir: Path, results: Sequence[StepResult], device: str, command: str, seconds: float) -> None:
    """Write the JSON file and the page.

    Args:
        output_dir: Directory of both.
        results: Result of each step.
        device: cpu, or cuda or cuda:N.
        command: Command line.
        seconds: Duration of all steps.
    """
    content = {
        "schema": SCHEMA_VERSION,
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device,
        "is_rehearsal": device == "cpu",
        "seconds": seconds,
        "host": [asdict(one) for one in read_host_fields()],
        "steps": [asdict(result) for result in results],
    }
    write_text(output_dir / JSON_NAME, json.dumps(content, indent=1) + "\n")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    rows = [(result, [_format_value(*pair) for pair in result.values.items()]) for result in results]
    write_text(output_dir / PAGE_NAME, template.render(**content, rows=rows))


def _format_value(name: str, value: Any) -> tuple[str, str]:
    """Return the name and the text of a value with its unit, which is the suffix of the name."""
    title, _, unit = name.partition("_")
    unit = {"mib": "MiB", "mj": "mJ", "w": "W", "j": "J", "mhz": "MHz", "tflops": "TFLOP/s"}.get(unit, unit)
    if name.startswith("share"):
        return title, f"{100 * value:.1f} %"
    if isinstance(value, float):
        return title, f"{value:.3g} {unit}".strip() if abs(value) < 1000 else f"{value:,.0f} {unit}".strip()
    return title, f"{value} {unit}".strip() if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
