"""Measurements after the rounds, each in a process of its own: load scenarios and sustained runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hkd_bench.device_state import DeviceState, OtherLoadMeter, summarize_conditions
from hkd_bench.energy import PowerTrace
from hkd_bench.scenarios import ScenarioResult
from hkd_bench.sustained import SustainedResult, SustainedRun, summarize_sustained
from hkd_bench.worker import WorkerJob
from hkd_bench.worker_process import run_worker
from hkd_det.config import dataclass_from_dict
from hkd_det.console import Progress, log_stage

States = Sequence[tuple[float, DeviceState]]


@dataclass
class SustainedSamples:
    """Samples of one sustained run.

    Attributes:
        requested_s: Requested duration in seconds.
        starts (float64[N]): Start of each frame, Unix time in seconds.
        latencies_ms (float64[N]): Latency of each frame in milliseconds.
        is_interrupted: Whether Ctrl-C ended the run.
        other_cpus: CPUs that other processes used meanwhile; None if it cannot be measured.
    """

    requested_s: float
    starts: np.ndarray
    latencies_ms: np.ndarray
    is_interrupted: bool
    other_cpus: float | None

    def summarize(self, states: States, traces: Mapping[str, PowerTrace], reason: str, device: str) -> SustainedResult:
        """Summarize the run.

        Args:
            states: Unix time in seconds and state of the device.
            traces: Power sensors by name; empty without sensors.
            reason: Reason why there are no sensors.
            device: cpu, cuda or cuda:N.

        Returns:
            The result with its marks.
        """
        run = SustainedRun(self.starts, self.latencies_ms, states, traces)
        result = summarize_sustained(run, self.requested_s, self.is_interrupted)
        marks = summarize_conditions(states, [run.window], self.other_cpus, device).marks
        return replace(result, marks=marks, power_reason=result.power_reason if traces else reason)


@dataclass
class ScenarioSamples:
    """Results of the scenarios of one model.

    Attributes:
        results: Result of each scenario.
        other_cpus: CPUs that other processes used in each scenario; None if it cannot be measured.
    """

    results: list[ScenarioResult] = field(default_factory=list)
    other_cpus: list[float | None] = field(default_factory=list)

    def mark(self, states: States, device: str) -> tuple[ScenarioResult, ...]:
        """Return the results with what makes them incomparable.

        Args:
            states: Unix time in seconds and state of the device.
            device: cpu, cuda or cuda:N.
        """
        return tuple(
            replace(one, marks=summarize_conditions(states, [one.window], other_cpus, device).marks)
            for one, other_cpus in zip(self.results, self.other_cpus, strict=True)
        )


def measure_scenarios(name: str, jobs: Sequence[WorkerJob], work_dir: Path, progress: Progress) -> ScenarioSamples:
    """Measure the scenarios of one model.

    Args:
        name: Name of the model.
        jobs: One job per scenario.
        work_dir: Directory for the files of the workers.
        progress: Progress bar.

    Returns:
        The results.
    """
    samples = ScenarioSamples()
    for job in jobs:
        progress.set_label(f"{job.scenario} {name}")
        log_stage(f"{progress.label}: at least {job.scenario_settings.min_duration_s:g} s")
        load = OtherLoadMeter()
        result = run_worker(job, work_dir, progress)
        samples.other_cpus.append(load.read())
        samples.results.append(dataclass_from_dict(ScenarioResult, result.scenario))
    return samples


def measure_sustained(
    names: Sequence[str], jobs: Sequence[WorkerJob], work_dir: Path, progress: Progress
) -> list[SustainedSamples | None]:
    """Run each model without pauses. Ctrl-C ends the run of the present model and leaves out the further ones.

    Args:
        names: Names of the models.
        jobs: One job per model.
        work_dir: Directory for the files of the workers.
        progress: Progress bar.

    Returns:
        The samples of each model; None for a model without a frame.
    """
    runs: list[SustainedSamples | None] = [None] * len(jobs)
    for index, (name, job) in enumerate(zip(names, jobs, strict=True)):
        progress.set_label(f"sustained {name}")
        log_stage(f"{progress.label}: {job.sustained_s:g} s; Ctrl-C ends it and keeps what was measured")
        load, path = OtherLoadMeter(), Path(job.sustained_npz)
        path.unlink(missing_ok=True)
        try:
            is_interrupted = run_worker(job, work_dir, progress).is_interrupted
        except KeyboardInterrupt:  # before the worker was ready
            is_interrupted = True
        if path.exists():
            with np.load(path) as arrays:
                starts, latencies_ms = arrays["starts"], arrays["latencies_ms"]
            if len(starts):
                runs[index] = SustainedSamples(job.sustained_s, starts, latencies_ms, is_interrupted, load.read())
        if is_interrupted:
            break
    return runs
