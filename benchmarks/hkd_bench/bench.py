"""`bench`: several models on the same pictures, each in processes of its own, in turn.

A round measures every model once; the next round starts with another model. A machine that grows warm or busy
then slows all of them alike, instead of the last one.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hkd_bench.host import read_host_fields
from hkd_bench.result import SCHEMA_VERSION, BenchResult, ModelResult, StageSamples, StoredCurve
from hkd_bench.worker import ERROR_CLASSES, WorkerJob, WorkerResult, read_detections_npz
from hkd_deploy.backends import BACKENDS, default_backend
from hkd_deploy.backends.openvino import list_model_files
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.files import bytes_sha256, file_sha256
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.matching import MissRateResult
from hkd_det.structures import Detections, Sample


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    data, split, command: where the samples come from and what was typed, for the record. annotated: the samples' truth
    is known; without it no miss rate is measured. backends: each of them measures every model; None is the one of the
    model's kind of file. threads: CPU threads, None leaves it to the runtime. runs: timed runs a model over all rounds.
    warm_up, warm_up_s: untimed runs a round, at least so many and for at least so long. staged_runs: runs a round that
    time the stages. timed_pictures: most different pictures that are timed; they are held in memory.
    """

    device: str = "cpu"
    backends: tuple[str | None, ...] = (None,)
    threads: int | None = None
    runs: int = 200
    rounds: int = 3
    warmup: int = 10
    warmup_s: float = 0.5
    stage_runs: int = 20
    max_timed_images: int = 32
    data: str = ""
    split: str = ""
    command: str = ""
    has_ground_truth: bool = True


@dataclass(frozen=True)
class BenchEntry:
    """A model file on a backend, under the name it has in the tables. sha256: 64 hexadecimal digits of the file."""

    path: Path
    backend: str
    name: str
    sha256: str


def bench(
    models: Sequence[Path], samples: Sequence[Sample], options: BenchOptions, names: Sequence[str] | None = None
) -> BenchResult:
    """Measure model files side by side: miss rate over all samples, latency on some of them, memory.

    names: one a model and backend for the tables, the file names by default. Raises UsageError for options that make no
    sense, DataError and UnavailableError as opening and reading raise them.
    """
    _check_options(models, samples, options)
    contenders = _make_entries(models, options.backends, names)
    facts = read_host_fields()  # before the measurement itself raises the load
    rounds: list[list[WorkerResult]] = [[] for _ in contenders]
    detections: list[list[Detections]] = [[] for _ in contenders]
    with (
        tempfile.TemporaryDirectory(prefix="hkd-bench-") as folder,
        _make_progress_bar(contenders, samples, options) as bar,
    ):
        for number in range(options.rounds):
            for turn in range(len(contenders)):
                index = (turn + number) % len(contenders)
                bar.set_description(f"round {number + 1}/{options.rounds} {contenders[index].name}")
                job = _make_job(contenders[index], samples, options, number, Path(folder))
                rounds[index].append(_run_worker(job, Path(folder), bar))
                if job.eval_images:
                    detections[index] = read_detections_npz(Path(job.detections_npz))
    return BenchResult(
        schema=SCHEMA_VERSION,
        command=options.command,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        host=facts,
        device=options.device,
        threads=options.threads,
        data=options.data,
        split=options.split,
        num_images=len(samples) if options.has_ground_truth else 0,
        num_timed_images=len(_select_timed_samples(samples, options)),
        runs=options.runs,
        rounds=options.rounds,
        warmup=options.warmup,
        warmup_s=options.warmup_s,
        models=tuple(
            _make_model_result(contender, measured, evaluate_detections(samples if found else (), found))
            for contender, measured, found in zip(contenders, rounds, detections, strict=True)
        ),
    )


def _check_options(models: Sequence[Path], samples: Sequence[Sample], options: BenchOptions) -> None:
    if not models:
        raise UsageError("no model to measure")
    if not samples:
        raise DataError("no pictures to measure on")
    for backend in options.backends:
        if backend is not None and backend not in BACKENDS:
            raise UsageError(f"--backend {backend}: expected {', '.join(BACKENDS)}")
    for name in ("runs", "rounds", "stage_runs", "timed_images"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    if options.runs < options.rounds:
        raise UsageError(f"--runs {options.runs}: fewer than the {options.rounds} rounds")


def _make_entries(
    models: Sequence[Path], backends: Sequence[str | None], names: Sequence[str] | None
) -> list[BenchEntry]:
    pairs = [(path, backend or default_backend(path)) for path in models for backend in backends]
    digests = {path: _hash_model_files(path) for path in models}
    return [
        BenchEntry(path, backend, name, digests[path])
        for (path, backend), name in zip(pairs, _make_names(pairs, names), strict=True)
    ]


def _make_names(pairs: Sequence[tuple[Path, str]], names: Sequence[str] | None) -> list[str]:
    if names is None:
        paths = {path for path, _ in pairs}
        short = len({path.stem for path in paths}) == len(paths)
        names = [path.stem if short else str(path) for path, _ in pairs]
        if len(set(names)) < len(names):
            names = [f"{name} {backend}" for name, (_, backend) in zip(names, pairs, strict=True)]
    if len(names) != len(pairs):
        raise UsageError(f"--names: {len(names)} names for {len(pairs)} models (each on each backend)")
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UsageError(f"--names {','.join(names)}: every model needs a name of its own")
    return list(names)


def _hash_model_files(path: Path) -> str:
    digests = [file_sha256(file) for file in list_model_files(path)]
    return digests[0] if len(digests) == 1 else bytes_sha256("".join(digests).encode())


def _select_timed_samples(samples: Sequence[Sample], options: BenchOptions) -> list[Sample]:
    """Spread over the split."""
    places = np.linspace(0, len(samples) - 1, min(options.max_timed_images, len(samples)))
    return [samples[place] for place in places.round().astype(int)]


def _make_job(
    entry: BenchEntry, samples: Sequence[Sample], options: BenchOptions, round_index: int, work_dir: Path
) -> WorkerJob:
    """The first round evaluates too, after its times are taken: what is wrong with the data shows early."""
    evaluated = samples if options.has_ground_truth and round_index == 0 else ()
    return WorkerJob(
        model=str(entry.path),
        device=options.device,
        backend=entry.backend,
        threads=options.threads,
        timed_images=tuple(str(sample.path) for sample in _select_timed_samples(samples, options)),
        warmup=options.warmup,
        warmup_s=options.warmup_s,
        runs=options.runs // options.rounds + (round_index < options.runs % options.rounds),
        stage_runs=options.stage_runs,
        eval_images=tuple(str(sample.path) for sample in evaluated),
        detections_npz=str(work_dir / "detections.npz"),
    )


def _make_progress_bar(entries: Sequence[BenchEntry], samples: Sequence[Sample], options: BenchOptions) -> "tqdm[Any]":
    each = (
        options.runs + options.rounds * (options.warmup + options.stage_runs) + options.has_ground_truth * len(samples)
    )
    return tqdm(total=len(entries) * each, unit="run", leave=False)


def _run_worker(job: WorkerJob, work_dir: Path, bar: "tqdm[Any]") -> WorkerResult:
    """Run one worker to its end; its HkdError is raised here."""
    job_path, out_path, log_path = work_dir / "job.json", work_dir / "out.json", work_dir / "worker.log"
    job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    out_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "hkd_bench.worker", str(job_path), str(out_path)]
    with log_path.open("wb") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as worker:
        try:
            assert worker.stdout is not None
            for line in worker.stdout:
                bar.update(int(line) if line.strip().isdigit() else 0)  # a library may talk too
        except BaseException:
            worker.kill()
            raise
    if not out_path.exists():
        raise UnavailableError(f"{job.model}: {_worker_error(worker.returncode, log_path)}")
    found = json.loads(out_path.read_text(encoding="utf-8"))
    if "error" in found:
        raise ERROR_CLASSES[found["error"]](found["message"])
    return WorkerResult(**found["measured"])


def _worker_error(returncode: int, log_path: Path) -> str:
    """Why a worker ended without a word."""
    lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if returncode == -9:
        return "the measuring process was killed (signal 9), most likely for lack of memory; close other programs"
    return f"the measuring process ended with code {returncode}: {lines[-1] if lines else 'no message'}"


def _make_model_result(
    entry: BenchEntry, rounds: Sequence[WorkerResult], evaluation: dict[str, MissRateResult]
) -> ModelResult:
    first, largest = rounds[0], max(rounds, key=lambda one: one.peak_memory_mib)
    stages = np.concatenate([one.stages_ms for one in rounds])
    return ModelResult(
        name=entry.name,
        path=str(entry.path),
        sha256=entry.sha256,
        backend=entry.backend,
        model=first.model,
        parameters=first.parameters,
        flops=first.flops,
        imgsz_hw=(first.imgsz_hw[0], first.imgsz_hw[1]),
        file_mib=sum(file.stat().st_size for file in list_model_files(entry.path)) / 2**20,
        miss_rates={setup: found.value if found.num_gt else None for setup, found in evaluation.items()},
        num_gt={setup: found.num_gt for setup, found in evaluation.items()},
        curve=StoredCurve.from_miss_rate(evaluation[REASONABLE.name]),
        curve_all=StoredCurve.from_miss_rate(evaluation["All"]),
        e2e_ms=tuple(sample for one in rounds for sample in one.e2e_ms),
        stages=StageSamples(*(tuple(column.tolist()) for column in stages.T)),
        load_ms=tuple(one.load_ms for one in rounds),
        peak_memory_mib=largest.peak_memory_mib,
        baseline_mib=largest.baseline_mib,
    )
